"""A region drawn anew: what is kept stays and is seen, and nothing else is different from drawing token by token.

The oracle is a picture drawn as a whole: where its own codes are kept around a hole, the same seed draws the same codes
into the hole, and leaves the same cache behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linear_core.errors import UserError
from linear_core.loop.forced import forced_lines, log_likelihood, prompt_match
from linear_core.loop.generate import Run, generate
from linear_core.loop.micro_batches import MicroBatches
from linear_core.loop.redraw import DRAW, best_of, candidates, following, keep_outside, masked_cells, pieces
from linear_core.loop.sampling import apply_guidance
from linear_core.plan import CachePlan, SamplePlan
from tests.loop.test_replay import drawn, setting
from tests.tiny import Recorder

SAMPLE = SamplePlan(seed=5, guidance=2.5)
HOLES = {  # of the two pictures, as (rows, cols) of a hole in each; the last code is drawn in both
    "the same": [(slice(2, 5), slice(1, 3)), (slice(2, 5), slice(1, 3))],
    "their own": [(slice(1, 3), slice(0, 4)), (slice(4, None), slice(2, None))],
    "from the start": [(slice(0, 2), slice(0, 2)), (slice(0, 1), slice(1, None))],
}


def hole(name: str, shape: torch.Size) -> torch.Tensor:
    cells = torch.zeros(shape, dtype=torch.bool)
    for image, (rows, cols) in enumerate(HOLES[name]):
        cells[image, rows, cols] = True
    cells[:, -1, -1] = True
    return cells


def redraw(case: str, policy: str, release: str, where: str, **more) -> tuple[Recorder, Recorder, torch.Tensor]:
    """The whole picture, and the same with a hole filled by `more` settings; and where the hole is."""
    whole = drawn(case, policy, release)
    decoder, prompt = setting(case)
    cells = hole(where, whole.tokens.shape)
    again = Recorder(decoder)
    sample = replace(SAMPLE, **more)
    kept = keep_outside(whole.tokens, cells)
    again.lines.extend(generate(again, prompt, whole.cache.plan, sample, kept=kept))
    return whole, again, cells


@pytest.mark.parametrize("where", HOLES)
@pytest.mark.parametrize(("policy", "release"), [("line", "lazy"), ("fold", "fold"), ("h2o", "strict")])
@pytest.mark.parametrize("case", ["class", "lumina"])
def test_a_hole_is_filled_as_the_whole_picture_was_drawn(case, policy, release, where):
    """Codes, what the cache holds at every line's end, and the keys it is left with."""
    whole, again, _ = redraw(case, policy, release, where)
    assert torch.equal(again.tokens, whole.tokens)
    torch.testing.assert_close(again.cache.keys.data, whole.cache.keys.data)
    for ours, theirs in zip(again.lines, whole.lines, strict=True):
        assert torch.equal(ours.share, theirs.share) and torch.equal(ours.by_head, theirs.by_head)


@pytest.mark.parametrize("where", HOLES)
@pytest.mark.parametrize("case", ["class", "lumina"])
def test_drafts_fill_the_same(case, where):
    _, again, _cells = redraw(case, "line", "lazy", where, drafts=4)
    _, plain, _ = redraw(case, "line", "lazy", where)
    assert torch.equal(again.tokens, plain.tokens)
    assert all(line.passes <= 2 for line in again.lines if line.replayed), "kept codes are their own drafts"
    assert not torch.equal(again.tokens, redraw(case, "line", "lazy", where, drafts=4, seed=6)[1].tokens)


@pytest.mark.parametrize("drafts", [0, 4])
def test_a_new_seed_changes_the_hole_alone(drafts):
    whole, again, cells = redraw("class", "line", "strict", "their own", seed=99, drafts=drafts)
    assert torch.equal(again.tokens[~cells], whole.tokens[~cells])
    assert not torch.equal(again.tokens[cells], whole.tokens[cells])
    full = [not cells[:, row].any() for row in range(len(cells[0]))]
    assert [line.replayed for line in again.lines] == full


def test_lines_that_are_kept_and_parts_of_a_batch():
    """Above a stopped run's rows, and in micro-batches: every picture has its own mask, seed and codes."""
    whole, again, cells = redraw("class", "line", "strict", "their own", seed=99)
    decoder, prompt = setting("class")
    kept, sample = keep_outside(whole.tokens, cells), replace(SAMPLE, seed=99)
    above = again.tokens[:, :3]
    batches = MicroBatches(prompt, sample, 1, above, kept=kept, advice="")
    for batch in batches:
        with batches.watch(batch):
            plan, (given,) = whole.cache.plan, batch.above
            for line in generate(decoder, batch.prompt, plan, batch.sample, above=given, kept=batch.kept):
                batch.runs[0].add(line)
    assert torch.equal(batches.runs[0].tokens, again.tokens)


def test_one_picture_for_the_batch():
    whole, *_ = redraw("class", "line", "strict", "the same")
    decoder, prompt = setting("class")
    kept = keep_outside(whole.tokens[:1], hole("the same", whole.tokens.shape)[:1])
    run = Run()
    for line in generate(decoder, prompt, whole.cache.plan, SAMPLE, kept=kept):
        run.add(line)
    assert torch.equal(run.tokens[0], whole.tokens[0])
    assert torch.equal(run.tokens[1][kept[0] != DRAW], whole.tokens[0][kept[0] != DRAW])


@pytest.mark.parametrize(
    ("kept", "above", "word"),
    [
        (torch.zeros(2, 7, 5, dtype=torch.int64), None, "mask: everything it marks"),
        (torch.full((2, 6, 5), DRAW), None, "6 lines of 5"),
        (torch.full((3, 7, 5), DRAW), None, "3 pictures"),
        (torch.full((2, 7, 5), 23), None, "code 23"),
        (keep_outside(torch.zeros(1, 7, 5, dtype=torch.int64), torch.eye(7, 5)[None] * torch.arange(7)[:, None] == 1),
         torch.zeros(1, 3, 5, dtype=torch.int64), "lower keep_rows"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(kept, above, word):
    decoder, prompt = setting("class")
    with pytest.raises(UserError, match=word):
        next(generate(decoder, prompt, CachePlan(budget=2, anchors=2, recent=1), SAMPLE, kept=kept, above=above))


# -- masks -------------------------------------------------------------------------------------------------------------


def test_a_cell_is_drawn_where_any_of_its_pixels_is_half_masked():
    mask = torch.zeros(2, 6, 8)
    mask[0, 1, 3], mask[0, 4, 4], mask[1, 5, 7] = 0.5, 0.49, 1.0
    cells = masked_cells(mask, 3, 4)
    assert cells.nonzero().tolist() == [[0, 0, 1], [1, 2, 3]]


def test_masks_and_pictures_are_paired():
    codes, cells = torch.arange(12).view(2, 2, 3), torch.zeros(1, 2, 3, dtype=torch.bool)
    cells[0, 0, 1] = True
    assert keep_outside(codes, cells).tolist() == [[[0, -1, 2], [3, 4, 5]], [[6, -1, 8], [9, 10, 11]]]
    assert len(keep_outside(codes[:1], cells.expand(4, -1, -1))) == 4
    with pytest.raises(UserError, match="3 masks for 2 pictures"):
        keep_outside(codes, cells.expand(3, -1, -1))
    with pytest.raises(UserError, match="nothing in it is marked"):
        keep_outside(codes, torch.zeros(1, 2, 3, dtype=torch.bool))


def test_pieces_are_a_code_and_the_known_ones_behind_it():
    known = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0]], dtype=torch.bool)
    assert pieces(known, [6]) == [(0, 2), (2, 5), (5, 6)]
    assert pieces(known, [2, 4, 6]) == [(0, 2), (2, 4), (4, 5), (5, 6)], "room is made after 4 tokens"
    assert pieces(known[:, :1], [1]) == [(0, 1)]
    assert pieces(torch.zeros(2, 3, dtype=torch.bool), [3]) == [(0, 1), (1, 2), (2, 3)]


# -- several fills -----------------------------------------------------------------------------------------------------


def test_the_likelihood_is_that_of_the_logits_that_were_drawn_from():
    """Of a picture drawn token by token, code by code, with guidance and without, and with guidance that ends."""
    whole = drawn("class", "line", "strict")
    decoder, prompt = setting("class")
    for sample in (SAMPLE, replace(SAMPLE, guidance=1.0), replace(SAMPLE, guidance_interval=7)):
        found = log_likelihood(decoder, prompt, whole.tokens, whole.cache.plan, sample, at_once=1)
        sequences = decoder.with_unconditional(prompt) if sample.guided else prompt
        codes = whole.tokens.repeat(sequences.rows // 2, 1, 1)
        lines = torch.cat(list(forced_lines(decoder, sequences, codes, whole.cache.plan)), 1)
        expected = []
        for number in range(35):
            logits = lines[:2, number] if not sample.guides(number) else apply_guidance(lines[:, number], 2, 2.5)
            expected.append(logits.log_softmax(-1).gather(1, whole.tokens.flatten(1)[:, number, None]))
        torch.testing.assert_close(found.flatten(1), torch.cat(expected, 1))


def test_the_match_is_the_likelihood_with_the_prompt_over_that_without():
    whole = drawn("class", "line", "strict")
    decoder, prompt = setting("class")
    plan, alone = whole.cache.plan, SamplePlan(guidance=1.0)
    ours = prompt_match(decoder, prompt, whole.tokens, plan)
    below = decoder.with_unconditional(prompt).select([2, 3])
    with_prompt, without = (log_likelihood(decoder, rows, whole.tokens, plan, alone) for rows in (prompt, below))
    torch.testing.assert_close(ours, with_prompt - without)
    other = prompt_match(decoder, prompt.select([1, 0]), whole.tokens, plan)
    assert not torch.equal(ours, other), "another class, another match"


def test_the_codes_behind_the_hole_are_judged():
    kept = torch.tensor([[[3, 3, DRAW], [3, DRAW, 3], [3, 3, 3]], [[DRAW, 3, 3], [3, 3, 3], [3, 3, DRAW]]])
    assert following(kept).int().tolist() == [[[0, 0, 0], [1, 0, 1], [1, 1, 1]], [[0, 1, 1], [1, 1, 1], [1, 1, 0]]]
    scores = torch.tensor([1.0, 3, 2, -5, -6, -4])
    assert best_of(scores, 3) == [1, 5] and best_of(scores, 3, 2) == [1, 2, 5, 3] and best_of(scores, 6) == [1]
    assert best_of(torch.zeros(4), 2) == [0, 2], "the first of equals"


def test_fills_have_seeds_of_their_own_and_the_first_is_the_pictures():
    assert candidates(SAMPLE, 3, 1) is SAMPLE
    many = candidates(replace(SAMPLE, seed=2**64 - 2), 2, 2)
    assert many.image_seeds(4) == (2**64 - 2, 2**32 - 2, 2**64 - 1, 2**32 - 1)

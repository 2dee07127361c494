"""Replay: lines that are given are fed a line at a time, and nothing after them can tell.

The oracle is drawing the same picture token by token: from the first line drawn on, logits, indices and what is
visible have to be the same, for every policy, strict and lazy.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from linear_core.errors import UserError
from linear_core.loop.generate import Run, generate
from linear_core.plan import RELEASES, CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import class_prompt
from tests.tiny import Recorder, Toy, caption_prompt, decode, llamagen, lumina, lumina_words

SAMPLE = SamplePlan(seed=5, guidance=2.5)


def setting(model: str) -> tuple:
    if model == "class":
        return llamagen(7, 5, dtype=torch.float64), class_prompt([1, 3])
    if model == "text":
        return llamagen(6, 4, text=True, dtype=torch.float64), caption_prompt([7, 4], dtype=torch.float64)
    if model == "lumina":
        return lumina(6, 4, dtype=torch.float64), lumina_words([6, 4])
    toy = Toy(6, 4, length=4, eol=model == "toy eol", dtype=torch.float64)
    return toy, toy.prompt([4, 2])


@cache
def drawn(model: str, policy: str, release: str, interval: int = -1) -> Recorder:
    """The picture, token by token."""
    decoder, prompt = setting(model)
    sample = SamplePlan(seed=5, guidance=2.5, guidance_interval=interval)
    return decode(decoder, prompt, CachePlan(policy, 2, 2, 1, release), sample)


# How many lines are given matters to the cache, and which policy chooses does not: few of them meet every number.
FIRST = {"one": 1, "filling": 3, "evicting": 4, "all but one": -1}
CASES = [("class", policy, release, "evicting") for policy in POLICIES for release in RELEASES]
CASES += [
    (model, policy, "lazy", given)
    for model in ("class", "text", "lumina", "toy", "toy eol")
    for policy in ("line", "h2o", "streaming")
    for given in FIRST
]
CASES += [("class", "fold", "fold", given) for given in FIRST]
CASES += [(model, "line", "strict", given) for model in ("text", "lumina", "toy", "toy eol") for given in FIRST]
CASES = list(dict.fromkeys(CASES))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_nothing_below_can_tell(case):
    """Logits, indices held and visibility of every later token, and so the tokens themselves."""
    *how, given = case
    whole = drawn(*how)
    decoder, prompt = setting(case[0])
    rows, stride = whole.cache.grid.rows, whole.cache.grid.stride
    first = FIRST[given] % rows
    start = first * stride
    again = Recorder(decoder, given=start)
    again.lines.extend(generate(again, prompt, whole.cache.plan, SAMPLE, above=whole.tokens[:, :first]))
    assert len(again.fed) == len(whole.fed) - start, "only the rest is drawn"
    torch.testing.assert_close(torch.stack(again.logits[1:]), torch.stack(whole.logits[start + 1 :]), equal_nan=True)
    for ours, theirs, our_bias, their_bias in zip(
        again.index, whole.index[start:], again.bias, whole.bias[start:], strict=True
    ):
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)
        assert torch.equal(ours, theirs) and torch.equal(our_bias, their_bias), "even the slots are the same"
    torch.testing.assert_close(again.cache.keys.data, whole.cache.keys.data)
    assert torch.equal(again.tokens, whole.tokens)
    assert [line.replayed for line in again.lines] == [row < first for row in range(rows)]
    for a, b in zip(again.lines, whole.lines, strict=True):
        assert torch.equal(a.share, b.share) and torch.equal(a.by_head, b.by_head) and a.held == b.held


@pytest.mark.parametrize("interval", [3, 9, 12])
def test_guidance_that_has_ended(interval):
    """Where guidance ends among the given lines, only the conditional rows go on."""
    whole = drawn("class", "line", "lazy", interval)
    decoder, prompt = setting("class")
    sample = SamplePlan(seed=5, guidance=2.5, guidance_interval=interval)
    again = Recorder(decoder)
    again.lines.extend(generate(again, prompt, whole.cache.plan, sample, above=whole.tokens[:, :2]))
    assert torch.equal(again.tokens, whole.tokens) and again.cache.rows == 2
    torch.testing.assert_close(again.logits[-1], whole.logits[-1])


def test_the_comparison_can_see():
    """One code changed above changes what comes below, and so does a victim that vanishes a token early."""
    whole = drawn("class", "line", "lazy")
    decoder, prompt = setting("class")
    other = whole.tokens[:, :4].clone()
    other[:, 3, 1] = (other[:, 3, 1] + 1) % decoder.codes
    changed = Recorder(decoder)
    list(generate(changed, prompt, whole.cache.plan, SAMPLE, above=other))
    assert (changed.logits[1] - whole.logits[21]).abs().max() > 0.01
    strict = drawn("class", "line", "strict")
    assert (strict.logits[-1] - whole.logits[-1]).abs().max() > 0.01


def test_a_new_seed_changes_only_the_rest():
    """The lines above stay, the rest is drawn anew, as that seed draws them; one picture may stand above several."""
    whole = drawn("class", "line", "strict")
    decoder, prompt = setting("class")
    run = Run()
    for line in generate(decoder, prompt, whole.cache.plan, SamplePlan(seed=99), above=whole.tokens[:1, :3]):
        run.add(line)
    assert torch.equal(run.tokens[:, :3], whole.tokens[:1, :3].expand(2, -1, -1))
    assert not torch.equal(run.tokens[:1, 3:], whole.tokens[:1, 3:])
    drawn_lines = [line for line in run.lines if not line.replayed]
    assert run.tokens_per_second == pytest.approx(2 * 4 * 5 / sum(line.seconds for line in drawn_lines))


@pytest.mark.parametrize(
    ("above", "named"),
    [
        (torch.zeros(2, 7, 5, dtype=torch.int64), "at most 6"),
        (torch.zeros(2, 2, 4, dtype=torch.int64), "lines of 4"),
        (torch.zeros(3, 2, 5, dtype=torch.int64), "3 pictures"),
        (torch.full((2, 2, 5), 23), "code 23"),
        (torch.full((2, 2, 5), -1), "code"),
    ],
)
def test_tokens_that_do_not_fit(above, named):
    """A sentence that says what was found, before anything is drawn."""
    decoder, prompt = setting("class")
    with pytest.raises(UserError, match=named):
        next(generate(decoder, prompt, CachePlan(budget=2, anchors=2, recent=1), SAMPLE, above=above))

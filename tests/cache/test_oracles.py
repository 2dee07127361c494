"""The two oracles. Either alone lets real bugs through.

A  Eviction is masking: decoding through the cache gives the logits of one uncached pass over the whole sequence under
   the mask of what was visible, as the cache itself recorded it. Proves writes, rotation, masks, heads and layers.
B  The cache holds what was chosen: from the scores that the policy gave, plain Python sets predict which indices each
   layer, row and head holds after every token. Proves the record that the first oracle trusts.

Both look at the same runs: every policy, strict and lazy (the second also with folding), with guidance rows, on several
grids and budgets, for models that have little in common (LlamaGen, Janus, and the Toy of tests/tiny.py).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from linear_core.cache.view import View
from linear_core.plan import RELEASES, UNEVEN, CachePlan, SamplePlan
from linear_core.policies import POLICIES, Policy
from linear_core.prompts import class_prompt
from tests.tiny import (
    Recorder,
    Toy,
    caption_prompt,
    decode,
    grouped,
    janus,
    llamagen,
    lumina,
    lumina_words,
    policy,
    words,
)


class Case(NamedTuple):
    model: str
    rows: int
    cols: int
    budget: int
    anchors: int
    recent: int


MAIN = Case("class", 7, 5, 3, 2, 1)
GRIDS = [
    Case("class", 6, 5, 1, 2, 0),  # one line, all of it up for choice but two anchors
    Case("class", 6, 5, 1, 0, 1),  # one line, all of it protected: the newest
    Case("class", 6, 5, 2, 3, 1),
    Case("class", 6, 5, 4, 4, 2),
    Case("class", 6, 5, 5, 4, 2),  # a budget one short of the picture evicts nothing
    Case("class", 6, 5, 9, 4, 2),  # more than there is
    Case("class", 4, 7, 2, 7, 1),  # wide; a whole line of anchors
    Case("class", 8, 3, 4, 1, 2),  # tall
    Case("class", 4, 4, 2, 0, 0),  # square, nothing protected
    Case("class", 1, 6, 1, 0, 0),  # a single line
    Case("class", 6, 1, 2, 1, 1),  # a single column
    Case("class 1d", 6, 5, 2, 3, 1),  # 1-D RoPE
    Case("text", 6, 5, 2, 3, 1),  # captions of 7 and 4 tokens, left-padded to 7
    Case("janus", 6, 5, 2, 3, 1),  # prompts of 6 and 4 tokens, a slot for each, positions that leave out padding
    Case("janus qk", 5, 4, 2, 2, 1),  # and queries and keys normalised
    Case("lumina", 5, 4, 2, 2, 1),  # and line ends, and unconditional rows shorter than the others
    Case("grouped", 5, 4, 2, 2, 1),  # and two query heads for each key head
    Case("toy", 5, 4, 2, 2, 1),  # a slot for every prompt token, some of them padding
    Case("toy eol", 5, 4, 2, 2, 1),  # and an end-of-line token
]
RUNS = (
    [(name, release, MAIN) for name in POLICIES for release in RELEASES]
    + [("line", release, case) for release in RELEASES for case in GRIDS]
    + [("h2o", "strict", case) for case in GRIDS if case.model != "class"]
    + [(name, "lazy", Case("text", 4, 5, 1, 1, 0)) for name in POLICIES if name != "line"]
    + [(name, "strict", Case("toy eol", 6, 3, 2, 2, 1)) for name in POLICIES if name != "line"]
    + [(name, "lazy", Case("janus", 4, 5, 1, 1, 0)) for name in POLICIES if name != "line"]
    + [(name, "lazy", Case("lumina", 5, 3, 2, 1, 1)) for name in POLICIES if name != "line"]
    + [(name, "lazy", Case("grouped", 5, 3, 2, 1, 1)) for name in POLICIES if name != "line"]
    + [(name, release, MAIN) for name in ("flat", "coarse") for release in RELEASES]
)
# Two policies full of ties, to see who goes first among equals.
TIES = {
    "flat": Policy(lambda view: torch.zeros_like(view.bias)),
    "coarse": Policy(lambda view: (view.index % 3).float()),
}


def name_of(run: tuple[str, str, Case]) -> str:
    return f"{run[0]}-{run[1]}-{'x'.join(str(part) for part in run[2])}".replace(" ", "_")


@cache
def run(name: str, release: str, case: Case) -> Recorder:
    """One run of the loop with a batch of two and guidance, shared by both oracles."""
    if case.model.startswith("class"):
        rope = "1d" if case.model == "class 1d" else "2d"
        decoder, prompt = llamagen(case.rows, case.cols, rope=rope), class_prompt([1, 3])
    elif case.model == "text":
        decoder, prompt = llamagen(case.rows, case.cols, text=True), caption_prompt([7, 4])
    elif case.model.startswith("janus"):
        decoder, prompt = janus(case.rows, case.cols, qk_norm=case.model == "janus qk"), words([6, 4])
    elif case.model in ("lumina", "grouped"):
        make = lumina if case.model == "lumina" else grouped
        decoder, prompt = make(case.rows, case.cols), lumina_words([6, 4])
    else:
        decoder = Toy(case.rows, case.cols, length=4, eol=case.model == "toy eol")
        prompt = decoder.prompt([4, 2])
    plan = CachePlan(name, case.budget, case.anchors, case.recent, release)
    with policy(name, TIES.get(name) or POLICIES[name]):
        return decode(decoder, prompt, plan, SamplePlan(seed=7, guidance=2.5))


every_run = pytest.mark.parametrize("which", RUNS, ids=name_of)
# Folding changes keys and values, which no mask can describe: tests/cache/test_fold.py has its oracles.
every_dropping_run = pytest.mark.parametrize("which", [run for run in RUNS if run[1] != "fold"], ids=name_of)


def visibility(recorder: Recorder) -> Tensor:
    """Which key each token saw, from the cache's record: bool L B H T+N T+N, N tokens fed."""
    prompt, fed = recorder.prompt, len(recorder.fed)
    length = prompt.length
    place = torch.arange(length)
    words = place >= prompt.pad[:, None]  # B T
    layers, rows, heads, _ = recorder.index[0].shape
    visible = torch.zeros(layers, rows, heads, length + fed, length + fed + 1, dtype=torch.bool)
    for number, index in enumerate(recorder.index):
        visible[..., length + number, :].scatter_(-1, index.long() + 1, True)  # index -1 goes to a column of its own
    visible = visible[..., 1:]
    if recorder.prompt_slots == 1:  # one slot stands for all the words of the prompt
        seen = visible[..., length:, :1]
        visible[..., length:, :length] = seen & words[None, :, None, None]
    causal = (place[None, :] <= place[:, None]) & words[:, None] | torch.eye(length, dtype=torch.bool)
    visible[..., :length, :length] = causal[None, :, None]
    return visible


@every_dropping_run
def test_eviction_is_masking(which):
    """A: each logit equals that of one uncached pass under the recorded mask."""
    recorder = run(*which)
    visible = visibility(recorder)
    tokens = torch.stack(recorder.fed, 1) if recorder.fed else torch.zeros(recorder.prompt.rows, 0, dtype=torch.int64)
    expected = recorder.decoder.forward(recorder.prompt, tokens, visible)[:, recorder.prompt.length - 1 :]
    ours = torch.stack(recorder.logits, 1)
    known = ~ours.isnan()  # between a line's last code and its end nobody asks for logits
    assert known.flatten(2).all(-1).sum(1).eq(recorder.tokens[0].numel()).all()
    torch.testing.assert_close(ours[known], expected.float()[known], atol=2e-5, rtol=1e-5)


@every_run
def test_index_and_bias_agree(which):
    """A slot that names a token is seen with full weight, any other is not seen, and no token lies in two slots."""
    recorder = run(*which)
    prompt_slots = recorder.prompt_slots
    for index, bias in zip(recorder.index, recorder.bias, strict=True):
        assert torch.equal(index >= 0, bias > float("-inf"))
        if which[1] != "fold":
            image = index[..., prompt_slots:] >= 0
            assert not bias[..., prompt_slots:].clamp(min=-1).where(image, torch.tensor(0.0)).any()
        ordered = index.sort(-1).values
        assert not ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any()


def predict(recorder: Recorder, plan: CachePlan, layer: int, row: int, head: int) -> list[set[int]]:
    """B: what one head holds after every token fed, from the policy's scores, with sets and sorted() alone."""
    grid, length = recorder.cache.grid, recorder.prompt.length
    held = {0} if recorder.prompt_slots == 1 else set(range(int(recorder.prompt.pad[row]), length))
    evicts = plan.policy != "full" and plan.budget + 1 < grid.rows
    doomed: list[int] = []  # lazy victims of the last line, in the order in which they disappear
    history = []
    for number in range(len(recorder.fed)):
        line, column = divmod(number, grid.stride)
        parts = [0, *plan.ends(grid, line)]
        if column in parts and evicts and line > plan.budget:  # the line before this one, or a part of it, has ended
            coming = parts[parts.index(column) + 1] - column
            scores, index = (t[layer, row, head].tolist() for t in recorder.scores[number])
            score = {i: s for i, s in zip(index, scores, strict=True) if i >= 0}
            assert set(score) == held, "the policy is shown what is held"
            anchors = range(length, length + plan.anchors)
            newest = range(length + (line - plan.recent) * grid.stride, length + number) if plan.recent else ()
            free = [i for i in held if i >= length and i not in anchors and i not in newest]
            keep = (plan.budget + 1) * grid.stride - coming
            if number in recorder.keep:
                keep = int(recorder.keep[number][layer, row, head])
            images = sum(i >= length for i in held)
            assert keep <= images, "no head is to keep more than it has"
            victims = sorted(free, key=lambda i: (score[i], i))[: images - keep]
            # A lazy victim stays until it is overwritten; those in excess of a line's slots have no one to wait for.
            held = held - set(victims[: -grid.stride] if plan.release == "lazy" else victims)
            assert len(victims) == images - keep
            doomed = [-1] * (grid.stride - len(victims)) + victims[-grid.stride :]
        if doomed:
            held = held - {doomed[column]}
        held = held | {length + number}
        history.append(held)
    return history


@every_run
def test_the_cache_holds_what_was_chosen(which):
    """B: after every token, every layer, row and head holds exactly the indices that sets predict.

    Victims of least score leave, the oldest first among equals; prompt, anchors and recent lines stay; strict victims
    leave together at the line's end, lazy ones one by one, the least useful first.
    """
    recorder = run(*which)
    plan = recorder.cache.plan
    for layer in range(recorder.index[0].shape[0] if recorder.index else 0):
        for row in range(recorder.prompt.rows):
            for head in range(recorder.index[0].shape[2]):
                expected = predict(recorder, plan, layer, row, head)
                for number, held in enumerate(expected):
                    slots = recorder.index[number][layer, row, head].tolist()
                    assert {i for i in slots if i >= 0} == held, f"layer {layer} row {row} head {head} token {number}"


@every_run
def test_policy_is_asked_when_the_cache_is_full(which):
    """Scores are asked for at the end of every line, or part of one, that has no room behind it, and never else."""
    name, _, case = which
    recorder, expected = run(*which), []
    grid, plan = recorder.cache.grid, recorder.cache.plan
    if name != "full" and case.budget + 1 < case.rows:
        ends = [row * grid.stride + end for row in range(case.budget, case.rows) for end in plan.ends(grid, row)]
        expected = ends[:-1]  # behind the last there is nothing
    assert list(recorder.scores) == expected


@every_run
def test_never_more_than_prompt_budget_and_one_line(which):
    """The number of slots in use never exceeds prompt + budget + one line; strict is back at its budget after a line,
    and full again after each part of one.
    """
    name, release, case = which
    recorder = run(*which)
    stride = recorder.cache.grid.stride
    room = 2 * case.budget if name in UNEVEN else case.budget
    lines = case.rows if name == "full" else min(room + 1, case.rows)
    most = recorder.prompt_slots + lines * stride
    assert recorder.cache.slots == most
    for number, index in enumerate(recorder.index):
        held = (index[..., recorder.prompt_slots :] >= 0).sum(-1)
        assert int(held.max()) <= lines * stride
        line, column = divmod(number, stride)
        if name not in ("full", "flat", "coarse") and line > case.budget:
            if release != "lazy":
                heads = held if name not in UNEVEN else held.double().mean((0, 2))
                end = next(end for end in recorder.cache.plan.ends(recorder.cache.grid, line) if end > column)
                assert (heads == (case.budget + 1) * stride - (end - column - 1)).all()
            elif name not in UNEVEN:
                assert (held == (case.budget + 1) * stride).all()


@every_run
def test_heads_keep_what_was_shared_out(which):
    """Under uneven budgets a head keeps at least what is protected and at most twice the budget, as decided."""
    recorder = run(*which)
    plan, stride = recorder.cache.plan, recorder.cache.grid.stride
    assert bool(recorder.keep) == (plan.policy in UNEVEN and plan.evicts(recorder.cache.grid))
    for number, keep in recorder.keep.items():
        assert keep.dtype == torch.int64
        assert int(keep.min()) >= plan.anchors + plan.recent * stride
        assert int(keep.max()) <= 2 * plan.budget * stride
        among = (2,) if plan.policy in ("adakv", "headkv") else (0, 2)  # a layer's heads, or all layers'
        assert (keep.double().mean(among) == plan.budget * stride).all()
        if plan.release != "lazy":
            held = (recorder.index[number][..., recorder.prompt_slots :] >= 0).sum(-1)
            rows = held.shape[1]  # guidance may have ended
            assert torch.equal(held - 1, keep[:, :rows])


@every_run
def test_prompt_anchors_and_recent_lines_survive(which):
    """Once written, the prompt and the anchors are held to the end, and a recent line as long as it is recent."""
    recorder = run(*which)
    plan, grid, length = recorder.cache.plan, recorder.cache.grid, recorder.prompt.length
    for number in range(len(recorder.fed)):
        line = number // grid.stride
        for layer in recorder.held(number):
            for row, heads in enumerate(layer):
                for head in heads:
                    assert head >= {length + i for i in range(min(plan.anchors, number + 1))}
                    oldest = max(line - plan.recent, 0) * grid.stride
                    assert head >= {length + i for i in range(oldest, number + 1)}
                    assert head >= (
                        {0} if recorder.prompt_slots == 1 else set(range(int(recorder.prompt.pad[row]), length))
                    )


def test_the_oracles_can_see():
    """The runs above are worth comparing: heads, layers and rows disagree on victims, and a victim's absence is felt.

    Without this, uniform attention or equal scores would let both oracles pass for a cache that mixes up its heads.
    """
    recorder = run("line", "strict", MAIN)
    held = torch.stack(recorder.index, -2).sort(-1).values.flatten(3)  # L B H, all that was ever held
    # In the first layer a pair's keys are the same with and without its prompt; further up all may differ.
    first, second = (len(layer.flatten(0, 1).unique(dim=0)) for layer in held)
    assert first > 3 and second > 2 * 3, "of the 2 x 3 and 4 x 3 there could be, more than half"
    tokens = torch.stack(recorder.fed, 1)
    everything = recorder.decoder.forward(recorder.prompt, tokens)[:, -1]
    assert (recorder.logits[-1] - everything).abs().amax(-1).min() > 0.1
    other = run("line", "lazy", MAIN)
    assert (torch.stack(recorder.logits)[:, :2] - torch.stack(other.logits)[:, :2]).abs().max() > 0.1


def test_a_policy_is_shown_the_finished_line():
    """The view of a strict run at a line's end: its queries are the line's own, its keys those of the tokens named.

    The toy looks keys and queries up, whatever was visible, so they are known without a cache.
    """
    seen: list[View] = []

    def watch(view: View) -> Tensor:
        copies = {name: getattr(view, name).clone() for name in ("keys", "values", "index", "queries")}
        seen.append(View(**copies, bias=view.bias, mass=None, grid=view.grid, row=view.row, layer=view.layer))
        return view.index.float() % 4

    toy = Toy(5, 4, length=3, eol=True)
    prompt = toy.prompt([3, 2])
    with policy("watch", Policy(watch, frozenset({"queries"}))):
        recorder = decode(toy, prompt, CachePlan("watch", budget=2, anchors=1, recent=1), SamplePlan(guidance=2.0))
    tokens = torch.cat([recorder.prompt.tokens, torch.stack(recorder.fed, 1)], 1)
    queries, keys, values = toy.look_up(tokens, torch.arange(tokens.shape[1]), recorder.prompt.pad)
    assert [(view.row, view.layer, len(view.index)) for view in seen] == [(2, 0, 2), (3, 0, 2)]
    for view in seen:
        first = view.grid.index(view.row)
        torch.testing.assert_close(view.queries, queries[..., first : first + view.grid.stride, :])
        place = view.index.long().clamp(min=0)[..., None].expand_as(view.keys)
        there = (view.index >= 0)[..., None]
        torch.testing.assert_close(view.keys * there, keys.gather(3, place) * there)
        torch.testing.assert_close(view.values * there, values.gather(3, place) * there)
        assert view.newest == first + view.grid.stride - 1 == int(view.index.max())

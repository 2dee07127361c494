"""How many images fit, and batches that are drawn in parts because not all of them do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linear_core.grid import Grid
from linear_core.loop.generate import Run, generate
from linear_core.loop.memory import layers_at_once, max_batch_size, run_bytes, split_batch
from linear_core.loop.micro_batches import MicroBatches
from linear_core.plan import CachePlan, CacheShape, SamplePlan
from linear_core.prompts import class_prompt
from tests import tiny


def test_how_many_fit() -> None:
    assert max_batch_size(100, 16, lambda n: 10 + 30 * n) == 3
    assert max_batch_size(100, 2, lambda n: 10 + 30 * n) == 2, "no more than there are"
    assert max_batch_size(5, 16, lambda n: 10 + 30 * n) == 1, "one has to be tried"
    assert [list(part) for part in split_batch(7, 3)] == [[0, 1], [2, 3], [4, 5, 6]]
    assert [len(part) for part in split_batch(16, 16)] == [16] and [len(part) for part in split_batch(3, 1)] == [
        1,
        1,
        1,
    ]


def test_folding_is_reckoned_with() -> None:
    """It compares slots with slots at a line's end, some rows at a time; with a full cache there is no such end."""
    shape, grid = CacheShape(36, 20, 64, 1, 2), Grid(24, 24)

    def needed(policy: str, budget: int, rows: int, device: str = "cuda") -> int:
        return run_bytes(shape, grid, CachePlan(policy, budget), rows, 16384, device)

    beside = [needed("fold", 4, rows) - needed("line", 4, rows) for rows in (16, 512, 1024)]
    assert beside[0] > 0 and beside[1] > beside[2], "bounded, and in place of what scores take for all rows"
    assert needed("fold", 4, 512, "cpu") < needed("fold", 4, 512)
    assert needed("fold", 24, 512) == needed("full", 4, 512)


def draw(decoder: Any, prompt: Any, plan: CachePlan, sample: SamplePlan, at_once: int, above: Any = None) -> Run:
    micro_batches = MicroBatches(prompt, sample, at_once, above, advice="draw fewer")
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            for line in generate(decoder, micro_batch.prompt, plan, micro_batch.sample, above=micro_batch.above[0]):
                micro_batch.runs[0].add(line)
    return micro_batches.runs[0]


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_parts_of_a_batch_are_the_batch(at_once: int) -> None:
    """Every picture keeps its seed, its text and its rows above: tokens, shares and what is held are the same."""
    decoder = tiny.janus(6, 5, dtype=torch.float64)
    prompt = replace(tiny.words([7, 3, 5, 7]), names=tuple("abcd"))
    plan, sample = CachePlan(budget=2, anchors=1, recent=1), SamplePlan(seed=9, guidance=3.0)
    whole = draw(decoder, prompt, plan, sample, 4)
    parts = draw(decoder, prompt, plan, sample, at_once)
    assert torch.equal(whole.tokens, parts.tokens) and torch.equal(whole.shares, parts.shares)
    assert whole.held == pytest.approx(parts.held, abs=2e-3)
    largest = len(split_batch(4, at_once)[-1])
    assert parts.lines[0].cache_bytes <= whole.lines[0].cache_bytes * largest // 4
    above = whole.tokens[:, :2].flip(0)
    for given in (above, above[:1]):
        kept = draw(decoder, prompt, plan, sample, at_once, given)
        assert torch.equal(kept.tokens, draw(decoder, prompt, plan, sample, 4, given).tokens)
        assert torch.equal(kept.tokens[:, :2], given.expand(4, -1, -1))


@pytest.mark.parametrize("storage", ["full", "int8"])
@pytest.mark.parametrize(
    ("policy", "release"),
    [("fold", "fold"), ("h2o", "fold"), ("random", "fold"), ("h2o", "lazy"), ("pyramidkv", "strict")],
)
def test_rows_and_layers_end_a_line_one_by_one_as_all_at_once(
    policy: str, release: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit: the same tokens, keys, values, weights and indices."""
    decoder, sample = tiny.llamagen(7, 5, layers=3), SamplePlan(seed=2, guidance=3.0)
    plan, caches = CachePlan(policy, 3, 2, 1, release, storage), []
    for pairs, layers in ((1, 1), (3 * 2 * 21**2, 1), (10**9, 1), (10**9, 2), (10**9, 3), (1, 3)):
        monkeypatch.setattr("linear_core.loop.generate.fold_pairs", lambda device, pairs=pairs: pairs)
        monkeypatch.setattr("linear_core.loop.generate.layers_at_once", lambda *_, layers=layers: layers)
        recorder = tiny.Recorder(decoder)
        recorder.lines.extend(generate(recorder, class_prompt([1, 3, 0]), plan, sample))
        cache = recorder.cache
        held = (torch.stack(each) for each in zip(*map(cache.read, range(3)), strict=True))
        caches.append((recorder.tokens, *held, cache.index))
    for other in caches[1:]:
        assert all(torch.equal(a, b) for a, b in zip(caches[0], other, strict=True))


def test_layers_that_end_a_line_together() -> None:
    """Of a single picture several layers, of many one; and what they need is counted."""
    shape, grid, plan = CacheShape(36, 20, 64, 1, 2), Grid(24, 24), CachePlan("fold", 4, recent=0)
    assert [layers_at_once(shape, 121, rows, False) for rows in (1, 2, 8, 32)] == [6, 3, 1, 1]
    assert layers_at_once(shape, 49, 2, True) == 4 and layers_at_once(shape, 1, 1, False) == 36

    def beside_the_cache(layers: int) -> int:
        few = replace(shape, layers=layers)
        return run_bytes(few, grid, plan, 2, 16384) - run_bytes(few, grid, CachePlan("random", 4), 2, 16384)

    assert beside_the_cache(3) > 2.9 * beside_the_cache(1)
    assert beside_the_cache(36) == beside_the_cache(3)

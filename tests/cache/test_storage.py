"""A cache in 8 bits: what it takes, what it rounds, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.cache.storage import Full, Int8
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.plan import RELEASES, CachePlan, CacheShape, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import Recorder, decode, llamagen

LEAD, SLOTS, STRIDE, DIM = (2, 3, 2), 11, 4, 6
BOTH = SamplePlan(seed=5, guidance=2.5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def pair() -> tuple[Full, Int8]:
    return tuple(kind(LEAD, SLOTS, STRIDE, DIM, torch.float32, "cpu") for kind in (Full, Int8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [CachePlan(budget=2), CachePlan("fold", 3, recent=1), CachePlan("full")])
def test_memory_is_what_the_plan_said(plan, dtype):
    """A byte a number and a number for the scale, keys and values, and the line being written as it is computed."""
    plan, grid = replace(plan, storage="int8"), Grid(6, 5, eol=1, prompt=2)
    shape = CacheShape(2, 3, 8, 2, dtype.itemsize)
    cache = LineCache(shape, 4, grid, plan, dtype=dtype, device="cpu", reads=frozenset({"ahead"}))
    buffers = [b for s in (cache.keys, cache.values) for b in (s.data, s.scale, s.fresh)]
    assert cache.nbytes == sum(b.untyped_storage().nbytes() for b in buffers) == shape.bytes(grid, plan, 4)
    if plan.policy == "full" and dtype != torch.float32:
        assert cache.nbytes < 0.8 * shape.bytes(grid, replace(plan, storage="full"), 4)


def test_rounding_is_to_the_nearest_of_255_steps():
    """Each head's slot has its own scale: no number is off by more than half a step of its slot's greatest."""
    _, stored = pair()
    x = noise(3, 2, 7, DIM) * torch.logspace(-3, 3, 7)[:, None]
    x[0, 0, 3] = 0
    stored.write_prompt(1, x)
    got = stored._dequantize(stored.data[1, :, :, :7], stored.scale[1, :, :, :7])
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((got - x).abs() <= step * 0.51 + 1e-7).all() and torch.equal(got[0, 0, 3], x[0, 0, 3])
    assert (got - x).abs().max() > 0


def test_a_line_is_exact_while_it_is_written_and_rounded_when_it_is_complete():
    """Token by token beside the plain storage; other slots, rows and layers are left alone."""
    plain, stored = pair()
    start = noise(3, 2, SLOTS, DIM, seed=1)
    for kind in (plain, stored):
        kind.write_prompt(0, start)
    target = torch.stack([torch.randperm(SLOTS, generator=torch.Generator().manual_seed(i))[:4] for i in range(6)])
    target = target.view(3, 2, 4)
    before = stored._dequantize(stored.data[0], stored.scale[0])
    stored.start_line(0, target)
    torch.testing.assert_close(stored.read(0, SLOTS), before, msg="what lies there is read until it is written over")
    seen = before.clone()
    for n in range(STRIDE):
        x, column = noise(3, 2, 1, DIM, seed=10 + n), torch.tensor([n])
        slot = target.index_select(2, column)
        stored.write(0, slot, column, x)
        seen.scatter_(2, slot[..., None].expand_as(x), x)
        assert torch.equal(stored.read(0, SLOTS), seen), "to the last bit"
    stored.finish_line(0, target)
    stored.start_line(0, target)
    got = stored.read(0, SLOTS)
    step = seen.abs().amax(-1, keepdim=True) / 127
    assert ((got - seen).abs() <= step * 0.51 + 1e-7).all() and not torch.equal(got, seen)
    assert not stored.data[1].any()


def test_only_what_is_folded_is_rounded_again():
    _, stored = pair()
    stored.write_prompt(0, noise(3, 2, SLOTS, DIM))
    stored.start_line(0, torch.zeros(3, 2, STRIDE, dtype=torch.int64))
    before, slot = stored.read(0, SLOTS).clone(), torch.tensor([1, 4, 1]).expand(1, 2, 3)
    where = torch.zeros(3, 2, SLOTS, dtype=torch.bool)
    where[1:2, :, [1, 4]] = True
    stored.overwrite(0, slice(1, 2), slot, before[1:2].gather(2, slot[..., None].expand(-1, -1, -1, DIM)) + 1)
    stored.start_line(0, torch.zeros(3, 2, STRIDE, dtype=torch.int64))
    got = stored.read(0, SLOTS)
    assert torch.equal(got[~where], before[~where])
    torch.testing.assert_close(got[where], before[where] + 1, atol=0.06, rtol=0)


@pytest.mark.parametrize("policy", ["line", "h2o", "fold", "full"])
def test_a_run_differs_by_rounding_alone(policy):
    """The plain run's picture, given line by line: the first token is exact, then rounding is there and small."""
    model, prompt = llamagen(7, 5), class_prompt([1, 3])
    plan = CachePlan(policy, 3, 2, 1)
    plain = decode(model, prompt, plan, BOTH)
    off = []
    for given in range(1, 3):  # before anything is let go, when a near tie could decide otherwise
        again = Recorder(model)
        again.lines.extend(generate(again, prompt, replace(plan, storage="int8"), BOTH, above=plain.tokens[:, :given]))
        assert torch.equal(again.logits[0], plain.logits[0])
        off.append((again.logits[1] - plain.logits[given * 5 + 1]).abs().max())
    assert 0 < min(off) <= max(off) < 0.1 * plain.logits[6].std()
    assert again.cache.nbytes < plain.cache.nbytes


@pytest.mark.parametrize("policy", ["streaming", "random"])
@pytest.mark.parametrize("release", ["strict", "lazy"])
def test_rounding_is_all_that_happens_when_lines_leave(policy, release):
    """Policies that look at nothing choose alike, so the logits are the plain run's to the end, but for rounding."""
    model, prompt = llamagen(7, 5), class_prompt([1, 3])
    plan = CachePlan(policy, 2, 2, 1, release)
    plain = decode(model, prompt, plan, BOTH)
    off = []
    for given in range(3, 7):
        again = Recorder(model)
        again.lines.extend(generate(again, prompt, replace(plan, storage="int8"), BOTH, above=plain.tokens[:, :given]))
        assert torch.equal(again.index[0], plain.index[given * 5]), "the same tokens are held"
        off.append((again.logits[1] - plain.logits[given * 5 + 1]).abs().max())
    assert 0 < min(off) <= max(off) < 0.2 * plain.logits[6].std()


@pytest.mark.parametrize("policy", ["line", "fold"])
@pytest.mark.parametrize("release", RELEASES)
def test_given_lines_leave_what_drawing_them_leaves(policy, release):
    """Replay and drawing settle alike, so a picture continued in 8 bits is the picture."""
    model, prompt = llamagen(7, 5, dtype=torch.float64), class_prompt([1, 3])
    plan = CachePlan(policy, 2, 2, 1, release, "int8")
    whole = decode(model, prompt, plan, BOTH)
    again = Recorder(model)
    again.lines.extend(generate(again, prompt, plan, BOTH, above=whole.tokens[:, :4]))
    torch.testing.assert_close(torch.stack(again.logits[1:]), torch.stack(whole.logits[21:]))
    assert torch.equal(again.tokens, whole.tokens)
    for kind in ("keys", "values"):
        ours, theirs = getattr(again.cache, kind), getattr(whole.cache, kind)
        assert torch.equal(ours.data, theirs.data) and torch.equal(ours.scale, theirs.scale)


def test_batch_guidance_and_its_end():
    """Singles, and rows dropped when guidance ends, work as with the plain storage."""
    model = llamagen(6, 5, dtype=torch.float64)
    plan = CachePlan("fold", 2, 2, 1, storage="int8")
    sample = SamplePlan(seed=3, guidance=2.5, guidance_interval=12)
    batch = decode(model, class_prompt([1, 3]), plan, sample)
    for i, label in enumerate((1, 3)):
        alone = decode(model, class_prompt([label]), plan, replace(sample, seed=3 + i))
        assert torch.equal(alone.tokens[0], batch.tokens[i])
        torch.testing.assert_close(alone.logits[-1][0], batch.logits[-1][i])
    assert batch.cache.keys.data.shape[1] == 2

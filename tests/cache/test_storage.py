"""A cache in 8 or 4 bits: what it takes, what it rounds, and what it must not touch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.cache.storage import STORAGE, Full, Int4, Int8, Packed, first_places
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.plan import RELEASES, CachePlan, CacheShape, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import Recorder, decode, llamagen

LEAD, SLOTS, DIM = (2, 3, 2), 11, 38  # two groups of 16 and a part
PACKED = ("int8", "int4")
BOTH = SamplePlan(seed=5, guidance=2.5)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 3


def make(storage: str) -> Full:
    return STORAGE[storage](LEAD, SLOTS, DIM, torch.float32, "cpu")


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", [CachePlan(budget=2), CachePlan("fold", 3, recent=1), CachePlan("full")])
def test_memory_is_what_the_plan_said(plan, dtype, storage):
    """Keys and values of every slot, each with a number for the scale, and nothing else."""
    plan, grid = replace(plan, storage=storage), Grid(6, 5, eol=1, prompt=2)
    for size in (8, 38, 64):
        shape = CacheShape(2, 3, size, 2, dtype.itemsize)
        cache = LineCache(shape, 4, grid, plan, dtype=dtype, device="cpu", reads=frozenset({"ahead"}))
        buffers = [b for s in (cache.keys, cache.values) for b in vars(s).values() if isinstance(b, Tensor)]
        assert cache.nbytes == sum(b.untyped_storage().nbytes() for b in buffers) == shape.bytes(grid, plan, 4)
    if dtype != torch.float32:
        share = {"int8": 66 / 128, "int4": 42 / 128}[storage]
        assert cache.nbytes == share * shape.bytes(grid, replace(plan, storage="full"), 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("kind", "worst"), [(Int8, 0.51 / 127), (Int4, 0.51 / 15)])
def test_rounding_is_to_the_nearest_step(kind: type[Packed], worst: float, dtype: torch.dtype):
    """8 bits: 255 steps of a slot's largest element. 4 bits: 16 levels between the extremes of each 16 elements."""
    x = noise(3, 2, 7, DIM) * torch.logspace(-3, 1.5, 7)[:, None]
    x[..., 16:32] += 20 * x.abs().amax(-1, keepdim=True)  # far from 0: a floor of its own in 4 bits
    x[0, 0, 3] = 0
    x = x.to(dtype)
    got = kind.unpack(*kind.pack(x), DIM)
    assert got.dtype == dtype and not got[0, 0, 3].any()
    largest = x.float().abs().amax(-1, keepdim=True)
    reach = largest
    if kind is Int4:
        parts = [part.float() for part in x.split(16, -1)]
        reach = torch.cat([(p.amax(-1, keepdim=True) - p.amin(-1, keepdim=True)).expand(p.shape) for p in parts], -1)
        reach = reach + largest * 2 * 2 / 255  # floor and step are rounded to 255ths
    rounding = 4 * torch.finfo(dtype).eps * largest
    off = (got.float() - x.float()).abs()
    assert (off <= reach * worst + rounding + 1e-7).all() and off.max() > 0


def places(slot: Tensor, row: int = 0) -> Tensor:
    """Of slots B H T, the first of them in this row of the batch."""
    return (slot + first_places((3, 2, SLOTS), "cpu")[row : row + len(slot)]).flatten()


@pytest.mark.parametrize("storage", PACKED)
def test_what_is_written_is_read_rounded_once(storage):
    """Token by token beside the plain storage; other slots, rows and layers are left alone."""
    plain, packed = make("full"), make(storage)
    start = noise(3, 2, SLOTS, DIM, seed=1)
    plain.write_prompt(0, start)
    packed.write_prompt(0, start)
    target = torch.stack([torch.randperm(SLOTS, generator=torch.Generator().manual_seed(i))[:4] for i in range(6)])
    target = target.view(3, 2, 4)
    for n in range(4):
        x, slot = noise(3, 2, 1, DIM, seed=10 + n), target[..., n : n + 1]
        for kind in (plain, packed):
            kind.write(0, places(slot), x)
        assert torch.equal(packed.read(0, SLOTS), packed.stored(plain.read(0, SLOTS)))
    assert not packed.read(1, SLOTS).any()


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("rows", [3, 2])
def test_a_line_of_which_some_is_written(storage, rows):
    """Every layer at once, where it is chosen; also once rows of the batch were dropped."""
    kind, again = make(storage), make(storage)
    slot = torch.stack([torch.randperm(SLOTS, generator=torch.Generator().manual_seed(i))[:4] for i in range(12)])
    slot, x = slot.view(2, 3, 2, 4)[:, :rows], noise(2, rows, 2, 4, DIM, seed=3)
    chosen = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)[:rows, None, :, None]
    for one in (kind, again):
        for layer in range(2):
            one.write_prompt(layer, noise(3, 2, SLOTS, DIM, seed=layer))
        one.keep_rows(rows)
    kind.write_some(slot, x, chosen)
    for layer in range(2):
        for row in range(rows):
            for column in range(4):
                if chosen[row, 0, column, 0]:
                    part = slice(row, row + 1), slice(None), slice(column, column + 1)
                    again.write(layer, places(slot[layer][part], row), x[layer][part])
        assert torch.equal(kind.read(layer, SLOTS), again.read(layer, SLOTS))


@pytest.mark.parametrize("storage", PACKED)
def test_only_what_is_folded_is_rounded_again(storage):
    packed = make(storage)
    packed.write_prompt(0, noise(3, 2, SLOTS, DIM))
    before, slot = packed.read(0, SLOTS).clone(), torch.tensor([1, 4, 1]).expand(1, 2, 3)
    where = torch.zeros(3, 2, SLOTS, dtype=torch.bool)
    where[1:2, :, [1, 4]] = True
    packed.write(0, places(slot, 1), before[1:2].gather(2, slot[..., None].expand(-1, -1, -1, DIM)) + 1)
    got = packed.read(0, SLOTS)
    assert torch.equal(got[~where], before[~where])
    torch.testing.assert_close(got[where], before[where] + 1, atol=0.06 if storage == "int8" else 0.7, rtol=0)


@pytest.mark.parametrize(("storage", "most"), [("int8", 0.1), ("int4", 1.0)])
@pytest.mark.parametrize("policy", ["line", "h2o", "fold", "full"])
def test_a_run_differs_by_rounding_alone(policy, storage, most):
    """The plain run's picture, given line by line: rounding is there and small."""
    model, prompt = llamagen(7, 5), class_prompt([1, 3])
    plan = CachePlan(policy, 3, 2, 1)
    plain = decode(model, prompt, plan, BOTH)
    off = []
    for given in range(1, 3):  # before anything is let go, when a near tie could decide otherwise
        again = Recorder(model)
        again.lines.extend(generate(again, prompt, replace(plan, storage=storage), BOTH, above=plain.tokens[:, :given]))
        off.append((again.logits[1] - plain.logits[given * 5 + 1]).abs().max())
    assert 0 < min(off) <= max(off) < most * plain.logits[6].std()
    assert again.cache.nbytes < plain.cache.nbytes


@pytest.mark.parametrize("storage", PACKED)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("policy", ["h2o", "fold"])
def test_it_is_the_plain_cache_of_rounded_numbers(policy, release, storage, monkeypatch):
    """Victims, folds, masses and logits to the end, with guidance and its end."""

    class Rounded(Full):
        def write(self, layer: int, place: Tensor, x: Tensor) -> None:
            super().write(layer, place, self.stored(x))

        def write_prompt(self, layer: int, x: Tensor) -> None:
            super().write_prompt(layer, self.stored(x))

        def stored(self, x: Tensor) -> Tensor:
            kind = STORAGE[storage]
            return kind.unpack(*kind.pack(x), x.shape[-1])

    model, prompt = llamagen(7, 5, dtype=torch.float64), class_prompt([1, 3])
    plan, sample = CachePlan(policy, 2, 2, 1, release, storage), replace(BOTH, guidance_interval=21)
    ours = decode(model, prompt, plan, sample)
    monkeypatch.setitem(STORAGE, "full", Rounded)
    theirs = decode(model, prompt, replace(plan, storage="full"), sample)
    for found, wanted in ((ours.logits, theirs.logits), (ours.index, theirs.index)):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("policy", ["line", "fold"])
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("storage", PACKED)
def test_given_lines_leave_what_drawing_them_leaves(policy, release, storage):
    """Replay and drawing settle alike, so a picture continued is the picture."""
    model, prompt = llamagen(7, 5, dtype=torch.float64), class_prompt([1, 3])
    plan = CachePlan(policy, 2, 2, 1, release, storage)
    whole = decode(model, prompt, plan, BOTH)
    again = Recorder(model, given=4 * model.grid.stride)
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

"""The cache over scales: eviction is masking, it holds what was chosen, and takes the memory that was planned."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from torch import Tensor

from linear_core.cache import stage_cache
from linear_core.cache.view import View
from linear_core.errors import UserError
from linear_core.loop import scales
from linear_core.loop.scales import forced_scales, generate_scales, scale_cache, scale_policy
from linear_core.plan import ACROSS_LAYERS, UNEVEN, WHOLE, CachePlan, SamplePlan
from linear_core.policies import POLICIES, SCALE_POLICIES
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from tests.tiny import CODES, var

SIDES = (1, 2, 3, 4, 4, 5)  # 71 tokens, 46 of them ever held
SHARE = 0.36  # 17 of them: overflows at the fourth scale and the fifth
ON_SCALES = [name for name, policy in (POLICIES | SCALE_POLICIES).items() if not policy.lines]
EVICTING = [name for name in ON_SCALES if name != "full"]
SAMPLE = SamplePlan(seed=3, guidance=2.0)


@cache
def model(dtype: torch.dtype = torch.float32):
    return var(*SIDES, dtype=dtype)


def draw(plan: CachePlan, sample: SamplePlan = SAMPLE, labels: tuple[int, ...] = (1, 3), dtype=torch.float32, **more):
    return list(generate_scales(*model(dtype), class_prompt(list(labels)), plan, sample, **more))


@contextmanager
def chosen() -> Iterator[tuple[dict[int, tuple[Tensor, Tensor]], dict[int, Tensor]]]:
    """Write down what decides: by scale the scores and the index of all slots, and what each head is to keep."""
    scores: dict[int, tuple[Tensor, Tensor]] = {}
    keeps: dict[int, Tensor] = {}
    original = scales.choose

    def choose(given: Tensor, view: View, count: int, keep: Tensor | None = None, **more) -> Tensor:
        told = given.float().clone(), view.index.clone()
        before = scores.get(view.row)
        assert view.layer == (0 if before is None else len(before[0])), "one choice a scale, layer by layer"
        scores[view.row] = told if before is None else tuple(map(stacked, zip(before, told, strict=True)))
        if keep is not None:
            keeps[view.row] = torch.cat([*([keeps[view.row]] if view.row in keeps else []), keep])
        return original(given, view, count, keep=keep, **more)

    def stacked(layers: tuple[Tensor, Tensor]) -> Tensor:
        """Layers may have room for unequal numbers: empty slots behind."""
        slots = max(x.shape[-1] for x in layers)
        return torch.cat([torch.nn.functional.pad(x, (0, slots - x.shape[-1]), value=-1) for x in layers])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scales, "choose", choose)
        yield scores, keeps


class Run:
    """One forced run in float64: logits, and what each layer, row and head held after each scale."""

    def __init__(self, plan: CachePlan):
        self.decoder, self.quantizer = model(torch.float64)
        self.pyramid, self.plan = self.decoder.pyramid, plan
        self.prompt = class_prompt([1, 3, 5])
        self.tokens = torch.randint(CODES, (3, self.pyramid.tokens), generator=torch.Generator().manual_seed(5))
        self.held: list[Tensor] = []  # by scale, bool B L H N

        def observe(stage: int, cache: stage_cache.StageCache) -> None:
            self.held.append(torch.stack([cache.held_by_head(row) for row in range(3)]))
            self.peak = cache.peak

        with chosen() as (self.scores, self.keep):
            self.logits = list(forced_scales(self.decoder, self.quantizer, self.prompt, self.tokens, plan, observe))


@cache
def run(name: str, release: str, share: float = SHARE) -> Run:
    return Run(CachePlan(name, share=share, release=release))


@pytest.mark.parametrize("name", ON_SCALES)
def test_eviction_is_masking(name: str) -> None:
    """Each logit equals that of one uncached pass in which a scale sees itself and what was held before it."""
    found = run(name, "strict")
    pyramid, count = found.pyramid, found.pyramid.tokens
    layers, heads = found.held[0].shape[1:3]
    visible = torch.zeros(layers, 3, heads, count, count, dtype=torch.bool)
    canvas, below = found.quantizer.empty(3, pyramid), []
    for stage in range(pyramid.stages):
        own = slice(pyramid.index(stage), pyramid.index(stage + 1))
        if stage:
            visible[..., own, :] = found.held[stage - 1].transpose(0, 1)[..., None, :]
            below.append(found.quantizer.shrink(pyramid, stage, canvas))
        visible[..., own, own] = True
        drawn = found.tokens[:, own].unflatten(1, pyramid.sides[stage])
        canvas = found.quantizer.add(pyramid, stage, drawn, canvas)
    expected = found.decoder(found.prompt, below, visible)
    torch.testing.assert_close(torch.cat(found.logits, 1), expected, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("release", ["strict", "fold"])
@pytest.mark.parametrize("name", ON_SCALES)
def test_the_cache_holds_what_was_chosen(name: str, release: str) -> None:
    """Sets alone predict it: victims of least score leave, the oldest first among equals, and the first scales stay."""
    found = run(name, release)
    pyramid, plan = found.pyramid, found.plan
    # 4 anchors lie in the first two scales; where folding loses nothing, the first alone stays: it lies within them.
    keeps, protected = plan.keeps(pyramid), 5 if release == "strict" else 1
    layers, heads = found.held[0].shape[1:3]
    overflows = [n for n in range(pyramid.stages - 1) if pyramid.index(n + 1) > keeps]
    assert list(found.scores) == overflows, "a policy is asked where a scale does not fit, and not after the last"
    for layer in range(layers):
        for row in range(3):
            for head in range(heads):
                held: set[int] = set()
                for stage in range(pyramid.stages):
                    if stage + 1 < pyramid.stages:
                        held = held | set(range(pyramid.index(stage), pyramid.index(stage + 1)))
                    if stage in found.scores:
                        scores, index = (x[layer, row, head].tolist() for x in found.scores[stage])
                        score = {i: s for i, s in zip(index, scores, strict=True) if i >= 0}
                        assert set(score) == held, "the policy is shown what is held"
                        keep = keeps if stage not in found.keep else int(found.keep[stage][layer, row, head])
                        free = sorted((i for i in held if i >= protected), key=lambda i: (score[i], i))
                        held = held - set(free[: max(len(held) - keep, 0)])
                    assert set(found.held[stage][row, layer, head].nonzero()[:, 0].tolist()) == held


def test_heads_and_layers_differ() -> None:
    """The two tests above compare something: what is held depends on head, layer and row, and budgets are uneven."""
    held = run("line", "strict").held[-1].flatten(0, 2)
    assert len(held.unique(dim=0)) > len(held) / 2
    for name in UNEVEN & set(EVICTING):
        counts = run(name, "strict").held[-1].sum(-1)
        assert counts.unique().numel() > 1, name
        among = (1, 2) if name in ACROSS_LAYERS else (2,)
        mean, budget = counts.double().mean(among), CachePlan(name, share=SHARE).keeps(model()[0].pyramid)
        assert (mean <= budget).all() and (name in WHOLE or (mean == budget).all()), name


@pytest.mark.parametrize("storage", ["full", "int8", "int4"])
@pytest.mark.parametrize("name", ["full", "fold", "adakv", "hack"])  # even, uneven within and across layers
def test_memory_is_as_planned(
    name: str, storage: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All living keys and values, whoever holds them, at every attention: never more than planned, and that much."""
    decoder, quantizer = model()
    plan, rows = CachePlan(name, share=SHARE, storage=storage), 4
    planned = decoder.cache_shape().scales_bytes(decoder.pyramid, plan, rows)
    most, size = 0, decoder.config.head_dim
    kinds = {(torch.float32, size), (torch.int8, size), (torch.uint8, decoder.cache_shape().slot_bytes("int4", 0))}
    # What other tests left, such as RoPE tables; packed matrices have no storage to ask for.
    before = [x for x in gc.get_objects() if type(x) is Tensor and x.layout == torch.strided]
    theirs = {x.untyped_storage().data_ptr() for x in before}
    request.addfinalizer(gc.unfreeze)
    gc.freeze()  # what there is already is left out below, which takes a tenth of the time
    policy = scale_policy(plan, decoder.pyramid)
    found = scale_cache(decoder, rows, plan, policy)
    attention = torch.nn.functional.scaled_dot_product_attention

    def watch(q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        nonlocal most
        own = theirs | {x.untyped_storage().data_ptr() for x in (q, *passed)}
        living = {}
        for x in gc.get_objects():
            if type(x) is Tensor and x.ndim >= 3 and x.untyped_storage().nbytes() > 512:
                kind, held = x.untyped_storage().data_ptr(), (x.dtype, x.shape[-1])
                if kind not in own and held in kinds:
                    living[kind] = x.untyped_storage().nbytes()
        scales = sum(layer.scale.nbytes for layer in found.layers if layer.scale is not None)
        most = max(most, sum(living.values()) + scales)
        return attention(q, k, v, **more)

    passed: list[Tensor] = []
    original = found.attend

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, **more) -> Tensor:
        passed[:] = [q, k, v]
        return original(layer, q, k, v, **more)

    monkeypatch.setattr(stage_cache.F, "scaled_dot_product_attention", watch)
    monkeypatch.setattr(found, "attend", attend)
    tokens = torch.randint(CODES, (2, decoder.pyramid.tokens))
    state, canvas = decoder.begin(decoder.with_unconditional(class_prompt([1, 3]))), quantizer.empty(2, decoder.pyramid)
    with torch.inference_mode():
        for stage in range(decoder.pyramid.stages):
            found.begin(stage)
            below = quantizer.shrink(decoder.pyramid, stage, canvas) if stage else None
            decoder.stage(stage, below, state, found)
            own = slice(decoder.pyramid.index(stage), decoder.pyramid.index(stage + 1))
            drawn = tokens[:, own].unflatten(1, decoder.pyramid.sides[stage])
            canvas = quantizer.add(decoder.pyramid, stage, drawn, canvas)
    if name in ACROSS_LAYERS:
        assert found.peak <= planned
    else:
        assert most == found.peak == planned


def test_a_scale_has_no_order() -> None:
    """Every query of a scale sees all of it, and all its tokens are equally old."""
    pyramid, source = Pyramid.square(1, 2), torch.Generator().manual_seed(0)
    keys, values, queries = (torch.randn(1, 1, 1, n, 8, generator=source) for n in (5, 5, 4))
    index, mass = torch.arange(5, dtype=torch.int32).view(1, 1, 1, 5), torch.rand(1, 1, 1, 5, generator=source)
    view = View(keys, values, torch.zeros(1, 1, 1, 5), index, queries, mass, pyramid, 1, keeps=3)
    attention = (queries @ keys.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(POLICIES["line"].score(view), attention.mean(-2))
    torch.testing.assert_close(POLICIES["h2o"].score(view), mass / torch.tensor([5.0, 4, 4, 4, 4]))


@pytest.mark.parametrize("release", ["strict", "fold"])
@pytest.mark.parametrize("name", ON_SCALES)
def test_a_batch_equals_its_images(name: str, release: str) -> None:
    """Image i of a batch is the single image of seed + i, guidance and its end included."""
    plan = CachePlan(name, share=SHARE, release=release)
    sample = SamplePlan(seed=3, guidance=2.0, guidance_interval=15)  # ends before the last two scales
    batch = draw(plan, sample, dtype=torch.float64)[-1]
    for i, label in enumerate((1, 3)):
        one = SamplePlan(seed=3 + i, guidance=2.0, guidance_interval=15)
        alone = draw(plan, one, (label,), dtype=torch.float64)[-1]
        torch.testing.assert_close(batch.canvas[i : i + 1], alone.canvas, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("release", ["strict", "fold"])
@pytest.mark.parametrize("name", EVICTING)
def test_a_budget_that_never_overflows_draws_the_full_picture(name: str, release: str) -> None:
    """To the bit, and so do all scales up to the first overflow of a smaller one."""
    full = draw(CachePlan("full"))
    whole = draw(CachePlan(name, share=1.0, release=release))
    few = draw(CachePlan(name, share=SHARE, release=release))
    assert torch.equal(whole[-1].canvas, full[-1].canvas)
    assert all(torch.equal(a.canvas, b.canvas) for a, b in zip(full[:4], few[:4], strict=True))


@pytest.mark.parametrize("plan", [CachePlan("fold", share=SHARE), CachePlan("headkv", share=SHARE, storage="int8")])
def test_given_scales_are_as_if_drawn(plan: CachePlan) -> None:
    """Drawn again from any scale on with the same seed, it is the same picture; with another, only the rest differs."""
    drawn = draw(plan)
    tokens = torch.cat([stage.tokens for stage in drawn], 1)
    for stages in range(1, 5):
        given = tokens[:, : sum(side * side for side in SIDES[:stages])]
        again = draw(plan, given=given)
        assert [stage.replayed for stage in again] == [n < stages for n in range(len(SIDES))]
        assert torch.equal(again[-1].canvas, drawn[-1].canvas)
    other = draw(plan, SamplePlan(seed=99, guidance=2.0), given=tokens[:, :5])
    assert torch.equal(other[1].canvas, drawn[1].canvas) and not torch.equal(other[-1].tokens, drawn[-1].tokens)


def test_int8_is_near_the_full_cache() -> None:
    """Logits of the last scale move by a little, not by nothing."""
    decoder, quantizer = model()
    tokens = torch.randint(CODES, (2, decoder.pyramid.tokens), generator=torch.Generator().manual_seed(1))
    logits = [
        list(forced_scales(decoder, quantizer, class_prompt([1, 3]), tokens, CachePlan("full", storage=storage)))[-1]
        for storage in ("full", "int8")
    ]
    difference = float((logits[0] - logits[1]).abs().max() / logits[0].abs().max())
    assert 0 < difference < 0.02


@pytest.mark.parametrize("name", ["fold", "adakv", "hack"])
def test_folding_tells_how_many_tokens_stand_behind_a_slot(name: str) -> None:
    """All tokens of the scales are somewhere: counts add up to what a full cache holds."""
    last = draw(CachePlan(name, share=SHARE, release="fold"))[-1]
    assert last.stands is not None and last.share.shape == last.stands.shape == (2, 71)
    assert float((last.share * last.stands).sum(1).mean()) == pytest.approx(46)
    assert not last.share[:, 46:].any(), "the last scale is never held"
    assert draw(CachePlan("line", share=SHARE, release="strict"))[-1].stands is None


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (CachePlan("snapkv", share=SHARE), "last queries of a line"),
        (CachePlan("streaming", share=SHARE), "equally new"),
        (CachePlan("line", share=SHARE, release="lazy"), "choose strict or fold"),
        (CachePlan("line", share=0.06), "the first scales hold 5, which are never evicted; choose 0.1 or more"),
    ],
)
def test_what_does_not_suit_scales(plan: CachePlan, words: str) -> None:
    with pytest.raises(UserError, match=words):
        next(generate_scales(*model(), class_prompt([1]), plan, SAMPLE))


def test_lines_of_a_preset_are_a_share() -> None:
    """Presets state lines; a pyramid takes them as of 24, and says the same in shares."""
    pyramid = Pyramid.square(1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    assert pyramid.kept == 424
    assert CachePlan("fold", budget=4, recent=0).keeps(pyramid) == CachePlan("fold", share=1 / 6).keeps(pyramid) == 71
    assert CachePlan("full").keeps(pyramid) == 424
    assert [CachePlan(share=1 / 6, anchors=n).protected(pyramid) for n in (0, 1, 4, 5, 6)] == [0, 1, 5, 5, 14]
    assert [CachePlan("fold", anchors=n).protected(pyramid) for n in (0, 1, 4, 5, 6)] == [0, 1, 1, 5, 5]

"""Methods for models that draw in scales: profiles and who reads them, pruned tokens, two models for one picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.view import View
from linear_core.errors import UserError
from linear_core.loop import scales
from linear_core.loop.calibrate import Watch, calibrate
from linear_core.loop.pruning import Pruning
from linear_core.loop.scales import force, forced_scales, generate_scales, scale_cache, surveys, with_drafter
from linear_core.plan import CachePlan, PrunePlan, SamplePlan
from linear_core.policies import get_policy
from linear_core.policies.scalekv import observers
from linear_core.profile import Profile, profile_path, read_profile
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from tests.tiny import CODES, caption_prompt, infinity, var

SIDES = (1, 2, 3, 4, 5)  # 55 tokens, 30 of them ever held
SAMPLE = SamplePlan(seed=3, guidance=2.0)
PYRAMID = Pyramid.square(*SIDES)
FULL = CachePlan("full")


@pytest.fixture(scope="module")
def model():
    return var(*SIDES, dtype=torch.float64)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(CODES, (2, PYRAMID.tokens), generator=torch.Generator().manual_seed(5))


def draw(model, plan=FULL, sample=SAMPLE, **more):
    return list(generate_scales(*model, class_prompt([1, 3]), plan, sample, **more))


def forced(model, tokens: Tensor, plan: CachePlan) -> tuple[list[Tensor], Tensor]:
    """Logits, and what each row, layer and head holds before the last scale."""
    held = []

    def observe(stage, cache) -> None:
        held[:] = [torch.stack([cache.held_by_head(row) for row in range(2)])]

    return list(forced_scales(*model, class_prompt([1, 3]), tokens, plan, observe)), held[0]


def profile(layers: int = 2, heads: int = 3, seed: int = 0) -> Profile:
    source = torch.Generator().manual_seed(seed)
    mass = torch.rand(layers, heads, len(SIDES), len(SIDES), generator=source).tril()
    mass = mass / mass.sum(-1, keepdim=True)
    variance, similarity = (torch.rand(layers, n, generator=source) for n in (heads, len(SIDES)))
    return Profile("little", 3, PYRAMID.text, mass, variance, similarity)


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [CachePlan("random", share=0.5, release="fold"), CachePlan("adakv", share=0.5, release="fold")]
)
def test_a_layer_in_parts_is_the_layer(model, tokens, plan: CachePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and heads that are scored and folded a few at a time hold what they hold together."""
    whole, held = forced(model, tokens, plan)
    shown = []
    original = View.parts

    def parts(view: View, pairs: int):
        found = list(original(view, pairs))
        shown.append(len(found))
        return iter(found)

    monkeypatch.setattr(View, "parts", parts)
    for pairs in (1, 2 * 31**2):
        monkeypatch.setattr(scales, "fold_pairs", lambda device, pairs=pairs: pairs)
        again, also = forced(model, tokens, plan)
        assert torch.equal(held, also)
        torch.testing.assert_close(torch.cat(again, 1), torch.cat(whole, 1), atol=1e-11, rtol=1e-11)
    assert max(shown) == 6, "two rows of three heads, one at a time"


# -- profiles ----------------------------------------------------------------------------------------------------------


def test_a_profile_is_what_attention_says(model, tokens) -> None:
    """Every figure from one uncached pass over all scales, with the scores of all queries."""
    decoder, quantizer = model
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    attend = F.scaled_dot_product_attention

    def keep(q, k, v, **more):
        seen.append((q, k, v))
        return attend(q, k, v, **more)

    prompt, own = class_prompt([1]), tokens[:1]
    maps = [
        part.unflatten(1, side) for part, side in zip(own.split([s * s for s in SIDES], 1), PYRAMID.sides, strict=True)
    ]
    below = [quantizer.shrink(PYRAMID, n, quantizer.canvas(PYRAMID, maps[:n])) for n in range(1, len(SIDES))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("linear_core.models.var.F.scaled_dot_product_attention", keep)
        decoder(prompt, below)
    watch = Watch(2, 3, PYRAMID)
    list(force(decoder, quantizer, prompt, own, watch))
    scale = torch.cat([torch.full((s * s,), n) for n, s in enumerate(SIDES)])
    for layer, (q, k, v) in enumerate(seen):
        scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(scale[:, None] < scale, float("-inf"))
        attention = scores.softmax(-1)[0]
        spread = torch.zeros(3)
        for n in range(len(SIDES)):
            rows = attention[:, scale == n]
            spread = spread + rows.var(1, correction=0).sum(-1) / (len(SIDES) - 1)
            for earlier in range(len(SIDES)):
                expected = rows[..., scale == earlier].sum(-1).mean(-1)
                torch.testing.assert_close(watch.mass[layer, :, n, earlier], expected)
        torch.testing.assert_close(watch.variance[layer], spread.double())
        values = v[0].transpose(1, 2).flatten(0, 1)  # heads and numbers, tokens
        small = values[:, scale == 3].view(1, -1, 4, 4)
        alike = F.cosine_similarity(F.adaptive_avg_pool2d(small, 3).flatten(2), values[None, :, scale == 2], dim=1)
        torch.testing.assert_close(watch.similarity[layer, 3], alike.mean())


def test_calibration_is_kept_and_read(model, tmp_path: Path) -> None:
    """What is written is what was measured, to four digits; pictures count alike."""
    decoder, quantizer = model
    done: list[int] = []
    both = calibrate(decoder, quantizer, class_prompt([1, 2]), SAMPLE, name="little", told=done.append)
    first, second = (
        calibrate(decoder, quantizer, class_prompt([n]), replace(SAMPLE, seed=seed)) for n, seed in ((1, 3), (2, 4))
    )
    torch.testing.assert_close(both.mass, (first.mass + second.mass) / 2)
    assert done == [1, 2] and both.samples == 2
    path = profile_path(tmp_path / "little.safetensors")
    both.write(path)
    assert path.name == "little.profile.json"
    again = read_profile(path)
    assert (again.model, again.samples, again.sides) == ("little", 2, "1 2 3 4 5")
    for name in ("mass", "variance", "similarity"):
        torch.testing.assert_close(getattr(again, name), getattr(both, name), atol=0, rtol=1e-4)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"format": 2}', '{"format": 1, "mass": [1], "variance": [[1]], "similarity": [[1]]}',
     '{"format": 1, "mass": [[[[NaN]]]], "variance": [[1]], "similarity": [[1]]}',
     '{"format": 1, "mass": [[[["x"]]]], "variance": [[1]], "similarity": [[1]]}', "[" * 9000],
    ids=range(8),
)  # fmt: skip
def test_a_file_that_is_no_profile(text: str, tmp_path: Path) -> None:
    path = tmp_path / "little.profile.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"little.profile.json: is not a profile of a model's heads"):
        read_profile(path)


def test_a_profile_of_another_model_is_refused(model) -> None:
    decoder, quantizer = model
    plan = CachePlan("heatkv", share=0.5)
    for wrong, words in ((profile(3), "3 layers of 3 heads, but little has 2 of 3"), (profile(2, 4), "4 heads")):
        patched = with_profile(decoder, wrong)
        with pytest.raises(UserError, match=words):
            next(generate_scales(patched, quantizer, class_prompt([1]), plan, SAMPLE, name="little"))
    small = replace(profile(), mass=profile().mass[..., :3, :3])
    with pytest.raises(UserError, match="pictures of 3 scales, but this one has 5"):
        next(generate_scales(with_profile(decoder, small), quantizer, class_prompt([1]), plan, SAMPLE))


def with_profile(decoder, known: Profile | None):
    import copy

    other = copy.copy(decoder)
    other.profile = known
    return other


def test_who_surveys_says_so(model) -> None:
    decoder, _ = model
    assert "policy hack judges the model's heads by the first scales" in surveys(CachePlan("hack"), decoder)
    assert surveys(CachePlan("hack"), with_profile(decoder, profile())) == ""
    assert surveys(CachePlan("adakv"), decoder) == "", "it reads no profile"


def test_heatkv_takes_whole_scales_from_whole_heads(model, tokens) -> None:
    """By hand: for each scale the heads with least S-CAS lose it, as many as bring all heads within the budget."""
    decoder, quantizer = model
    known, plan = profile(), CachePlan("heatkv", share=0.5)
    _, held = forced((with_profile(decoder, known), quantizer), tokens, plan)
    keeps, protected, stages = 15, 5, len(SIDES)
    assert plan.keeps(PYRAMID) == keeps
    lost = -(-6 * (30 - keeps) // (30 - protected))
    assert lost == 4
    kept = 0
    for scale in range(stages - 1):
        cas = {
            (layer, head): sum(float(known.mass[layer, head, later, scale]) for later in range(scale + 1, stages))
            for layer in range(2) for head in range(3)
        }  # fmt: skip
        losers = sorted(cas, key=cas.__getitem__)[:lost] if PYRAMID.index(scale) >= protected else []
        own = slice(PYRAMID.index(scale), PYRAMID.index(scale + 1))
        for layer, head in cas:
            assert bool(held[:, layer, head, own].all()) == ((layer, head) not in losers)
            assert bool(held[:, layer, head, own].any()) == ((layer, head) not in losers)
        kept += (6 - len(losers)) * PYRAMID.size(scale)
    assert int(held[0].sum()) == kept <= 6 * keeps


def test_scalekv_drafters_keep_what_was_drawn(model, tokens) -> None:
    """The layer that looks back most holds all that the budget allows, the other a third of the mean."""
    decoder, quantizer = model
    known = profile()
    _, held = forced((with_profile(decoder, known), quantizer), tokens, CachePlan("scalekv", share=0.5))
    back = [float(known.mass[layer].tril(-1).sum(-1)[:, 1:].mean()) for layer in range(2)]
    drafter = back.index(max(back))
    counts = held.sum(-1)
    assert (counts[:, drafter] == 25).all() and (counts[:, 1 - drafter] == 5).all(), "2 x 15 = 25 + 5"


def test_scalekv_observes_from_the_centres_of_a_division() -> None:
    """Of 8 x 8: rows and columns 0, 2, 4, 6 of each pair; tokens there are kept, and score by products."""
    pyramid, source = Pyramid.square(1, 8, 9), torch.Generator().manual_seed(1)
    keys, queries = torch.randn(1, 1, 1, 65, 4, generator=source), torch.randn(1, 1, 1, 64, 4, generator=source)
    index = torch.arange(65, dtype=torch.int32).view(1, 1, 1, 65)
    view = View(keys, keys, torch.zeros(1, 1, 1, 65), index, queries, None, pyramid, 1, keeps=20)
    places = [8 * row + col for row in (0, 2, 4, 6) for col in (0, 2, 4, 6)]
    chosen, tokens = observers(view)
    assert chosen.tolist() == places and tokens.tolist() == [1 + place for place in places]
    scores = get_policy("scalekv").score(view)[0, 0, 0]
    products = (queries[0, 0, 0, places].sum(0) @ keys[0, 0, 0].T).tolist()
    for token in range(65):
        if token - 1 not in places:
            assert float(scores[token]) == pytest.approx(max(products[max(token - 2, 0) : token + 3]), abs=1e-5)
    best = scores.argsort(descending=True)[:16]
    assert sorted(best.tolist()) == [1 + place for place in places]


def test_amskv_keeps_the_nearest_scales_and_layers_that_change(model, tokens) -> None:
    decoder, quantizer = model
    known = replace(profile(), similarity=torch.tensor([[0.0, 0.9, 0.9, 0.9, 0.9], [0.0, 0.7, 0.7, 0.7, 0.7]]))
    _, held = forced((with_profile(decoder, known), quantizer), tokens, CachePlan("amskv", share=0.7))
    counts = held.sum(-1)
    assert (counts[:, 0] == 12).all() and (counts[:, 1] == 30).all(), "0.1 to 0.3, and a head has 30 at the most"
    assert held[:, 0, :, :5].all() and held[:, 0, :, 14:30].sum(-1).eq(7).all(), "the rest is of the newest scale"


def test_hack_keeps_the_newest_scale_in_structural_heads(model, tokens) -> None:
    """The half of the heads with most variance keeps five times as much, from the newest scale on."""
    decoder, quantizer = model
    known = replace(profile(), variance=torch.tensor([[0.1, 0.9, 0.2], [0.8, 0.3, 0.7]]))
    _, held = forced((with_profile(decoder, known), quantizer), tokens, CachePlan("hack", share=0.5))
    structural = torch.tensor([[False, True, False], [True, False, True]])
    counts = held.sum(-1)
    assert (counts[:, structural] == 25).all() and (counts[:, ~structural] == 5).all()
    assert held[:, structural][..., 14:30].all(), "all of the scale drawn last"


# -- fewer tokens, fewer scales --------------------------------------------------------------------------------------


def test_pruned_tokens_come_from_the_scale_before() -> None:
    """By hand, token by token: those nearest to the mean get what the map of the last whole scale says there."""
    source, pyramid = torch.Generator().manual_seed(0), Pyramid.square(1, 2, 4)
    pruning = Pruning(PrunePlan((0.4,)), pyramid, 3)
    small, large = torch.randn(2, 4, 6, generator=source), torch.randn(2, 16, 6, generator=source)
    pruning.begin(1)
    before = pruning(0, "attention", small, lambda x, places: x * 2)
    assert torch.equal(before, small * 2)
    pruning.begin(2)
    asked = []

    def compute(x: Tensor, places: Tensor) -> Tensor:
        asked.append((x, places))
        return x * 3

    found = pruning(0, "attention", large, compute)
    for row in range(2):
        distance = [float((token - large[row].mean(0)).square().sum()) for token in large[row]]
        kept = sorted(sorted(range(16), key=lambda n: -distance[n])[:10])
        assert asked[0][1][row].tolist() == kept and torch.equal(asked[0][0][row], large[row, kept])
        for token in range(16):
            near = 2 * (token // 4 // 2) + token % 4 // 2
            assert torch.equal(found[row, token], 3 * large[row, token] if token in kept else before[row, near])


@pytest.mark.parametrize("kind", ["var", "infinity"])
def test_pruning_a_model(kind: str) -> None:
    """Leaving out nothing changes nothing; leaving out some caches the others alone, whatever the budget."""
    if kind == "var":
        pair, prompt = var(*SIDES, dtype=torch.float64), class_prompt([1, 3])
    else:
        pair = infinity((1, 1), (2, 3), (3, 4), (4, 5), (5, 6), dtype=torch.float64)
        prompt = caption_prompt([3, 5], dtype=torch.float64)
    pyramid = pair[0].pyramid
    check_pruned_logits(*pair, prompt)

    def run(plan: CachePlan, **more) -> list:
        return list(generate_scales(*pair, prompt, plan, SAMPLE, **more))

    full, none = run(CachePlan("full")), run(CachePlan("full"), prune=PrunePlan((0.0, 0.0)))
    torch.testing.assert_close(none[-1].canvas, full[-1].canvas, atol=1e-9, rtol=1e-9)
    some = run(CachePlan("full"), prune=PrunePlan((0.5, 0.5), first=1))
    assert all(torch.equal(a.canvas, b.canvas) for a, b in zip(some[:3], full[:3], strict=True))
    size, own = pyramid.size(3), slice(pyramid.index(3), pyramid.index(4))
    held = some[-1].by_head[..., own].sum(-1)
    assert (held[0] == size).all() and (held[1] == size - size // 2).all(), "in the second layer only"
    for name in ("fold", "adakv"):
        few = run(CachePlan(name, share=0.4), prune=PrunePlan((0.5, 0.5)))
        assert few[-1].held <= CachePlan(name, share=0.4).keeps(pyramid) and few[-1].canvas.isfinite().all()


def check_pruned_logits(decoder, quantizer, prompt) -> None:
    """Pruned in the last layer of the last scale alone: tokens that all of its sub-blocks computed have the logits of
    one uncached pass in which that layer sees only what its attention computed."""
    pyramid, places = decoder.pyramid, {}

    class Spy(Pruning):
        def __call__(self, layer, part, x, compute):
            def noted(x: Tensor, at: Tensor | None) -> Tensor:
                places[part] = at
                return compute(x, at)

            return super().__call__(layer, part, x, noted)

    prune = Spy(PrunePlan((0.5,), first=1), pyramid, pyramid.stages)
    cache = scale_cache(decoder, 2, FULL, get_policy("full"))
    state, canvas, below = decoder.begin(prompt), quantizer.empty(2, pyramid), []
    for stage in range(pyramid.stages):
        cache.begin(stage)
        prune.begin(stage)
        below += [quantizer.shrink(pyramid, stage, canvas)] if stage else []
        logits = decoder.stage(stage, below[-1] if stage else None, state, cache, prune)
        drawn = torch.randint(4, (2, *pyramid.sides[stage]), generator=torch.Generator().manual_seed(stage))
        canvas = quantizer.add(pyramid, stage, drawn, canvas)
    scale = torch.cat([torch.full((pyramid.size(n),), n) for n in range(pyramid.stages)])
    visible = (scale[:, None] >= scale).expand(2, 2, 3, -1, -1).clone()
    last, size = pyramid.index(pyramid.stages - 1), pyramid.size(-1)
    computed = {part: torch.zeros(2, size, dtype=torch.bool).scatter(1, at, True) for part, at in places.items()}
    visible[1, :, :, last:, last:] = computed["attention"][:, None, None]
    expected = decoder(prompt, below, visible)[:, last:]
    by_all = torch.stack(list(computed.values())).all(0)
    assert 0 < by_all.sum() < by_all.numel()
    torch.testing.assert_close(logits[by_all], expected[by_all], atol=1e-9, rtol=1e-9)
    assert not torch.isclose(logits[~by_all], expected[~by_all]).all()


def test_bad_pruning(model) -> None:
    for plan, words in (((1.0,), "less than 1"), ((), "less than 1"), ((0.5, 0, 3, 2), "3 to 2 are no layers")):
        with pytest.raises(UserError, match=words):
            PrunePlan(plan[:1], *plan[2:])
    with pytest.raises(UserError, match="5 of 5 scales leave no scale"):
        draw(model, prune=PrunePlan((0.5,) * 5))
    with pytest.raises(UserError, match="layers are 0 to 1"):
        draw(model, prune=PrunePlan((0.5,), last=2))


def test_the_last_scale_drawn_is_not_stored(model) -> None:
    """Stopped early, nothing reads it either: less working memory, as planned."""
    few = draw(model, stop_after=4)
    assert few[-1].held == few[-2].held == 14
    shape, plan = model[0].cache_shape(), CachePlan("full")
    assert few[-1].cache_bytes == shape.scales_bytes(PYRAMID, plan, 4, 4) < shape.scales_bytes(PYRAMID, plan, 4)


# -- two models --------------------------------------------------------------------------------------------------------


def test_a_drafter_and_a_refiner(model) -> None:
    """The first scales are the drafter's alone, the rest are the refiner's over them, and one model twice is itself."""
    refiner, quantizer = model
    drafter = var(*SIDES, layers=3, seed=7, dtype=torch.float64)[0]
    plan = CachePlan("fold", share=0.5)
    for scale in (1, 3, 4):
        paired = draw((with_drafter(refiner, drafter, scale), quantizer), plan)
        first = draw((drafter, quantizer), plan, stop_after=scale)
        given = torch.cat([stage.tokens for stage in first], 1)
        rest = draw(model, plan, given=given)
        assert [stage.stage for stage in paired] == list(range(5)) and not any(stage.replayed for stage in paired)
        for mine, theirs in zip(paired, [*first, *rest[scale:]], strict=True):
            assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.share, theirs.share)
        assert torch.equal(paired[-1].canvas, rest[-1].canvas)
        assert {stage.by_head.shape for stage in paired} == {(2, 3, 55)}
    twice = draw((with_drafter(refiner, refiner, 3), quantizer), plan)
    assert torch.equal(twice[-1].canvas, draw(model, plan)[-1].canvas)


def test_a_drafter_with_given_scales_and_an_end(model) -> None:
    refiner, quantizer = model
    paired = with_drafter(refiner, var(*SIDES, layers=1, seed=7, dtype=torch.float64)[0], 3), quantizer
    whole = draw(paired)
    tokens = torch.cat([stage.tokens for stage in whole], 1)
    for given in (5, 14, 30):  # by the drafter, up to it, and beyond
        again = draw(paired, given=tokens[:, :given])
        assert torch.equal(again[-1].canvas, whole[-1].canvas) and len(again) == 5
        assert [stage.replayed for stage in again] == [PYRAMID.index(n) < given for n in range(5)]
    for stop in (2, 3, 4):
        assert torch.equal(draw(paired, stop_after=stop)[-1].canvas, whole[stop - 1].canvas)


def test_pairs_that_cannot_be(model) -> None:
    refiner, quantizer = model
    with pytest.raises(UserError, match="draws scales 1 2 3, the model 1 2 3 4 5"):
        with_drafter(refiner, var(1, 2, 3)[0], 2)
    with pytest.raises(UserError, match="5 is out of range; choose 1 to 4"):
        with_drafter(refiner, refiner, 5)
    paired = with_drafter(refiner, refiner, 2)
    with pytest.raises(UserError, match="a mixture of codes is none"):
        draw((paired, quantizer), sample=replace(SAMPLE, smooth=True))

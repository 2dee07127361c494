"""Folding: exact where it can be, counted, and the same as a plain computation of what its words say."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from linear_core.cache.fold import RIDGE, SLACK, fold
from linear_core.cache.line_cache import LineCache
from linear_core.cache.look_ahead import HORIZONS, extreme
from linear_core.cache.view import FLOOR, SCALES_FLOOR, VALUES, View
from linear_core.grid import Grid
from linear_core.models.blocks import rope_2d, rotate_pairs
from linear_core.models.llamagen import ROPE_BASE
from linear_core.plan import CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from tests.tiny import Toy, caption_prompt, decode, llamagen

DOUBLE = torch.float64
COLS, PROMPT, DIM = 4, 2, 6


def make(layers: int = 1, batch: int = 2, heads: int = 3, rows: int = 3, seed: int = 0, empty: int = 0) -> View:
    """Random keys, values, queries and weights; `rows` lines held, slots out of order, `empty` of them with nothing."""
    source = torch.Generator().manual_seed(seed)
    lead, slots = (layers, batch, heads), PROMPT + rows * COLS

    def noise(*shape: int) -> Tensor:
        return torch.randn(*lead, *shape, generator=source, dtype=DOUBLE)

    image = torch.stack([torch.randperm(rows * COLS, generator=source) for _ in range(layers * batch * heads)])
    index = torch.cat([torch.arange(PROMPT).expand(len(image), -1), PROMPT + image], 1).view(*lead, slots).int()
    for number in range(empty):
        index[index == PROMPT + number] = -1
    bias = (noise(slots) * 0.5).masked_fill(index < 0, -math.inf)
    return View(
        noise(slots, DIM), noise(slots, DIM), bias, index, noise(COLS, DIM) * 2, None,
        Grid(9, COLS, prompt=PROMPT), rows - 1, 0,
        lambda queries, lines, columns: queries * (1 - 0.05 * lines + 0.02 * columns),
    )  # fmt: skip


def slots_of(view: View, *tokens: int) -> Tensor:
    """Where each head holds these tokens of the picture: L B H n."""
    return torch.stack([(view.index == PROMPT + t).int().argmax(-1) for t in tokens], -1)


def ones(view: View) -> Tensor:
    return torch.ones_like(view.bias)


def attended(view: View, keys: Tensor, values: Tensor, bias: Tensor, seed: int = 9) -> Tensor:
    """What any queries get out of these slots."""
    source = torch.Generator().manual_seed(seed)
    queries = torch.randn(*keys.shape[:3], 20, DIM, generator=source, dtype=DOUBLE) * 3
    return ((queries @ keys.transpose(-1, -2)) / DIM**0.5 + bias[..., None, :]).softmax(-1) @ values


@dataclass(frozen=True)
class All:
    """A Folded written into the view's slots."""

    keys: Tensor
    values: Tensor
    bias: Tensor
    count: Tensor
    changed: Tensor


def all_slots(view: View, victims: Tensor, count: Tensor) -> All:
    """Fold, and what then lies in every slot."""
    folded = fold(view, victims, count)
    wide = folded.slot[..., None].expand_as(folded.keys)
    changed = torch.zeros_like(view.bias, dtype=torch.bool).scatter_(-1, folded.slot, folded.slot != victims)
    return All(
        view.keys.scatter(3, wide, folded.keys), view.values.scatter(3, wide, folded.values),
        view.bias.scatter(-1, folded.slot, folded.bias), count.scatter(-1, folded.slot, folded.count), changed,
    )  # fmt: skip


def without(bias: Tensor, victims: Tensor) -> Tensor:
    return bias.scatter(-1, victims, -math.inf)


# -- exactness ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 4.0)])
def test_equal_keys_fold_without_loss(weights):
    """Three tokens of one key, values all different: no query can tell, whatever they weighed."""
    view = make()
    first, *others = slots_of(view, 1, 5, 6).split(1, -1)
    keys, bias = view.keys.clone(), view.bias.clone()
    for slot, weight in zip((first, *others), weights, strict=True):
        keys.scatter_(3, slot[..., None].expand(-1, -1, -1, 1, DIM), keys.gather(3, first[..., None].expand(
            -1, -1, -1, 1, DIM)))  # fmt: skip
        bias.scatter_(3, slot, math.log(weight))
    view = replace(view, keys=keys, bias=bias)
    victims = torch.cat(others, -1)
    folded = all_slots(view, victims, ones(view))
    before = attended(view, view.keys, view.values, view.bias)
    after = attended(view, folded.keys, folded.values, without(folded.bias, victims))
    torch.testing.assert_close(after, before)
    dropped = attended(view, view.keys, view.values, without(view.bias, victims))
    assert (dropped - before).abs().max() > 1e-3, "and dropping them would be seen"
    assert torch.equal(folded.count.gather(-1, first), torch.full_like(first, 3).double())


def test_a_picture_of_equal_tokens_is_drawn_as_with_everything_held():
    """Keys that depend on the code alone, three codes: every victim has an equal among what stays, so the whole picture
    is drawn with the logits of the full cache, though most of it is gone."""
    toy = Toy(8, 6, length=3, dtype=DOUBLE)
    toy.by_place.zero_()
    toy.by_token[1:, :, :, 3 : toy.codes] = toy.by_token[1:, :, :, :1]  # keys and values: codes 0, 1, 2 and equals of 0
    prompt, sample = toy.prompt([3, 2]), SamplePlan(seed=2, guidance=2.0)
    few = decode(toy, prompt, CachePlan("fold", 2, 0, 1), sample)
    full = decode(toy, prompt, CachePlan("full"), sample)
    torch.testing.assert_close(torch.stack(few.logits), torch.stack(full.logits))
    assert int((few.index[-1] >= 0).sum(-1).max()) < int((full.index[-1] >= 0).sum(-1).min())
    evicted = decode(toy, prompt, CachePlan("fold", 2, 0, 1, "strict"), sample)
    assert (torch.stack(evicted.logits) - torch.stack(full.logits)).abs().max() > 1e-2


@pytest.mark.parametrize("name", POLICIES)
def test_a_full_budget_folds_nothing(name):
    """With room for every line the cache is the full one, bit for bit."""
    model, sample = llamagen(5, 4), SamplePlan(seed=1, guidance=2.0)
    folding = decode(model, class_prompt([1, 2]), CachePlan(name, 4, 2, 1, "fold"), sample)
    full = decode(model, class_prompt([1, 2]), CachePlan("full"), sample)
    assert torch.equal(torch.stack(folding.logits), torch.stack(full.logits))
    assert torch.equal(folding.cache.keys.data, full.cache.keys.data)
    assert folding.cache.count is None or (folding.cache.count == 1).all()


# -- what is counted ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "full"])
@pytest.mark.parametrize("model", ["class", "text", "toy eol"])
def test_counts_are_the_tokens_seen(name, model):
    """After every token each head's slots stand for all image tokens fed so far, and nothing leaves unaccounted for."""
    if model == "class":
        decoder, prompt = llamagen(7, 5), class_prompt([1, 3])
    elif model == "text":
        decoder, prompt = llamagen(7, 5, text=True), caption_prompt([7, 4])
    else:
        decoder = Toy(7, 5, length=4, eol=True)
        prompt = decoder.prompt([4, 2])
    seen: list[Tensor] = []
    release = LineCache.release

    def count(cache: LineCache, view: View, victims: Tensor) -> None:
        release(cache, view, victims)
        held = cache.index >= 0
        held[..., : cache.shape.prompt] = False
        seen.extend((cache.count * held).sum(-1)[view.layer :][: len(view.index)])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineCache, "release", count)
        decode(decoder, prompt, CachePlan(name, 2, 2, 1, "fold"), SamplePlan(seed=7, guidance=2.5))
    grid, plan = decoder.grid, CachePlan(name, 2, 2, 1, "fold")
    tokens = [row * grid.stride + end for row in range(2, 7) for end in plan.ends(grid, row)][:-1]
    assert len(tokens) == (4 if name != "fold" else 12), "of lines 2 to 5; folded, in parts of 2, 2 and 1"
    assert len(seen) == 2 * len(tokens), "two layers"
    for number, counts in enumerate(seen):
        assert (counts == tokens[number // 2]).all()


def test_the_weight_is_never_far_from_the_count():
    """The forecast may say that a slot is looked at more or less than its tokens; e^SLACK times, and no further."""
    for seed in range(8):
        view = make(seed=seed)
        view = replace(view, bias=torch.zeros_like(view.bias), queries=view.queries * 4)
        folded = all_slots(view, slots_of(view, 0, 1, 2, 3), ones(view))
        off = (folded.bias - folded.count.log())[folded.changed]
        assert off.abs().max() <= SLACK + 1e-9
    assert (off.abs() > SLACK - 1e-9).any() and (off.abs() < SLACK - 0.1).any(), "some are held back, not all"


def test_attention_foreseen_is_kept():
    """Where the weight is not held back, a slot will draw what its tokens would have drawn together."""
    view = make(seed=3)
    victims = slots_of(view, 0, 1, 2, 3)
    folded = all_slots(view, victims, ones(view))
    inside = folded.changed & ((folded.bias - folded.count.log()).abs() < SLACK - 1e-6)
    assert inside.sum() > 5
    look = view.look_ahead()
    keys = folded.keys
    draws = (
        (keys @ look.queries.transpose(-1, -2) + folded.bias[..., None] - look.logsumexp[..., None, :]).exp().mean(-1)
    )
    gained = draws - look.mass
    lost = look.mass.gather(-1, victims).sum(-1)
    whole = (inside == folded.changed).all(-1)  # heads whose every merge is inside
    assert whole.any()
    torch.testing.assert_close((gained * folded.changed).sum(-1)[whole], lost[whole])


# -- by a plain computation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("empty", "coming"), [(0, 0), (2, 0), (0, 3)], ids=["full", "empty slots", "in parts"])
@pytest.mark.parametrize("seed", range(4))
def test_fold_is_what_its_words_say(seed, empty, coming):
    """One head at a time, one number at a time, in plain Python."""
    view = replace(make(seed=seed, empty=empty), coming=coming)
    victims = slots_of(view, 0, 1, 4, 7) if not empty else torch.cat(
        [(view.index < 0).int().argmax(-1, keepdim=True), slots_of(view, 4, 7)], -1)  # fmt: skip
    count = 1 + torch.rand(view.bias.shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).round()
    folded = all_slots(view, victims, count)
    for row in range(2):
        for head in range(3):
            at = (0, row, head)
            keys, values, bias, index, ns = (
                t[at].tolist() for t in (view.keys, view.values, view.bias, view.index, count)
            )
            slots = range(len(index))
            first, *further = HORIZONS  # the first for all queries, the others in turn
            asked = (view.queries[at] * (1 - 0.05 * first)).tolist()
            for turn, n in enumerate(further):
                asked += (view.queries[at][turn :: len(further)] * (1 - 0.05 * n)).tolist()
            if coming:  # room for less than a line: also from one column to the right and to the left
                for turn, aside in enumerate((1, -1)):
                    asked += (view.queries[at][turn::2] * (1 - 0.05 * first + 0.02 * aside)).tolist()

            def dot(a, b):
                return sum(x * y for x, y in zip(a, b, strict=True)) / DIM**0.5

            totals = [sum(math.exp(dot(q, keys[s]) + bias[s]) for s in slots) for q in asked]

            def drawn(key, weight, asked=asked, totals=totals):
                return sum(math.exp(dot(q, key)) * weight / t for q, t in zip(asked, totals, strict=True)) / len(asked)

            mass = [drawn(keys[s], math.exp(bias[s])) for s in slots]
            image = [s for s in slots if index[s] >= PROMPT]
            spare = FLOOR * sum(mass[s] for s in image) / max(sum(math.exp(bias[s]) for s in image), 1)
            importance = [mass[s] + spare * math.exp(bias[s]) for s in slots]
            spreads = []
            for x in (view.keys[at], view.values[at]):
                middle = sum(m * x[s] for s, m in enumerate(mass)) / sum(mass)
                spreads.append(sum(m * math.dist(x[s], middle) ** 2 for s, m in enumerate(mass)))
            unit = VALUES * spreads[0] / spreads[1] if coming else 0.0
            chosen = victims[at].tolist()
            given: dict[int, list[int]] = {}
            for victim in chosen:
                if index[victim] >= 0:

                    def far(s, v=victim, unit=unit, keys=keys, values=values):
                        return math.dist(keys[s], keys[v]) ** 2 + unit * math.dist(values[s], values[v]) ** 2

                    near = min((s for s in image if s not in chosen), key=far)
                    given.setdefault(near, []).append(victim)
            for s in slots:
                group = [s, *given.get(s, [])]
                total = sum(importance[g] for g in group) or 1.0
                expected_key, expected_value = keys[s], values[s]
                expected_bias = bias[s]
                if len(group) > 1:
                    expected_key = [sum(importance[g] * keys[g][d] for g in group) / total for d in range(DIM)]
                    expected_value = [sum(importance[g] * values[g][d] for g in group) / total for d in range(DIM)]
                    fitting = math.log(sum(mass[g] for g in group) / drawn(expected_key, 1.0))
                    even = math.log(sum(ns[g] for g in group))
                    expected_bias = min(max(fitting, even - SLACK), even + SLACK)
                assert folded.keys[at][s].tolist() == pytest.approx(expected_key)
                assert folded.values[at][s].tolist() == pytest.approx(expected_value)
                assert folded.bias[at][s].item() == pytest.approx(expected_bias)
                assert folded.count[at][s].item() == pytest.approx(sum(ns[g] for g in group))
                assert folded.changed[at][s].item() == (len(group) > 1)


@pytest.mark.parametrize("seed", range(3))
def test_over_scales_a_fold_keeps_what_is_read(seed):
    """Nearest by key and value; and values by the normal equations of ridge regression, one unknown for each slot."""
    source = torch.Generator().manual_seed(seed)
    keys, values, queries = (torch.randn(1, 1, 1, n, DIM, generator=source, dtype=DOUBLE) for n in (14, 14, 9))
    index = torch.randperm(14, generator=source).int().view(1, 1, 1, -1)
    view = View(
        keys, values * 3, torch.zeros(1, 1, 1, 14, dtype=DOUBLE), index, queries, None, Pyramid.square(1, 2, 3, 4), 2,
        rotate=lambda queries, scales, columns: queries, keeps=6,
    )  # fmt: skip
    victims = torch.stack([(index == t).int().argmax(-1) for t in (1, 5, 6, 7, 8, 9, 10, 12)], -1)
    folded = fold(view, victims, ones(view))
    keys, values, chosen = view.keys[0, 0, 0], view.values[0, 0, 0], victims[0, 0, 0].tolist()
    weights = (queries[0, 0, 0] @ keys.T / DIM**0.5).softmax(-1)
    mass = weights.mean(0)
    spreads = [(mass * (x - mass @ x).square().sum(1)).sum() for x in (keys, values)]
    importance = mass + SCALES_FLOOR * mass.mean()
    groups: dict[int, list[int]] = {}
    for victim in chosen:
        far = (keys - keys[victim]).square().sum(1) + (values - values[victim]).square().sum(1) * spreads[0] / spreads[
            1
        ]
        groups.setdefault(min(set(range(14)) - set(chosen), key=far.tolist().__getitem__), []).append(victim)
    order = list(groups)
    members = [[slot, *groups[slot]] for slot in order]
    new_keys, means = (
        torch.stack([importance[m] @ x[m] / importance[m].sum() for m in members]) for x in (keys, values)
    )
    pull = (
        queries[0, 0, 0] @ new_keys.T / DIM**0.5 - (queries[0, 0, 0] @ keys.T / DIM**0.5).logsumexp(1)[:, None]
    ).exp()
    counts = torch.tensor([float(len(m)) for m in members], dtype=DOUBLE)
    fitting = torch.stack([mass[m].sum() for m in members]) / pull.mean(0)
    drawn = pull * fitting.clamp(counts * math.exp(-SLACK), counts * math.exp(SLACK))
    involved = [one for m in members for one in m]
    missing = weights[:, involved] @ values[involved] - drawn @ means
    ridge = RIDGE * drawn.square().sum(1).mean()
    fitted = means + torch.linalg.solve(drawn.T @ drawn + ridge * torch.eye(len(order)), drawn.T @ missing)
    for entry, victim in enumerate(chosen):
        slot = int(folded.slot[0, 0, 0, entry])
        assert victim in groups[slot]
        torch.testing.assert_close(folded.keys[0, 0, 0, entry], new_keys[order.index(slot)])
        torch.testing.assert_close(folded.values[0, 0, 0, entry], fitted[order.index(slot)])
    after = missing - drawn @ (fitted - means)
    assert len(order) > 2 and after.square().sum() < 0.8 * missing.square().sum(), "what is read comes nearer"


def test_rows_heads_and_layers_fold_apart():
    """A batch folds as its singles do, so the two guidance rows of an image fold each for itself."""
    view = make(layers=2)
    victims = slots_of(view, 0, 2, 5, 6)
    together = all_slots(view, victims, ones(view))
    names = ("keys", "values", "bias", "index", "queries")
    for dim, size in enumerate(view.index.shape[:3]):
        for place in range(size):
            alone = replace(view, **{n: getattr(view, n).narrow(dim, place, 1) for n in names})
            folded = all_slots(alone, victims.narrow(dim, place, 1), ones(alone))
            for part in ("keys", "values", "bias", "count"):
                torch.testing.assert_close(getattr(folded, part), getattr(together, part).narrow(dim, place, 1))


def test_a_run_folds_what_was_chosen():
    """Through the loop: victims are out of sight, their slots come next, what was given nothing is untouched."""
    release, runs = LineCache.release, []

    def watch(cache: LineCache, view: View, victims: Tensor) -> None:
        old, some = view.keys.clone(), slice(view.layer, view.layer + len(view.index))
        expected = all_slots(replace(view), victims, cache.count[some].clone())
        release(cache, view, victims)
        torch.testing.assert_close(cache.keys.data[some], expected.keys)
        torch.testing.assert_close(cache.values.data[some], expected.values)
        torch.testing.assert_close(cache.bias[some], without(expected.bias, victims))
        assert torch.equal(cache.keys.data[some][~expected.changed], old[~expected.changed])
        assert torch.equal(cache.bias[some] == -math.inf, cache.index[some] < 0)
        assert (cache.index[some].gather(-1, victims) == -1).all()
        assert torch.equal(cache.target[some][..., slice(*cache.part)], victims)
        assert (cache.count[some].gather(-1, victims) == 1).all()
        runs.append(int(expected.changed.sum()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineCache, "release", watch)
        decode(llamagen(7, 5), class_prompt([1, 3]), CachePlan("fold", 2, 2, 1), SamplePlan(seed=7, guidance=2.5))
    assert len(runs) == 12 and min(runs) > 0


# -- what is foreseen --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("lines", "columns"), [*((n, 0) for n in HORIZONS), (1, 1), (1, -1)])
def test_llamagen_turns_its_queries_to_a_later_line(lines, columns):
    """A rotated query turned ahead is the same query rotated for a later line, and perhaps for another column."""
    model = llamagen(10, 5)
    grid = model.grid.after(1)
    raw = torch.randn(2, 1, 3, 3, 8, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    table = rope_2d(20, 5, 8, ROPE_BASE, raw.device).unflatten(0, (20, 5))
    here, there = table[1, 1:4], table[1 + lines, 1 + columns : 4 + columns]
    turned = model.rotate_ahead(grid, rotate_pairs(raw.float(), here), lines, columns)
    torch.testing.assert_close(turned, rotate_pairs(raw.float(), there), atol=1e-5, rtol=1e-5)
    assert (turned - rotate_pairs(raw.float(), here)).abs().max() > 0.1


def test_the_score_is_the_least_cost_of_a_merge():
    """Of tokens that count alike the nearest to another is the cheapest; one nobody looks at is cheaper still."""
    view = make(batch=1, heads=1)
    keys = torch.zeros_like(view.keys)
    keys[0, 0, 0, :, 0] = torch.tensor([0.0, 0, 10, 11, 20, 22, 30, 34, 40, 48, 50, 66, 70, 102])
    index = torch.arange(14, dtype=torch.int32).view(1, 1, 1, -1)
    even = replace(view, keys=keys, index=index, bias=torch.zeros_like(view.bias), queries=view.queries * 0)
    few = POLICIES["fold"].score(even)[0, 0, 0, 2:]
    even = replace(even, protected=12)  # so many may not leave that all are compared
    scores = POLICIES["fold"].score(even)[0, 0, 0, 2:].tolist()
    older = [1, 9, 2, 8, 4, 6, 8, 2, 16, 4, 32]  # of equals the older is stronger, so each could go into an older one
    unit = scores[1]
    assert scores[1:] == pytest.approx([unit * d * d for d in older]) and scores[0] > 1e30, "the strongest stays"
    quiet = replace(even, bias=even.bias.index_fill(-1, torch.tensor([13]), -20.0))
    again = POLICIES["fold"].score(quiet)[0, 0, 0, 2:].tolist()
    assert again[-1] < scores[-1] / 4
    least = 2 * COLS  # of equals the newest are the least important
    assert few[-least:].tolist() == pytest.approx(scores[-least:])
    assert (few[:-least] > few[-least:].max()).all() and (few[:-least].diff() < 0).all(), "the others by importance"


@pytest.mark.parametrize(("near", "far"), [(4, 9), (9, 4)])
def test_of_two_that_are_equally_near_the_newer_takes_the_victim(near, far):
    """One to the left and one to the right of it; rounding, which makes one of them the nearer, does not decide."""
    view = make(batch=1, heads=1)
    keys = torch.full_like(view.keys, 50)
    victim, left, right = slots_of(view, 6, near, far).view(3)
    for off, taker in ((1e-6, max(near, far)), (1e-2, near)):
        keys[..., victim, :], keys[..., left, :], keys[..., right, :] = 0, 1, -1 - off
        folded = fold(replace(view, keys=keys), victim.view(1, 1, 1, 1), ones(view))
        assert folded.slot.item() == slots_of(view, taker).item()


# -- what makes it cheap -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 3, 6, 11])
def test_a_minimum_by_halves_sees_every_row(size):
    """The least row comes first, in the middle, last; and a column may hold nothing that counts."""
    for least in range(size):
        x = torch.rand(2, 3, size, 5, generator=torch.Generator().manual_seed(least))
        x[:, :, least, :4] -= 1
        x[..., 4] = math.inf
        expected = x.amin(-2)
        assert torch.equal(extreme(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_foresees_the_same(dtype):
    """Products in bfloat16 are as exact as those of the model's own attention; those of float16 would overflow."""
    view = make(seed=5)
    if dtype == torch.float16:  # what all keys have in common changes no share of attention
        view.keys[..., 0], view.queries[..., 0] = 30000, 10
    half = replace(view, **{n: getattr(view, n).to(dtype) for n in ("keys", "values", "queries", "bias")})
    double = replace(half, **{n: getattr(half, n).double() for n in ("keys", "values", "queries", "bias")})
    found, expected = half.look_ahead(), double.look_ahead()
    assert found.mass.dtype == found.logsumexp.dtype == torch.float32
    torch.testing.assert_close(found.mass.double(), expected.mass, atol=0.01, rtol=0)
    torch.testing.assert_close(found.logsumexp.double(), expected.logsumexp, atol=0.05, rtol=1e-6)


def test_parts_are_nearly_equal():
    """Of five rows, three at a time: three and two, and no row twice."""
    view = make(batch=5)
    parts = list(view.parts(3 * 3 * view.index.shape[-1] ** 2))
    assert [len(part.index[0]) for part in parts] == [3, 2] and [part.first for part in parts] == [0, 3]
    four = make(batch=4)
    assert [len(part.index[0]) for part in four.parts(3 * 3 * four.index.shape[-1] ** 2)] == [2, 2]

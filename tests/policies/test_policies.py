"""Each policy on a hand-made View whose answer is obvious, what all of them have in common, and `choose`."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.view import View
from linear_core.grid import Grid
from linear_core.plan import ONLY_SCALES, UNEVEN, CachePlan, SamplePlan
from linear_core.policies import POLICIES, SCALE_POLICIES, Policy, choose
from linear_core.policies.adakv import adakv
from linear_core.policies.allocate import allocate, allocate_layers
from linear_core.policies.attention_distance import attention_distance
from linear_core.policies.criticalkv import criticalkv
from linear_core.policies.rank import rank
from linear_core.policies.snapkv import WINDOW
from linear_core.policies.stratified import stratified
from linear_core.prompts import class_prompt
from tests.tiny import decode, llamagen, policy

INF = float("inf")


def louder(queries: Tensor, lines: int, columns: int = 0) -> Tensor:
    """Stands for a model's rotation."""
    return queries * (1 + lines / 16)


def make(
    keys: Tensor,
    *,
    cols: int,
    queries: Tensor | None = None,
    mass: Tensor | None = None,
    index: list[int] | None = None,
    prompt: int = 1,
    rows: int = 9,
) -> View:
    """A view of keys S D (or B S D) in one layer and one head. Slots hold 0, 1, 2, … unless `index` says otherwise.

    queries C D (or B C D); the finished line is the one that the greatest index ends.
    """
    keys = keys.float().expand(1, 1, 1, *keys.shape) if keys.ndim == 2 else keys.float()[None, :, None]
    named = torch.tensor(index if index is not None else range(keys.shape[3]), dtype=torch.int32)
    named = named.expand(keys.shape[:-1]).clone()
    bias = torch.zeros(named.shape).masked_fill(named < 0, -INF)
    if queries is not None:
        queries = queries.float()
        queries = queries.expand(1, 1, 1, *queries.shape) if queries.ndim == 2 else queries[None, :, None]
    row = (int(named.max()) - prompt) // cols
    return View(keys, keys, bias, named, queries, mass, Grid(rows, cols, prompt=prompt), row, rotate=louder)


def surveyed(name: str, view: View) -> View:
    """As the loop shows it: with what the policy's survey finds, if it has one."""
    survey = POLICIES[name].survey
    return view if survey is None else replace(view, survey=survey(view))


def scores_of(name: str, view: View) -> Tensor:
    return POLICIES[name].score(surveyed(name, view))


def keep_of(name: str, view: View, plan: CachePlan) -> Tensor:
    """Tokens that each head keeps: L B H."""
    view = surveyed(name, view)
    return POLICIES[name].keep(view, POLICIES[name].score(view), plan)


def score(name: str, view: View) -> list[float]:
    """Scores of the first row, in slot order."""
    return scores_of(name, view)[0, 0, 0].tolist()


def one_hot(*places: int, size: int = 8, length: float = 10.0) -> Tensor:
    """One vector for each place, along that axis; place -1 is the zero vector."""
    return torch.stack([length * (torch.arange(size) == place) for place in places])


def random_view(batch: int = 3, heads: int = 3, layers: int = 2, prompt: int = 3, cols: int = 9) -> View:
    """Everything at random: slots out of order, two of them empty, padding in the last prompt, old tokens gone."""
    source = torch.Generator().manual_seed(5)
    slots, row = prompt + 3 * cols, 4
    lead = (layers, batch, heads)
    keys, values = (torch.randn(*lead, slots, 6, generator=source) for _ in range(2))
    index = torch.empty(*lead, slots, dtype=torch.int32)
    first = prompt + row * cols
    for head in index.flatten(0, 2):
        old = prompt + torch.randperm(first - prompt, generator=source)[: 2 * cols]
        old[:2] = -1
        image = torch.cat([old, torch.arange(first, first + cols)])
        head.copy_(torch.cat([torch.arange(prompt), image[torch.randperm(len(image), generator=source)]]))
    index[:, -1, :, :2] = -1
    bias = torch.zeros(index.shape).masked_fill(index < 0, -INF)
    bias[:, :, :, prompt - 1] = math.log(4)
    queries = torch.randn(*lead, cols, 6, generator=source)
    queries[1:] *= 2  # some layers look more closely
    mass = torch.rand(index.shape, generator=source) * 3
    return View(keys, values, bias, index, queries, mass, Grid(9, cols, prompt=prompt), row, rotate=louder)


def slice_view(view: View, dim: int, place: int) -> View:
    """The same view with one layer (0), row (1) or head (2) only."""
    names = ("keys", "values", "bias", "index", "queries", "mass")
    return replace(view, **{name: getattr(view, name).narrow(dim, place, 1) for name in names})


def side_by_side(one: View, other: View, dim: int) -> View:
    """Two views as layers (0), rows (1) or heads (2) of one."""
    names = ("keys", "values", "bias", "index", "queries")
    return replace(one, **{name: torch.cat([getattr(one, name), getattr(other, name)], dim) for name in names})


every_policy = pytest.mark.parametrize("name", POLICIES)


# -- what all have in common -------------------------------------------------------------------------------------------


@every_policy
def test_scores_have_the_shape_of_the_slots_and_no_nan(name):
    """L B H S, and a finite number for every image token held, empty slots and padding or not."""
    view = random_view()
    scores = scores_of(name, view)
    assert scores.shape == view.index.shape
    assert scores[view.candidates()].isfinite().all()


@every_policy
def test_a_batch_is_scored_as_its_singles(name):
    """A row's scores do not depend on who else is in the batch."""
    view = random_view()
    scores = scores_of(name, view)
    for row in range(view.index.shape[1]):
        torch.testing.assert_close(scores[:, row : row + 1], scores_of(name, slice_view(view, 1, row)))


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in ("tova", "random", "vase", "hack")])
def test_layers_and_heads_are_scored_apart(name):
    """A head's scores are its own. (TOVA means its heads to agree, HACK compares them; chance counts them.)"""
    view = random_view()
    scores = scores_of(name, view)
    for dim in (0, 2):
        for place in range(view.index.shape[dim]):
            alone = scores_of(name, slice_view(view, dim, place))
            torch.testing.assert_close(scores.narrow(dim, place, 1), alone)


@every_policy
def test_slots_are_in_no_order(name):
    """The same tokens in other slots get the same scores: neighbours are neighbours by index."""
    view = random_view(prompt=1)
    if name == "tova":  # its heads share one score per slot, so all heads have the same tokens in the same slots
        view = replace(view, index=view.index[:, :1, :1].expand_as(view.index), bias=torch.zeros_like(view.bias))
    slots = view.index.shape[-1]
    order = torch.randperm(slots, generator=torch.Generator().manual_seed(1))
    moved = {part: getattr(view, part)[..., order] for part in ("bias", "index", "mass")}
    moved |= {part: getattr(view, part)[..., order, :] for part in ("keys", "values")}
    there = view.index[..., order] >= 0
    expected = scores_of(name, view)[..., order]
    moved_scores = scores_of(name, replace(view, **moved))
    torch.testing.assert_close(moved_scores[there], expected[there], rtol=1e-5, atol=1e-5)


@every_policy
def test_a_longer_prompt_moves_nothing(name):
    """What counts is where a token stands in the picture, not how long the prompt before it is."""
    view = random_view(prompt=3)
    further = view.index + 4 * (view.index >= 3)
    longer = replace(view, index=further.int(), grid=view.grid.after(7))
    before, after = (scores_of(name, v).float().masked_fill(~v.candidates(), INF) for v in (view, longer))
    assert torch.equal(before.argsort(dim=-1, stable=True), after.argsort(dim=-1, stable=True))


@every_policy
def test_a_policy_reads_only_what_it_declares(name):
    """It answers the same without the buffers that it does not ask for."""
    view = random_view()
    reads = POLICIES[name].reads
    bare = replace(
        view,
        queries=view.queries if reads & {"queries", "ahead"} else None,
        mass=view.mass if "mass" in reads else None,
        rotate=view.rotate if "ahead" in reads else None,
    )
    assert torch.equal(scores_of(name, bare), scores_of(name, view))


@every_policy
def test_a_view_is_only_looked_at(name):
    """Scoring writes to nothing."""
    view, same = random_view(), random_view()
    scores_of(name, view)
    for part in ("keys", "values", "bias", "index", "queries", "mass"):
        assert torch.equal(getattr(view, part), getattr(same, part)), part


@pytest.mark.parametrize("name", sorted(UNEVEN - ONLY_SCALES))
def test_what_heads_keep_depends_on_what_they_hold_and_nothing_else(name):
    """Not on who else is in the batch, in which slots tokens lie, or how long the prompt is."""
    plan = CachePlan(name, budget=2, anchors=2, recent=1)
    view = random_view()
    keep = keep_of(name, view, plan)
    assert keep.shape == view.index.shape[:3] and keep.dtype == torch.int64
    for row in range(view.index.shape[1]):
        assert torch.equal(keep[:, row : row + 1], keep_of(name, slice_view(view, 1, row), plan))
    slots = torch.randperm(view.index.shape[-1], generator=torch.Generator().manual_seed(1))
    moved = {part: getattr(view, part)[..., slots] for part in ("bias", "index", "mass")}
    moved |= {part: getattr(view, part)[..., slots, :] for part in ("keys", "values")}
    assert torch.equal(keep, keep_of(name, replace(view, **moved), plan))
    further = view.index + 4 * (view.index >= 3)
    longer = replace(view, index=further.int(), grid=view.grid.after(7))
    assert torch.equal(keep, keep_of(name, longer, plan))
    assert len(keep[:, 0].unique()) > 1, "and it does differ"
    per_layer = keep.sum(2) if name in ("adakv", "headkv") else keep.sum((0, 2))[None] / 2
    assert (per_layer == 3 * 2 * 9).all(), "the budget is what they keep on average"


@every_policy
def test_a_layer_is_judged_alike_alone_and_among_all(name):
    """The loop shows one layer after the other, with its number and with what the survey found in all of them."""
    view, plan = surveyed(name, random_view(layers=3)), CachePlan(name, budget=2, anchors=2, recent=1)
    scores = POLICIES[name].score(view)
    for layer in range(3):
        one = replace(slice_view(view, 0, layer), layer=layer)
        alone = POLICIES[name].score(one)
        torch.testing.assert_close(alone, scores[layer : layer + 1])
        if POLICIES[name].keep:
            assert torch.equal(
                POLICIES[name].keep(one, alone, plan), POLICIES[name].keep(view, scores, plan)[layer][None]
            )


def test_the_plan_knows_who_needs_room():
    """plan.py, which knows no torch, names the policies whose heads keep unequal numbers."""
    assert {name for name, policy in (POLICIES | SCALE_POLICIES).items() if policy.keep} == UNEVEN
    assert set(SCALE_POLICIES) == ONLY_SCALES


# -- one by one --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["line", "snapkv", "tova", "rkv"])
def test_attention_keeps_what_the_line_looked_at(name):
    """Every query is aligned with the key of token 9, far from any other that counts."""
    keys = one_hot(-1, *([0] * 8), 5, *([1] * 11), size=8)  # prompt, tokens 1..8, 9, 10..20
    view = make(keys, cols=4, queries=one_hot(5, 5, 5, 5))
    scores = score(name, view)
    candidates = scores[1:]
    assert max(candidates) == scores[9]
    if name != "snapkv" and name != "rkv":  # those pool over neighbours
        assert candidates.count(scores[9]) == 1


def test_line_is_the_mean_of_full_softmaxes():
    """Numbers by hand: queries at 3 and 4 over a prompt and tokens 1 to 4, the later of which the first cannot see."""
    keys = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    view = make(keys, cols=2, queries=torch.tensor([[1.0], [-1.0]]))
    first = [math.exp(x) for x in (0, 1, 2, 3)]
    second = [math.exp(-x) for x in (0, 1, 2, 3, 4)]
    expected = [(a / sum(first) + b / sum(second)) / 2 for a, b in zip([*first, 0], second, strict=True)]
    assert score("line", view) == pytest.approx(expected, rel=1e-5)


def gaze() -> View:
    """Two queries. The first looks at the prompt and, of the picture, at token 1 alone; the second at 2 more than at 1.

    With the prompt in the softmax token 2 wins, over image tokens only token 1 does. Far apart, so that pooling is
    without effect: the slots are named 1 and 20.
    """
    index = [0, 1, 20, *range(5, 16), 41, 42]
    keys = torch.zeros(len(index), 2)
    keys[0] = torch.tensor([30.0, 0.0])
    keys[1] = torch.tensor([20.0, 10.0])
    keys[2] = torch.tensor([0.0, 10.5])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0]]) * 2**0.5
    return make(keys, cols=2, queries=queries, index=index, rows=30)


def test_line_normalises_over_the_prompt_too():
    """A query that looks at the prompt has little to say about the picture."""
    scores = score("line", gaze())
    assert scores[2] > scores[1] > max(scores[3:])


def test_tova_asks_the_last_query_alone_and_all_heads_together():
    """The line looks at token 1, its last query at token 3 in one head and at 5 in the other: both heads keep both."""
    keys = one_hot(-1, 1, 2, 3, 4, 5, 6, 7)
    one, other = (make(keys, cols=4, queries=one_hot(1, 1, 1, last), prompt=0) for last in (3, 5))
    assert score("line", one).index(max(score("line", one))) == 1
    assert score("tova", one).index(max(score("tova", one))) == 3
    scores = POLICIES["tova"].score(side_by_side(one, other, dim=2))[0, 0]
    assert torch.equal(scores[0], scores[1])
    torch.testing.assert_close(scores[0], (torch.tensor(score("tova", one)) + torch.tensor(score("tova", other))) / 2)
    assert sorted(scores[0].topk(2).indices.tolist()) == [3, 5]


def test_h2o_divides_by_age():
    """Token 1 drew 6 from twelve queries and token 9 drew 3 from four: the young one is looked at more."""
    mass = torch.full((1, 1, 1, 13), 0.1)
    mass[..., 1], mass[..., 9] = 6.0, 3.0
    scores = score("h2o", make(torch.zeros(13, 2), cols=4, mass=mass))
    assert scores[1] == pytest.approx(6 / 12) and scores[9] == pytest.approx(3 / 4)
    assert scores[12] == pytest.approx(0.1), "the newest token has been seen once, by itself"


def test_snapkv_pools_over_neighbours_by_index():
    """All attention is on token 10, so 7 to 13 share its score and no others do, whatever slots they lie in."""
    order = torch.randperm(25, generator=torch.Generator().manual_seed(3))
    axis = torch.where(order == 10, 5, 0)
    view = make(one_hot(*axis.tolist()), cols=4, queries=one_hot(5, 5, 5, 5), index=order.tolist())
    scores = torch.tensor(score("snapkv", view))
    best = scores > 0.9
    assert sorted(order[best].tolist()) == [7, 8, 9, 10, 11, 12, 13]
    assert (scores[~best] < 0.1).all()


def test_snapkv_asks_the_last_32_queries():
    """A line of 40: its first 8 queries look at token 3, which is worth nothing, and the other 32 at token 30."""
    keys = one_hot(*[1 if i == 3 else 2 if i == 30 else 0 for i in range(81)])
    view = make(keys, cols=40, queries=one_hot(*[1] * 8, *[2] * 32))
    scores = score("snapkv", view)
    assert WINDOW == 32
    assert scores[30] == pytest.approx(1) and scores[3] == pytest.approx(0, abs=1e-6)
    assert score("line", view)[3] == pytest.approx(8 / 40)


def test_rkv_asks_the_last_8_queries():
    """A line of 12: what only its first 4 queries looked at (token 3) is no better than what nobody looked at."""
    keys = one_hot(*[1 if i == 3 else 2 if i == 20 else 3 if i == 11 else 0 for i in range(37)])
    scores = score("rkv", make(keys, cols=12, queries=one_hot(*[1] * 4, *[2] * 8)))
    assert scores[3] == pytest.approx(scores[11])
    assert scores[20] > scores[3]


def test_rkv_lets_go_of_duplicates_in_each_sample_of_its_own():
    """Three tokens share a key, all others are unlike each other, and the queries look everywhere alike.

    The duplicates are 2, 4 and 6 in one row of the batch and 3, 5 and 7 in the other. In each the oldest is worth
    least, then the next, and the newest as much as a token without duplicates.
    """
    count = 25
    first, second = list(range(count)), list(range(count))
    first[4] = first[6] = 2
    second[5] = second[7] = 3
    keys = torch.stack([one_hot(*places, size=count) for places in (first, second)])
    view = make(keys, cols=8, queries=torch.zeros(2, 8, count))
    for scores, (oldest, older, newest) in zip(
        POLICIES["rkv"].score(view)[0, :, 0], [(2, 4, 6), (3, 5, 7)], strict=True
    ):
        old = scores[5 : 1 + 8]  # far enough from the prompt, whose neighbours pool nothing; older than the line
        assert scores[oldest] < scores[older] < scores[newest]
        assert scores[newest] == pytest.approx(float(old.max()), rel=1e-4)
        unlike = [i for i in range(1, 9) if i not in (oldest, older)]
        assert min(scores[unlike]) > scores[older]


def test_rkv_does_not_count_the_prompt_or_empty_slots():
    """A key of the prompt or of an empty slot that equals a token's key is no duplicate of it.

    Two equal keys spare each other, so that a pair is worth what any token is. A third, were it counted, would cost the
    older of the pair.
    """
    pairs = [2, 2, 3, 3]
    keys = one_hot(2, 2, 2, *pairs, *range(4, 16), 3, 3, 3, size=20)
    index = [*range(3), *range(3, 19), -1, -1, -1]
    view = make(keys, cols=8, queries=torch.zeros(8, 20), index=index, prompt=3)
    scores = POLICIES["rkv"].score(view)[0, 0, 0]
    torch.testing.assert_close(scores[3:11], scores[3:4].expand(8))


def test_rkv_normalises_over_image_tokens():
    """Importance is the softmax over image tokens only: a query that looks at the prompt counts as any other."""
    scores = score("rkv", gaze())
    assert scores[1] > scores[2]


def test_keydiff_keeps_the_outlier():
    """One key unlike all others wins, however long it is: the mean is of keys brought to unit length."""
    keys = one_hot(0, 0, 0, 0, 1, 0, 0, 0, 0, length=1.0)
    keys[4] *= 1000
    scores = score("keydiff", make(keys, cols=4))
    assert max(scores) == scores[4]
    assert scores[1] == pytest.approx(scores[8])


def test_keydiff_averages_image_keys_only():
    """Three of five image keys are alike. Counting keys of prompt or empty slots would make the other two common."""
    keys = one_hot(1, 1, 1, 0, 0, 0, 1, 1, 1, 1)
    view = make(keys, cols=5, index=[0, 1, 2, 3, 4, 5, 6, 7, -1, -1], prompt=3)
    scores = score("keydiff", view)
    assert min(scores[6:8]) > max(scores[3:6])


def test_streaming_lets_the_oldest_go():
    """Scores rise with the index, in whatever slots the tokens lie."""
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2)).tolist()
    scores = score("streaming", make(torch.zeros(13, 2), cols=4, index=order))
    assert [i for _, i in sorted(zip(scores, order, strict=True))] == list(range(13))


def test_random_is_the_same_for_every_image_and_different_elsewhere():
    """No two layers, heads or lines rank 400 tokens alike (|r| < 6 / sqrt 400: 2e-9 a pair); all rows of a batch do."""
    tokens = 400
    index = torch.arange(tokens, dtype=torch.int32).expand(3, 2, 4, -1)
    empty = torch.zeros(*index.shape, 1)
    views = [View(empty, empty, empty[..., 0], index, None, None, Grid(40, 20), row) for row in (19, 20, 21)]
    scores = torch.stack([POLICIES["random"].score(view) for view in views])
    assert torch.equal(scores[:, :, 0], scores[:, :, 1])
    assert len(scores[0, 0, 0, 0].unique()) == tokens, "no ties"
    ranks = scores[:, :, 0].flatten(0, 2).argsort(-1).argsort(-1).double()
    r = torch.corrcoef(ranks) - torch.eye(len(ranks))
    assert r.abs().max() < 6 / tokens**0.5


def test_cake_keeps_what_queries_disagree_about():
    """By hand: token 5 gets half of every query's attention, 15 half of the first two's, 25 half of the last two's.

    Means are 1/2, 1/4, 1/4 and variances 0, 1/16, 1/16; each is spread over five neighbours.
    """
    axes = {5: 1, 15: 2, 25: 3}
    view = make(
        one_hot(*[axes.get(i, 0) for i in range(33)]),
        cols=4,
        queries=one_hot(1, 1, 1, 1) + one_hot(2, 2, 3, 3),
    )
    scores = score("cake", view)
    disputed = (0.25 + 200 / 16) / 5
    for token in range(1, 33):
        near = [i for i in axes if abs(i - token) <= 2]
        expected = 0 if not near else 0.5 / 5 if near == [5] else disputed
        assert scores[token] == pytest.approx(expected, abs=1e-5), token
    assert score("line", view)[5] > score("line", view)[15]


def stacked(*views: View, dim: int) -> View:
    whole = views[0]
    for view in views[1:]:
        whole = side_by_side(whole, view, dim)
    return whole


def looking(*queries: int, rows: int = 5, row: int | None = None) -> View:
    """Lines of four, all there. Token i has axis i; query c of the last line looks at token queries[c], -1: at all."""
    size = 1 + rows * 4
    return make(
        one_hot(*range(size), size=size, length=20.0), cols=4, queries=one_hot(*queries, size=size, length=20.0)
    )


NEAR, FAR, EVEN = (14, 14, 14, 14), (2, 2, 2, 2), (-1, -1, -1, -1)
FREE = CachePlan(budget=3, anchors=0, recent=0)


def test_cake_prefers_layers_of_wide_and_restless_attention():
    """One layer always looks at one token; in the other each query looks at a pair of its own: it gets what it can."""
    restless = replace(looking(1, 2, 3, 4), queries=looking(1, 2, 3, 4).queries + looking(5, 6, 7, 8).queries)
    assert keep_of("cake", stacked(looking(*FAR), restless, dim=0), FREE).flatten().tolist() == [4, 20]
    assert keep_of("cake", stacked(restless, restless, dim=0), FREE).flatten().tolist() == [12, 12]


def test_expected_attention_is_that_of_a_gaussian():
    """By another road: mean and covariance of the queries turned a line ahead, as matrices, and the value's length."""
    view = random_view()
    queries = louder(view.queries, 1).double()
    mean = queries.mean(-2, keepdim=True)
    covariance = (queries - mean).mT @ (queries - mean) / queries.shape[-2]
    keys = view.keys.double()
    exponent = (keys * mean).sum(-1) / 6**0.5 + ((keys @ covariance) * keys).sum(-1) / 12 + view.bias
    expected = exponent.exp() / exponent.exp().sum(-1, keepdim=True) * view.values.double().norm(dim=-1)
    torch.testing.assert_close(scores_of("expected", view).double(), expected, rtol=1e-4, atol=1e-6)


def test_next_looks_from_the_next_line():
    """The line looks at token 5; turned a line on, its queries look at token 6."""
    view = replace(looking(5, 5, 5, 5), rotate=lambda queries, lines, columns: queries.roll(lines, -1))
    assert score("line", view).index(max(score("line", view))) == 5
    assert score("next", view).index(max(score("next", view))) == 6
    assert score("next", view)[6] == pytest.approx(1)


def test_criticalkv_weighs_the_second_half_by_values():
    """Attention falls from token 1 to 12 and values rise. Of a budget of 8 the first 4 go by attention alone."""
    keys = -torch.arange(13.0)[:, None]
    size = torch.arange(13.0).mul(2).exp().masked_fill(torch.arange(13) < 5, 0.0)
    view = replace(make(keys, cols=4, queries=torch.ones(4, 1)), values=size.view(1, 1, 1, -1, 1))
    ranking = sorted(range(1, 13), key=lambda i: -score("criticalkv", view)[i])
    assert set(ranking[:4]) == {1, 2, 3, 4}
    assert ranking[4:] == [12, 11, 10, 9, 8, 7, 6, 5]


def test_dropkv_is_how_far_outputs_move_without_a_token():
    """By another road: each token in turn is taken out of the softmax. Two query heads share each key head.

    Then the mean over seven neighbours in the sequence, of which those that are no image tokens count as 0.
    """
    view = random_view()
    view = replace(view, queries=torch.cat([view.queries, view.queries.flip(3) / 2], 2))
    queries = view.queries.double().unflatten(2, (3, 2))
    products = queries @ view.keys.double()[:, :, :, None].transpose(-1, -2) / 6**0.5 + view.bias[:, :, :, None, None]
    own = view.newest + 1 - 9 + torch.arange(9)
    products = products.masked_fill(view.index[:, :, :, None, None] > own[:, None], -INF)
    values = view.values.double()[:, :, :, None]
    outputs, expected = products.softmax(-1) @ values, torch.zeros_like(view.bias)
    for slot in range(view.index.shape[-1]):
        without = products.clone()
        without[..., slot] = -INF
        moved = without.softmax(-1) @ values - outputs
        expected[..., slot] = moved.square().sum((-2, -1)).mean(-1)
    order = view.index.argsort(dim=-1, stable=True)
    alone = F.pad((expected * view.candidates()).gather(-1, order), (3, 3))
    pooled = torch.stack([alone[..., n : n + 30].float() for n in range(7)]).mean(0)
    torch.testing.assert_close(scores_of("dropkv", view).gather(-1, order), pooled, rtol=1e-3, atol=1e-6)


def test_vase_spares_the_longest_values():
    """Two of 160 tokens: whatever the draw, and whatever anybody looks at."""
    view = make(one_hot(*[i % 5 for i in range(161)]), cols=8, queries=one_hot(*[1] * 8), rows=30)
    values = torch.ones_like(view.values)
    values[..., (7, 33), :] = 9.0
    for row in range(20):
        scores = torch.tensor(score("vase", replace(view, values=values, row=19 - row % 2, layer=row)))
        assert sorted(scores[1:].topk(2).indices.add(1).tolist()) == [7, 33]


def test_vase_draws_in_proportion_to_the_score():
    """Of two tokens looked at as 3 to 1 the first wins three times of four: within 4 sigma of 1,000 draws."""
    keys = torch.zeros(1001, 1)
    keys[::2] = math.log(3)  # every other token is looked at three times as much as its neighbour
    view = replace(make(keys[:, :], cols=1, queries=torch.ones(1, 1), rows=1001), row=1000)
    wins, draws = 0, 2
    for layer in range(draws):
        scores = torch.tensor(score("vase", replace(view, values=torch.ones_like(view.keys), layer=layer)))[1:]
        low, high = scores.view(-1, 2)[8:].unbind(-1)  # the first few are spared: their values are as long as any
        wins += int((high > low).sum())
    total = draws * 492
    assert wins / total == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / total) ** 0.5)


def test_stratified_forgets_no_band():
    """All attention is on the last two lines of 16, yet of every two lines the best four tokens come first."""
    keys = torch.linspace(0, 9, 65)[:, None]
    view = make(keys, cols=4, queries=torch.full((4, 1), 5.0), rows=20)
    scores = torch.tensor(score("stratified", view))[1:].view(8, 8)  # band, token
    plain = torch.tensor(score("line", view))[1:].view(8, 8)
    safe = torch.zeros(8, 8, dtype=torch.bool).scatter_(1, plain.topk(4).indices, True)  # 60 / 2 / 8 is 3.75 each
    assert scores[safe].min() > scores[~safe].max()
    assert scores[~safe].argsort().tolist() == plain[~safe].argsort().tolist(), "the rest goes by attention"


def test_stratified_of_few_lines_has_as_many_bands():
    """Of each of three lines the best two come first: 8 / 2 / 3 is 1.33 each, which of eight bands were one."""
    view = make(torch.linspace(0, 9, 13)[:, None], cols=4, queries=torch.full((4, 1), 2.0), rows=20)
    scores = torch.tensor(score("stratified", view))[1:].view(3, 4)  # line, token
    plain = torch.tensor(score("line", view))[1:].view(3, 4)
    safe = torch.zeros(3, 4, dtype=torch.bool).scatter_(1, plain.topk(2).indices, True)
    assert scores[safe].min() > scores[~safe].max()


def test_reach_is_attention_above_the_two_newest_lines():
    """Of five lines the first three are far; what the prompt draws is left out."""
    prompt = looking(0, 0, 0, 0)
    both = replace(prompt, queries=prompt.queries + looking(12, 12, 12, 12).queries)
    split = replace(both, queries=both.queries + looking(13, 13, 13, 13).queries)
    for view, expected in (
        (looking(*FAR), 1),
        (looking(12, 12, 12, 12), 1),
        (looking(13, 13, 13, 13), 0),
        (both, 1),
        (split, 0.5),
    ):
        assert float(attention_distance(view)) == pytest.approx(expected, abs=1e-4)


def test_ssd_keeps_windows_in_spatial_heads_and_hitters_in_semantic_ones():
    """Two heads: one looks at its neighbourhood, one at the second token. Both have drawn most attention on token 7."""
    view = stacked(looking(*NEAR), looking(*FAR), dim=2)
    mass = torch.full(view.index.shape, 0.1)
    mass[..., 7] = 50.0
    spatial, semantic = scores_of("ssd", replace(view, mass=mass))[0, 0]
    assert spatial.argsort().tolist() == list(range(21))
    assert int(semantic.argmax()) == 7
    assert torch.equal(semantic, POLICIES["h2o"].score(replace(view, mass=mass))[0, 0, 1])


def test_hack_gives_structure_five_times_as_much():
    """Queries of one head all look at token 2, those of the other each at one of its own."""
    view = replace(stacked(looking(*FAR), looking(1, 2, 3, 4), dim=2), mass=torch.rand(1, 1, 2, 21))
    alike, diagonal = scores_of("hack", view)[0, 0]
    assert torch.equal(alike, POLICIES["h2o"].score(view)[0, 0, 0])
    assert torch.equal(diagonal, POLICIES["line"].score(view)[0, 0, 1])
    assert keep_of("hack", view, FREE).flatten().tolist() == [4, 20]
    layers = replace(stacked(looking(1, 2, 3, 4), looking(*FAR), dim=0), mass=torch.rand(2, 1, 1, 21))
    assert keep_of("hack", layers, FREE).flatten().tolist() == [20, 4], "heads of all layers share one budget"


def test_hack_does_not_take_the_order_of_a_line_for_structure():
    """What differs between queries because the first cannot see the last is no variance."""
    view = replace(stacked(looking(17, 18, 19, 20), looking(1, 2, 3, 4), dim=2), mass=torch.rand(1, 1, 2, 21))
    assert POLICIES["hack"].survey(view).flatten().tolist() == pytest.approx([0, 4 * (1 / 4 - 1 / 16)], abs=1e-5)


def test_headkv_gives_to_heads_that_look_far():
    """One head looks near and one far: a fifth of the budget of 12 each, and the rest to the latter."""
    view = stacked(looking(*NEAR), looking(*FAR), dim=2)
    assert keep_of("headkv", view, replace(FREE, budget=2)).flatten().tolist() == [2, 14]  # 1.6 and 14.4
    assert keep_of("headkv", stacked(looking(*NEAR), looking(*FAR), dim=0), FREE).flatten().tolist() == [12, 12]
    assert torch.equal(scores_of("headkv", view), scores_of("stratified", view))


def test_adakv_lets_a_layers_heads_compete():
    """All of one head's 20 tokens beat the other's: 20 and 4 of the 24 there are to keep, a fifth shared beforehand."""
    view = stacked(looking(*EVEN), looking(*EVEN), dim=2)
    scores = torch.arange(42.0).flip(0).view(1, 1, 2, 21)
    keep = POLICIES["adakv"].keep(view, scores, FREE)
    assert keep.flatten().tolist() == [18, 6]  # 0.8 x 20 + 0.2 x 12 = 18.4, 0.8 x 4 + 0.2 x 12 = 5.6
    newest = torch.cat([torch.full((1, 1, 1, 21), 10.0), torch.full((1, 1, 1, 21), 5.0)], 2)
    newest[0, 0, 0, 17:] = 0.0  # worthless, but it stays: head 0 still has its 16 best tokens besides
    assert POLICIES["adakv"].keep(view, newest, replace(FREE, recent=1)).flatten().tolist() == [18, 6]
    protected = POLICIES["adakv"].keep(view, scores, replace(FREE, anchors=4, recent=2))
    assert protected.flatten().tolist() == [12, 12], "twelve of each are protected, so nothing is left to compete for"


def test_pyramidkv_narrows_with_depth():
    """Five layers, 80 tokens on average: 156 in the first and 4 in the last."""
    empty = torch.zeros(5, 1, 1, 221, 1)
    view = View(empty, empty, empty[..., 0], torch.arange(221).expand(5, 1, 1, -1), empty[:, :, :, :20], None,
                Grid(30, 20, prompt=1), 10)  # fmt: skip
    keep = keep_of("pyramidkv", view, CachePlan("pyramidkv", budget=4, anchors=0, recent=0))
    assert keep.flatten().tolist() == [156, 118, 80, 42, 4]
    keep = keep_of("pyramidkv", view, CachePlan("pyramidkv", budget=4, anchors=0, recent=3))
    assert keep[-1] == 60 and keep.sum() == 400, "what is protected stays in every layer"


def test_prefixkv_lets_layers_retain_equal_shares():
    """One layer looks everywhere, one at one token. Retaining alike takes 12 tokens and 1 of 13 (40 x 3/9).

    Of 24 to keep that is 22 and 2; there are 20 yet, so it is 20 and 4.
    """
    view = stacked(looking(*EVEN), looking(*FAR), dim=0)
    assert keep_of("prefixkv", view, FREE).flatten().tolist() == [20, 4]
    survey = POLICIES["prefixkv"].survey(view)
    assert survey[1, 0].tolist() == pytest.approx([0] + [1] * 19)
    assert (survey[0, 0].diff() > 0).all()


# -- sharing out -------------------------------------------------------------------------------------------------------


def test_shares_are_in_proportion_within_bounds_and_exact():
    """Every whole number of tokens, whatever the weights: none lost, none too many, nobody out of bounds."""
    source = torch.Generator().manual_seed(4)
    view = looking(*EVEN)
    for case in range(200):
        count, budget = 1 + case % 7, 1 + case % 3
        plan = CachePlan(budget=budget, anchors=case % 4, recent=min(case % 2, budget - 1))
        weights = (torch.rand(3, count, generator=source) ** (case % 9)).clamp(min=1e-3)
        held = torch.randint(plan.budget * 4, 21, (3, count), generator=source)
        keep = allocate(weights, held, view, plan)
        assert (keep.sum(-1) == count * budget * 4).all()
        assert (keep <= held).all() and (keep <= 8 * budget).all()
        assert (keep >= plan.anchors + 4 * plan.recent).all()
        free = (keep > plan.anchors + 4 * plan.recent) & (keep < held.clamp(max=8 * budget))
        for row in range(3):
            ratio = keep[row][free[row]] / weights[row][free[row]]
            spare = 1 / weights[row][free[row]]  # one token more or less
            assert ratio.numel() == 0 or (ratio - spare).max() <= (ratio + spare).min()
    assert allocate(torch.zeros(1, 4), 20, view, FREE).flatten().tolist() == [12] * 4, "nobody's claim is no claim"


def test_a_head_can_always_keep_its_share_of_all_layers():
    """From line to line: what a head keeps is there, since it kept as much before or is a line richer."""
    weights = torch.rand(4, 2, 3, generator=torch.Generator().manual_seed(2)) ** 6
    view, plan = looking(*EVEN), CachePlan(budget=3, anchors=2, recent=1)
    held = torch.full((4, 2, 3), 16)
    for row in range(3, 20):
        now = replace(view, grid=Grid(30, 4, prompt=1), row=row)
        keep = torch.cat([allocate_layers(weights, replace(slice_layer(now), layer=n), plan) for n in range(4)])
        assert (keep <= held).all() and (keep.sum((0, 2)) == 12 * 12).all()
        held = keep + 4
    assert int(keep.max()) == 24, "twice the budget at the end"


def slice_layer(view: View) -> View:
    return replace(view, index=view.index[:1])


def test_ranks_are_places_within_groups():
    """Against sorted(), with ties: the newest leads."""
    source = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 4, (2, 3, 40), generator=source).float()
    group = torch.randint(0, 5, (2, 3, 40), generator=source)
    index = torch.stack([torch.randperm(40, generator=source) for _ in range(6)]).view(2, 3, 40)
    for named, places in ((group, rank(scores, index, group)), (torch.zeros_like(group), rank(scores, index))):
        for b in range(2):
            for h in range(3):
                for slot in range(40):
                    rivals = [s for s in range(40) if named[b, h, s] == named[b, h, slot]]
                    best = sorted(rivals, key=lambda s: (-scores[b, h, s], -index[b, h, s]))
                    assert places[b, h, slot] == best.index(slot)


def test_policies_are_composed_by_wrapping():
    """A line of Python makes a policy of three papers, which runs as any other and keeps to its budget."""
    composed = adakv(criticalkv(stratified(POLICIES["h2o"])))
    assert composed.reads == {"mass"}
    model, sample = llamagen(7, 5), SamplePlan(guidance=1.0)
    with policy("adakv", composed):
        run = decode(model, class_prompt([1, 3]), CachePlan("adakv", budget=3, anchors=2, recent=1), sample)
    plain = decode(model, class_prompt([1, 3]), CachePlan("adakv", budget=3, anchors=2, recent=1), sample)
    assert len(torch.cat(list(run.keep.values())).unique()) > 1
    assert not torch.equal(run.logits[-1], plain.logits[-1])
    assert isinstance(composed, Policy)


# -- choose ------------------------------------------------------------------------------------------------------------


def picked(
    scores: list[float], index: list[int], count: int, *, cols: int = 2, prompt: int = 1, **settings: int
) -> list[int]:
    """Indices chosen, or -1 for an empty slot. The first slot is the prompt's."""
    view = make(torch.zeros(len(index), 2), cols=cols, index=index, prompt=prompt)
    settings = {"anchors": 0, "recent": 0, "prompt_slots": 1} | settings
    slots = choose(torch.tensor(scores)[None, None, None], view, count, **settings)
    assert slots.dtype == torch.int64 and slots.shape == (1, 1, 1, count)
    chosen = slots.flatten().tolist()
    assert len(set(chosen)) == count
    return [index[slot] for slot in chosen]


def test_the_least_useful_go_first():
    """In order of their scores."""
    assert picked([9, 5, 3, 4, 1, 2, 6], [0, 1, 2, 3, 4, 5, 6], 3) == [4, 5, 2]


def test_the_prompt_is_never_chosen():
    """However little it is worth, and were its slot empty."""
    assert picked([-9, 5, 3, 4, 1], [0, 1, 2, 3, 4], 4) == [4, 2, 3, 1]
    assert picked([-9, -9, 5, 3, 4, 1], [-1, 1, 2, 3, 4, 5], 2, prompt=2, prompt_slots=2) == [5, 3]


def test_empty_slots_go_first():
    """Before any token, be it worth minus infinity."""
    assert picked([0, 3, -INF, 4, 99, 1, 2], [0, 1, 2, 3, -1, 5, 6], 3) == [-1, 2, 5]
    assert picked([0, 3, 5, 4, 99, 99, 2], [0, 1, 2, 3, -1, -1, 4], 2, anchors=1, recent=1) == [-1, -1]


def test_anchors_stay():
    """The first image tokens, counted behind the prompt."""
    scores = [0.0, 1, 2, 3, 4, 5, 6]
    index = [0, 1, 2, 3, 4, 5, 6]
    assert picked(scores, index, 2, anchors=1) == [2, 3]
    assert picked(scores, index, 2, anchors=3) == [4, 5]
    assert picked([0.0, *scores], [0, *range(5, 12)], 2, prompt=4, cols=4, anchors=3) == [7, 8]


def test_recent_lines_stay():
    """The newest whole lines, the finished one first."""
    scores = [0.0, 6, 5, 4, 3, 2, 1]
    index = [0, 1, 2, 3, 4, 5, 6]
    assert picked(scores, index, 2, recent=0) == [6, 5]
    assert picked(scores, index, 2, recent=1) == [4, 3]
    assert picked(scores, index, 2, recent=2) == [2, 1]
    assert picked(scores, index, 2, recent=1, anchors=2) == [4, 3]


def test_among_equals_the_oldest_goes_first():
    """Whatever slots the tokens lie in."""
    assert picked([0, 1, 1, 1, 0, 1, 1], [0, 5, 2, 6, 4, 1, 3], 4) == [4, 1, 2, 3]
    assert picked([0, -INF, -INF, 1, -INF, 1, -INF], [0, 5, 2, 6, -1, 1, 4], 4) == [-1, 2, 4, 5]


def test_every_head_chooses_for_itself():
    """Layers, rows and heads have victims of their own, by their own slots."""
    view = random_view()
    scores = torch.rand(view.index.shape, generator=torch.Generator().manual_seed(0))
    slots = choose(scores, view, 9, anchors=2, recent=1, prompt_slots=3)
    first, newest = view.grid.prompt, view.grid.index(view.row)
    for layer in range(2):
        for row in range(3):
            for head in range(3):
                index, worth = (t[layer, row, head].tolist() for t in (view.index, scores))
                free = [s for s in range(3, len(index)) if index[s] < 0 or first + 2 <= index[s] < newest]
                expected = sorted(free, key=lambda s: (index[s] >= 0, worth[s] if index[s] >= 0 else 0, index[s]))[:9]
                got = slots[layer, row, head].tolist()
                assert set(got[:2]) == set(expected[:2]) and got[2:] == expected[2:], "two empty slots, then by worth"


def test_heads_that_keep_more_let_fewer_go():
    """Least useful first, the next line's slots last; none comes before. Empty slots are written to first."""
    view = make(torch.zeros(9, 2), cols=2, index=[0, 1, 2, 3, 4, 5, 6, -1, -1])
    scores = torch.tensor([0.0, 6, 5, 4, 3, 2, 1, 0, 0])[None, None, None]
    settings = {"anchors": 0, "recent": 0, "prompt_slots": 1}
    for keep, expected in (
        (6, [-1] * 6 + [7, 8]),
        (5, [-1] * 5 + [7, 8, 6]),
        (3, [-1] * 3 + [7, 8, 6, 5, 4]),
        (0, [7, 8, 6, 5, 4, 3, 2, 1]),
    ):
        slots = choose(scores, view, 2, **settings, keep=torch.tensor([[[keep]]]))
        assert slots.flatten().tolist() == expected

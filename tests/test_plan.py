"""Plans: what they derive is arithmetic, and what they refuse is said in the user's words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.plan import PRESETS, CachePlan, CacheShape, SamplePlan, parse_budget, parse_seeds
from linear_core.policies import POLICIES, SCALE_POLICIES, get_policy
from linear_core.pyramid import Pyramid

SQUARE = Grid(24, 24)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"budget": 0}, "budget: 0"),
        ({"budget": -3}, "budget: -3"),
        ({"anchors": -1}, "anchors: -1"),
        ({"recent": -1}, "recent: -1"),
        ({"release": "soon"}, "release: 'soon'.*strict, lazy"),
        ({"mib": -1}, "budget: -1 MiB"),
        ({"mib": float("inf")}, "budget: inf MiB"),
        ({"mib": 5, "share": 0.5}, "both as a share and in MiB"),
    ],
)
def test_cache_settings_out_of_range(settings, word):
    """The message begins with the setting and what was found."""
    with pytest.raises(UserError, match=word):
        CachePlan(**settings)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"guidance": -0.1}, "guidance: -0.1"),
        ({"guidance": 1000.5}, "guidance: 1000.5"),
        ({"guidance": float("nan")}, "guidance: nan"),
        ({"temperature": -1}, "temperature: -1"),
        ({"temperature": float("inf")}, "temperature: inf"),
        ({"temperature": float("nan")}, "temperature: nan"),
        ({"top_k": -1}, "top-k: -1"),
        ({"top_p": 0}, "top-p: 0"),
        ({"top_p": 1.01}, "top-p: 1.01"),
        ({"top_p": float("nan")}, "top-p: nan"),
        ({"guidance_interval": -2}, "guidance interval: -2"),
    ],
)
def test_sample_settings_out_of_range(settings, word):
    """Each setting has a range, and the message begins with the setting and what was found."""
    with pytest.raises(UserError, match=word):
        SamplePlan(**settings)


def test_limits_are_allowed():
    """The ends of the ranges are inside."""
    CachePlan(budget=1, anchors=0, recent=0)
    SamplePlan(guidance=0, temperature=0, top_k=0, top_p=1)
    SamplePlan(guidance=1000, temperature=100, top_k=10**6, top_p=1e-6, guidance_interval=0)


def test_plans_are_frozen():
    """A plan that has been checked stays as it was checked."""
    with pytest.raises(FrozenInstanceError):
        CachePlan().budget = 0
    with pytest.raises(FrozenInstanceError):
        SamplePlan().top_p = 0


@pytest.mark.parametrize(
    ("plan", "rows", "lines", "evicts"),
    [
        (CachePlan(budget=4), 24, 5, True),
        (CachePlan(budget=22), 24, 23, True),
        (CachePlan(budget=23), 24, 24, False),
        (CachePlan(budget=24), 24, 24, False),
        (CachePlan(budget=99), 24, 24, False),
        (CachePlan(budget=1), 1, 1, False),
        (CachePlan("full", budget=1), 24, 24, False),
    ],
)
def test_lines(plan, rows, lines, evicts):
    """Room for the budget and the line being written, never more than the picture has."""
    grid = Grid(rows, 24)
    assert (plan.lines(grid), plan.evicts(grid)) == (lines, evicts)


def test_share_is_the_papers_ratio():
    """4 of 24 lines is one sixth; more than everything is everything."""
    assert CachePlan(budget=4).ratio(SQUARE) == 1 / 6
    assert CachePlan(budget=48).ratio(SQUARE) == 1
    assert CachePlan("full", budget=4).ratio(SQUARE) == 1


@pytest.mark.parametrize(
    ("text", "setting"),
    [
        ("4", {"budget": 4}), ("4 lines", {"budget": 4}), (" 1 Line ", {"budget": 1}), ("0", {"budget": 0}),
        ("1/6", {"share": 1 / 6}), ("15%", {"share": 0.15}), ("15 %", {"share": 0.15}), (".5", {"share": 0.5}),
        ("300MiB", {"mib": 300}), ("2 GiB", {"mib": 2048}), ("1.5gib", {"mib": 1536}), ("1GB", {"mib": 1e9 / 2**20}),
    ],
)  # fmt: skip
def test_budgets_as_people_say_them(text, setting):
    assert parse_budget(text) == setting


@pytest.mark.parametrize("text", ["", "few", "4 rows", "1/0", "0%", "0MiB", "GiB", "1/2/3", "/6", "-2GiB", "1/6%"])
def test_what_is_no_budget_is_said_to_be_none(text):
    with pytest.raises(UserError, match="is not a budget; write lines"):
        parse_budget(text)


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("", ()), (" 5 ", (5,)), ("3, 7,100-103", (3, 7, 100, 101, 102, 103)), ("1\n2;3 4", (1, 2, 3, 4)),
     (str(2**64 - 1), (2**64 - 1,))],
)  # fmt: skip
def test_seeds_as_people_write_them(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["x", "1,,x", "-3", "5-3", "1.5", "0-99999999999", str(2**64), "1-2-3"])
def test_what_is_no_seed_is_said_to_be_none(text):
    with pytest.raises(UserError, match=r"seeds: .*(is not a seed|more than 65536|out of range)"):
        SamplePlan(seeds=parse_seeds(text))


def test_every_image_keeps_its_seed_however_a_batch_is_split():
    for plan in (SamplePlan(9), SamplePlan(seeds=(4, 4, 0, 2**64 - 1))):
        seeds = plan.image_seeds(4)
        for rows in ([0], [3], [1, 2, 3], [3, 0], range(4)):
            assert plan.select(rows).image_seeds(len(rows)) == tuple(seeds[i] for i in rows)
    assert plan.select([2]) == SamplePlan(0), "a picture says its own seed, as one that is drawn alone"
    with pytest.raises(UserError, match="seeds: there are 4, but 3 images are drawn"):
        plan.image_seeds(3)


@pytest.mark.parametrize("plan", [CachePlan("fold"), CachePlan("adakv"), CachePlan("line", storage="int8")])
@pytest.mark.parametrize("stages", [Grid(24, 24), Grid(16, 9, eol=3), Pyramid.square(1, 2, 3, 4, 6)])
def test_memory_holds_the_most_that_fits(plan, stages):
    """The cache of the budget that MiB mean takes no more, and one line or token more would not fit."""
    shape, rows = CacheShape(3, 2, 16, 5, 2), 6
    for share in (0.2, 0.4):
        mib = shape.cache_bytes(stages, replace(plan, share=share), rows) / 2**20
        found = replace(plan, mib=mib).resolve(shape, stages, rows)
        assert not found.mib and shape.cache_bytes(stages, found, rows) <= mib * 2**20
        if isinstance(stages, Pyramid):
            more = replace(found, share=found.share + 1 / stages.kept)
        else:
            more = replace(found, budget=found.budget + 1)
            assert not found.share and found.budget == replace(plan, share=share).in_lines(stages).budget
        assert shape.cache_bytes(stages, more, rows) > mib * 2**20 or more.ratio(stages) > 1
    everything = replace(plan, mib=1e6).resolve(shape, stages, rows)
    assert everything.ratio(stages) == 1
    with pytest.raises(UserError, match=r"1e-05 MiB are not enough for one (line|scale) of 6 sequences"):
        replace(plan, mib=1e-5).resolve(shape, stages, rows)


def test_protected_tokens_must_fit_the_budget():
    """Exactly full is allowed, one token more is not, and the message has all four numbers."""
    grid = Grid(6, 5)
    CachePlan(budget=2, anchors=5, recent=1).check(grid)
    with pytest.raises(UserError, match="2 lines hold 10 tokens, but 6 anchors and 1 recent lines protect 11"):
        CachePlan(budget=2, anchors=6, recent=1).check(grid)
    with pytest.raises(UserError, match="budget"):
        CachePlan(budget=1, anchors=1, recent=1).check(Grid(6, 5, eol=1))


@pytest.mark.parametrize(
    ("plan", "row", "ends"),
    [
        (CachePlan("fold", 1), 2, [6, 12, 18, 25]),
        (CachePlan("fold", 2), 3, [6, 12, 18, 25]),
        (CachePlan("fold", 3), 9, [12, 25]),
        (CachePlan("fold", 4), 9, [25]),
        (CachePlan("fold", 2), 2, [25]),  # lines are left until then
        (CachePlan("fold", 1, release="strict"), 9, [25]),
        (CachePlan("line", 1, release="fold"), 9, [25]),  # reads a whole line's queries
    ],
)
def test_room_is_made_in_parts_of_a_line_where_there_is_little(plan, row, ends):
    """Of 24 codes and the line's end, which stays with the last code."""
    assert plan.ends(Grid(24, 24, eol=7), row) == ends


def test_what_evicts_nothing_protects_nothing():
    """Where the whole picture fits, the protected regions cannot be too large."""
    CachePlan(budget=5, anchors=999, recent=99).check(Grid(6, 5))
    CachePlan("full", budget=1, anchors=999, recent=99).check(Grid(6, 5))


@pytest.mark.parametrize("name", PRESETS)
def test_presets_fit_the_bundled_grid(name):
    """A preset is a plan that the 24 x 24 grid of the paper accepts, of a policy that exists."""
    PRESETS[name].check(SQUARE)
    get_policy(PRESETS[name].policy)


def test_unknown_policy_is_answered_with_the_known_ones():
    """The message lists what there is."""
    known = ", ".join(POLICIES | SCALE_POLICIES)
    with pytest.raises(UserError, match=f"policy: 'lin' is unknown; choose one of {known}"):
        get_policy("lin")


def test_policies_for_scales_are_refused_where_there_are_lines():
    for name in SCALE_POLICIES:
        with pytest.raises(UserError, match=f"policy: {name} weighs scales, and this model draws in lines"):
            CachePlan(name).check(SQUARE)


def test_bytes_are_known_before_anything_is_loaded():
    """24 layers, 16 heads of 128 in bf16, a guidance pair, 120 + 24 x 24 tokens: 261 MiB whole, 90 MiB at 4 lines."""
    shape = CacheShape(layers=24, heads=16, head_dim=128, prompt=120, bytes_per_element=2)
    mib = 2**20
    assert shape.bytes(SQUARE, CachePlan("full"), 2) == 261 * mib
    assert shape.bytes(SQUARE, CachePlan(budget=4), 2) == 90 * mib
    assert shape.line_bytes(SQUARE, 2) == 9 * mib
    assert shape.bytes(SQUARE, CachePlan(budget=4), 6) == 3 * 90 * mib


def test_an_end_of_line_token_takes_memory():
    """A line of 24 codes and its end is 25 slots."""
    shape = CacheShape(layers=1, heads=1, head_dim=1, prompt=0, bytes_per_element=1)
    assert shape.line_bytes(Grid(24, 24, eol=7), 1) == 2 * 25
    assert shape.bytes(Grid(24, 24, eol=7), CachePlan(budget=4), 1) == 2 * 5 * 25


@pytest.mark.parametrize(
    ("guidance", "interval", "guided"),
    [
        (4.0, -1, [True] * 6),
        (1.0, -1, [False] * 6),
        (0.0, -1, [False] * 6),
        (1.01, -1, [True] * 6),
        (4.0, 0, [True, True, False, False, False, False]),
        (4.0, 2, [True, True, True, True, False, False]),
        (1.0, 2, [False] * 6),
    ],
)
def test_guidance_ends_where_llamagens_does(guidance, interval, guided):
    """cfg_interval counts decode steps from 0, and step i draws token i + 1; token 0 comes from the prefill, guided."""
    plan = SamplePlan(guidance=guidance, guidance_interval=interval)
    assert [plan.guides(token) for token in range(6)] == guided
    assert plan.guided == any(guided)

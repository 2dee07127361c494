"""Plans: what they derive is arithmetic, and what they refuse is said in the user's words."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.plan import PRESETS, CachePlan, CacheShape, SamplePlan
from linear_core.policies import POLICIES, SCALE_POLICIES, get_policy

SQUARE = Grid(24, 24)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"budget": 0}, "budget: 0"),
        ({"budget": -3}, "budget: -3"),
        ({"anchors": -1}, "anchors: -1"),
        ({"recent": -1}, "recent: -1"),
        ({"release": "soon"}, "release: 'soon'.*strict, lazy"),
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


def test_protected_tokens_must_fit_the_budget():
    """Exactly full is allowed, one token more is not, and the message has all four numbers."""
    grid = Grid(6, 5)
    CachePlan(budget=2, anchors=5, recent=1).check(grid)
    with pytest.raises(UserError, match="2 lines hold 10 tokens, but 6 anchors and 1 recent lines protect 11"):
        CachePlan(budget=2, anchors=6, recent=1).check(grid)
    with pytest.raises(UserError, match="budget"):
        CachePlan(budget=1, anchors=1, recent=1).check(Grid(6, 5, eol=1))


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

"""HACK: heads whose queries all attend alike keep few tokens, structured heads keep many.

Paper: Qin et al., "Head-Aware KV Cache Compression for Efficient Visual Autoregressive Modeling", arXiv 2504.09261; no
code was found. Contextual are the half of all layers' heads whose attention varies least over queries, the others
structural. The paper classifies once, on samples: so the profile says, or without one, and always for lines, a survey
when the cache first overflows. Where the paper parts the heads we do not know; half is our reading.
Score over scales, as published: attention received so far in contextual heads; in structural heads the newest scale's
attention, and the newest scale itself comes first, as far as it fits. The first two scales are the plan's anchors.
Score over lines, adapted: attention received divided by age (`h2o`) in contextual heads, the line's (`line`) in
structural ones; the first and the newest scales are the anchors and the recent lines.
Budgets: a structural head keeps 5 times as much as a contextual one, after the paper's finding that these bear 90 %
compression and those 50 %. Its last step, merging victims, is left to the release: into which token is not known.
Reads: queries, mass.

It does not carry over well to lines: in a raster the structured heads are the local ones, which need little. With the
two budgets swapped the bundled model stays closer to the full cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from ..profile import Profile
from ..pyramid import Pyramid
from .allocate import allocate_layers
from .h2o import h2o
from .line import line
from .policy import Policy

STRUCTURAL = 5.0


def variance(view: View) -> Tensor:
    """How much a head's attention depends on the query: variance over queries, summed over tokens, L B H.

    Tokens of the finished line are left out, because its first queries cannot see them. A scale's see all of it.
    """
    older = view.candidates()
    if not isinstance(view.grid, Pyramid):
        older = older & (view.index < view.first_of(0))
    return (view.attention(lambda p: p.var(2, correction=0)) * older).sum(-1)


def contextual(view: View) -> Tensor:
    """The half of all layers' heads whose attention varies least: bool layers B H."""
    assert view.survey is not None
    return view.survey <= view.survey.transpose(0, 1).flatten(1).median(-1).values[:, None]


def score(view: View) -> Tensor:
    is_contextual = view.own(contextual(view))
    if isinstance(view.grid, Pyramid):
        assert view.mass is not None
        return torch.where(is_contextual[..., None], view.mass, line(view) + 2 * (view.index >= view.first_of(0)))
    return torch.where(is_contextual[..., None], h2o(view), line(view))


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    return allocate_layers(torch.where(contextual(view), 1.0, STRUCTURAL), view, plan)


def calibrated(profile: Profile, pyramid: Pyramid) -> Tensor:
    return profile.variance


hack = Policy(score, frozenset({"queries", "mass"}), keep, variance, profile=calibrated)

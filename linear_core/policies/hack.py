"""HACK, adapted to raster lines: heads whose queries all attend alike keep few tokens, structured heads keep many.

Paper: Qin et al., "Head-Aware KV Cache Compression for Efficient Visual Autoregressive Modeling", arXiv 2504.09261.
Score: attention received so far (`h2o`) in contextual heads, the line's attention (`line`) in structural heads.
Contextual are the half of all layers' heads whose attention varies least over queries. The paper classifies once, on
samples; here the first lines decide. The paper works on scales: the first and the newest scales, which structural heads
always keep, are the anchors and the recent lines here.
Budgets: a structural head keeps 5 times as much as a contextual one, after the paper's finding that these bear 90 %
compression and those 50 %. Its last step, merging victims, is left to the release. Reads: queries, mass.

It does not carry over well: in a raster the structured heads are the local ones, which need little. With the two
budgets swapped the bundled model stays closer to the full cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from .allocate import allocate_layers
from .h2o import h2o
from .line import line
from .policy import Policy

STRUCTURAL = 5.0


def variance(view: View) -> Tensor:
    """How much a head's attention depends on the query: variance over queries, summed over tokens, L B H.

    Tokens of the finished line are left out, because its first queries cannot see them.
    """
    older = view.candidates() & (view.index < view.first_of(0))
    return (view.attention(lambda p: p.var(2, correction=0)) * older).sum(-1)


def contextual(view: View) -> Tensor:
    """The half of all layers' heads whose attention varies least: bool layers B H."""
    assert view.survey is not None
    return view.survey <= view.survey.transpose(0, 1).flatten(1).median(-1).values[:, None]


def score(view: View) -> Tensor:
    is_contextual = view.own(contextual(view))
    return torch.where(is_contextual[..., None], h2o(view), line(view))


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    return allocate_layers(torch.where(contextual(view), 1.0, STRUCTURAL), view, plan)


hack = Policy(score, frozenset({"queries", "mass"}), keep, variance)

"""HeatKV: whole scales of single heads go, in an order known beforehand; most heads hold little more than the first.

Paper: "HeatKV", arXiv 2605.14877; code github.com/arm-research/heatkv (MIT).
Score: 1 for a scale that the head keeps, 0 for one that it has lost. For each scale after the protected ones, heads of
all layers are ranked by how much later scales attend to it (S-CAS: mean over later scales of the attention that their
queries pay to the scale's tokens), and so many lose it, from the least on, that all heads together are within the
budget: the same number for every scale, and more at each scale drawn. Read from the profile: then nothing is scored
while drawing.
Silent points, and what is ours: without a profile the last scale before the first overflow tells, for scales not drawn
yet by a head's mean over those that are. Layers settle one after the other while a scale is drawn, so the sum may be
above the budget until the last one has (their "strict" order is not done). For scales only. Reads: queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from ..profile import Profile
from ..pyramid import Pyramid
from .policy import Policy
from .scale_sums import mass_by_scale, scale_of


def attention_to_scales(view: View) -> Tensor:
    """S-CAS as far as one scale tells: L B H scales."""
    mass, row = mass_by_scale(view), int(view.row)
    known = mass[..., :row] if row else mass[..., :1]
    guess = known.mean(-1, keepdim=True).expand(*known.shape[:-1], mass.shape[-1] - known.shape[-1])
    return torch.cat([known, guess], -1)


def calibrated(profile: Profile, pyramid: Pyramid) -> Tensor:
    """S-CAS: L H scales."""
    mass = profile.mass[..., : pyramid.stages, : pyramid.stages].tril(-1)
    later = torch.arange(pyramid.stages - 1, -1, -1).clamp(min=1)  # scales after each one
    return mass.sum(-2) / later


def survives(view: View) -> Tensor:
    """Which scales each head keeps after the one that has just been drawn: bool layers B H scales."""
    assert view.survey is not None and isinstance(view.grid, Pyramid)
    layers, heads = view.survey.shape[0], view.survey.shape[2]
    drawn, count = int(view.newest) + 1, layers * heads
    lost = -(-count * max(drawn - view.keeps, 0) // max(drawn - view.protected, 1))
    pooled = view.survey.transpose(0, 1).flatten(1, 2)
    rank = pooled.argsort(dim=1, stable=True).argsort(dim=1)
    return (rank >= lost).unflatten(1, (layers, heads)).transpose(0, 1)


def score(view: View) -> Tensor:
    assert isinstance(view.grid, Pyramid)
    own = view.own(survives(view))
    return own.gather(-1, scale_of(view).clamp(min=0)).float()


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert isinstance(view.grid, Pyramid)
    own = view.own(survives(view))
    sizes = [view.grid.size(scale) for scale in range(view.grid.stages)]
    free = [
        size if view.grid.index(scale) >= view.protected and scale <= view.row else 0
        for scale, size in enumerate(sizes)
    ]
    return view.protected + (own * torch.tensor(free, device=own.device)).sum(-1)


heatkv = Policy(
    score,
    frozenset({"queries"}),
    keep,
    attention_to_scales,
    profile=calibrated,
)

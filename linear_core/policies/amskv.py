"""AMS-KV: the first scales and the nearest ones stay whole; layers whose values change from scale to scale keep more.

Paper: "AMS-KV", arXiv 2511.16047 (AAAI 2026), of which there is no code: attention sits on the first scales
("condensed") and on the nearest ("local"), and layers in which scales are little alike demand more cache.
Score: the scale, newest first; within a scale, the attention of the newest (`line`). So local scales stay as whole as
the budget allows, and of the one that fits in part its most attended tokens. The plan's anchors are the condensed ones.
Budgets: layers in proportion to 1 less the cosine of the values of each place and of the scale before there (shrunk by
area). How many scales are local, this measure and the proportion are our reading. Read from the profile; without one,
from the last two scales before the first overflow. For scales only. Reads: queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.look_ahead import upcast
from ..cache.view import View
from ..plan import CachePlan
from ..profile import Profile
from ..pyramid import Pyramid
from .allocate import allocate_layers
from .line import line
from .policy import Policy
from .scale_sums import scale_of


def demand(view: View) -> Tensor:
    """How little alike the newest scale's values are to those before it, the same for each head: L B H."""
    assert isinstance(view.grid, Pyramid)
    row, grid = int(view.row), view.grid
    if row < 1 or view.index.shape[-1] < grid.index(row + 1):  # there is none before it, or tokens were left out
        return torch.ones(view.index.shape[:3], device=view.index.device)
    first, middle, end = (grid.index(row + n) for n in (-1, 0, 1))
    values = upcast(view.values).transpose(-1, -2).flatten(2, 3)  # tokens are still in order
    earlier, own = values[..., first:middle], values[..., middle:end]
    own = F.interpolate(own.flatten(0, 1).unflatten(-1, grid.sides[row]), size=grid.sides[row - 1], mode="area")
    alike = F.cosine_similarity(own.flatten(2), earlier.flatten(0, 1), dim=1).mean(-1)
    return (1 - alike).view(*view.index.shape[:2], 1).expand(view.index.shape[:3])


def calibrated(profile: Profile, pyramid: Pyramid) -> Tensor:
    return (1 - profile.similarity[:, 1:].mean(-1, keepdim=True)).expand(profile.variance.shape)


def score(view: View) -> Tensor:
    return scale_of(view) + 0.5 * line(view)


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    return allocate_layers(view.survey, view, plan)


amskv = Policy(score, frozenset({"queries"}), keep, demand, profile=calibrated)

"""ScaleKV: layers that look over all earlier scales, the drafters, keep nearly everything; the refiners keep little.

Paper: "ScaleKV", arXiv 2505.19602 (NeurIPS 2025); code github.com/StargazerX0/ScaleKV (MIT).
Score, as in the code: products q k with 16 observers, summed without a softmax, and of five neighbours in the order of
the sequence the largest. The observers are the centres of a 4 x 4 division of the newest scale, its last 16 tokens if
it has fewer than 4 rows or columns; they are kept. The code's queries come before normalisation and rotation; here they
are the model's own, the nearest to those centres of the queries that are looked at.
Budgets: a drafter keeps all that was drawn so far, and refiners share the rest of all layers' budget, but keep at least
a third of their mean: that is what the published tables for Infinity amount to (8B: 200 of 650 at the least).
Drafters are the sixteenth of the layers whose attention goes to earlier scales most, at least one (published: 2 of 32
layers, 3 of 40). The paper's index of attention selectivity is not in the code; this share is our reading of it, from
the profile or, without one, from the last scale before the first overflow. For scales only. Reads: queries.
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
from .policy import Policy
from .scale_sums import mass_by_scale

WINDOW = 4  # observers along each side
KERNEL = 5
DRAFTERS = 16  # one layer in so many
LEAST = 3  # a refiner keeps at least this part of the mean


def attention_to_earlier(view: View) -> Tensor:
    """Share of attention that goes to earlier scales: L B H."""
    return mass_by_scale(view)[..., : int(view.row)].sum(-1)


def calibrated(profile: Profile, pyramid: Pyramid) -> Tensor:
    return profile.earlier


def observers(view: View) -> tuple[Tensor, Tensor]:
    """Which of the view's queries observe, and the indices of their tokens."""
    assert view.queries is not None and isinstance(view.grid, Pyramid)
    rows, cols = view.grid.sides[int(view.row)]
    looks, device = view.queries.shape[3], view.queries.device
    places = torch.arange(looks, device=device) * (rows * cols) // looks
    if min(rows, cols) < WINDOW:
        chosen = torch.arange(max(looks - WINDOW**2, 0), looks, device=device)
    else:
        steps = torch.arange(WINDOW, device=device)
        row, col = (steps * (side // WINDOW) + (side // WINDOW - 1) // 2 for side in (rows, cols))
        centres = torch.stack(torch.meshgrid(row, col, indexing="ij"), -1).view(-1, 1, 2)
        distance = (centres - torch.stack([places // cols, places % cols], -1)).square().sum(-1)
        chosen = distance.argmin(-1).unique()
    return chosen, view.grid.index(int(view.row)) + places[chosen]


def score(view: View) -> Tensor:
    assert view.queries is not None
    chosen, tokens = observers(view)
    products = (upcast(view.queries[:, :, :, chosen]).sum(3, keepdim=True) @ upcast(view.keys).transpose(-1, -2))[
        ..., 0, :
    ]
    lowest = products.masked_fill(~view.candidates(), float("inf")).amin(-1, keepdim=True)
    products = torch.where(view.candidates(), products, lowest)  # an empty slot is nobody's neighbour

    def pool(x: Tensor) -> Tensor:
        return F.max_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    pooled = view.by_index(products, pool)
    observing = (view.index[..., None] == tokens).any(-1)
    return pooled + observing * (pooled.amax(-1, keepdim=True) - lowest + 1)


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    layers, budget, drawn = len(view.survey), view.keeps, int(view.newest) + 1
    drafters = max(1, round(layers / DRAFTERS))
    if drafters == layers:
        return view.survey.new_full(view.index.shape[:3], budget, dtype=torch.int64)
    least = max(-(-budget // LEAST), min(view.protected, budget))
    draft = min(drawn, (layers * budget - (layers - drafters) * least) // drafters)
    refine = (layers * budget - drafters * draft) // (layers - drafters)
    looks_back = view.survey.mean(-1)  # layers B
    rank = looks_back.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    counts = torch.where(rank < drafters, draft, min(refine, drawn))
    return view.own(counts[..., None].expand_as(view.survey)).expand(view.index.shape[:3])


scalekv = Policy(score, frozenset({"queries"}), keep, attention_to_earlier, profile=calibrated)

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.look_ahead import extreme, gather_vectors, least_squares
from ..cache.view import View
from ..pyramid import Pyramid
from .rank import sortable

CANDIDATES = 2  # times as many tokens as are released may be victims, and as many more as are protected


def fold(view: View) -> Tensor:
    """The policy made for folding: release the token that a more important one can replace at the least cost.

    Our own, not in the paper; near Ward's criterion of hierarchical clustering with importance as mass (J. H. Ward,
    "Hierarchical grouping to optimize an objective function", 1963).
    Score: the token's importance (`View.importance`) times the least squared distance (`View.points`) to a more
    important image token. Only to a more important one, because one of two near tokens has to stay; in a tie the older
    counts as more important. Only the less important half is compared, and at least twice as many as are released. The
    others score above all of them, in order of importance. Reads: ahead. Defaults: 4 anchors, 1 recent line, release
    "fold".

    Over scales the heads of a layer share one budget (`adakv`), so costs are compared across heads: distances count as
    what they change in scores, by the length of the queries.
    """
    image, importance = view.candidates(), view.importance()
    slots, most = importance.shape[-1], torch.finfo(torch.float32).max
    count = min(max(CANDIDATES * view.released + view.protected, (slots - view.prompt_slots) // 2), slots)
    # Sorted from the least important token on, so that a token may only fold into those behind it. Slots that hold no
    # image token come last, and nothing folds into them.
    order = sortable(importance.masked_fill(~image, float("inf")), -view.index).argsort(dim=-1)
    points, squares = view.points
    points, squares = gather_vectors(points, order), squares.masked_fill(~image, float("inf")).gather(-1, order)
    distance = least_squares(points, points[..., :count, :], squares)
    distance[..., :count, :] += torch.full((count, count), float("inf"), device=points.device).triu().to(points.dtype)
    least = extreme(distance)
    least = (least + squares[..., :count]).clamp(min=0.0)
    cost = least * importance.gather(-1, order[..., :count]).clamp(min=torch.finfo(least.dtype).tiny)
    if isinstance(view.grid, Pyramid):
        cost = cost * view.look_ahead().queries.square().sum(-1).mean(-1)[..., None]
    others = torch.arange(count, slots, device=points.device, dtype=points.dtype) * (most / slots)
    return torch.empty_like(importance).scatter_(
        -1, order, torch.cat([cost.clamp(max=most), others.expand_as(order[..., count:])], -1)
    )

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.look_ahead import gather_vectors, upcast
from ..cache.view import View
from ..pyramid import Pyramid


def fold(view: View) -> Tensor:
    """The policy made for folding: release the token that a more important one can replace at the least cost.

    Our own, not in the paper: Ward's criterion of hierarchical clustering with importance as mass (J. H. Ward,
    "Hierarchical grouping to optimize an objective function", 1963).
    Score: the minimum over all more important image tokens of a b / (a + b) times the squared distance of the keys,
    where a and b are the importance of the two (`View.importance`): the variance of keys within a slot that merging the
    pair would add. Only into a more important token, because one of two near tokens has to stay; in a tie the older
    counts as more important. Reads: ahead. Defaults: 4 anchors, 1 recent line, release "fold".

    Over scales the heads of a layer share one budget (`adakv`), so costs are compared across heads: distances count as
    what they change in scores, by the length of the queries.
    """
    # Sorted by importance, so that a token may only fold into those before it; image tokens come before all others.
    importance = view.importance().masked_fill(~view.candidates(), 0.0)
    oldest = view.index.argsort(dim=-1, stable=True)
    order = oldest.gather(-1, importance.gather(-1, oldest).argsort(dim=-1, descending=True, stable=True))
    limits = torch.finfo(importance.dtype)
    inverse = 1 / importance.gather(-1, order).clamp(min=limits.tiny)  # a b / (a + b) = 1 / (1/a + 1/b)
    keys = upcast(gather_vectors(view.keys, order))
    keys = keys - keys.mean(-2, keepdim=True)  # distances from products are more exact for shorter vectors
    square, slots = keys.square().sum(-1), order.shape[-1]
    less_important = torch.full((slots, slots), float("inf"), device=keys.device, dtype=keys.dtype).triu()
    cost = (keys @ keys.transpose(-1, -2)).mul_(-2).add_(square[..., :, None]).add_(square[..., None, :])
    cost = cost.add_(less_important).div_(inverse[..., :, None] + inverse[..., None, :]).amin(-1)
    cost = cost.clamp(0.0, limits.max)  # the maximum goes to the most important token
    cost = torch.empty_like(cost).scatter_(-1, order, cost)
    if isinstance(view.grid, Pyramid):
        cost = cost * view.look_ahead().queries.square().sum(-1).mean(-1)[..., None]
    return cost

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.look_ahead import gather_vectors, upcast
from ..cache.view import View


def fold(view: View) -> Tensor:
    """The policy made for folding: let go what a stronger token can stand in for at the least cost.

    Our own, beyond the paper; Ward's rule of hierarchical clustering with attention for mass (J. H. Ward, "Hierarchical
    grouping to optimize an objective function", 1963).
    Score: the least over all stronger image tokens of a b / (a + b) times the squared distance of the keys, where a and
    b say how much each counts for the coming lines (`View.strength`): what merging the pair would add to the spread of
    keys within a slot. Only into a stronger one, as of two near tokens one has to stay; of equals the older.
    Reads: ahead. Defaults: 4 anchors, 1 recent line, release "fold".
    """
    # Strongest first, so that the stronger ones of a slot are those before it, and the image before everything else.
    importance = view.importance().masked_fill(~view.candidates(), 0.0)
    oldest = view.index.argsort(dim=-1, stable=True)
    order = oldest.gather(-1, importance.gather(-1, oldest).argsort(dim=-1, descending=True, stable=True))
    limits = torch.finfo(importance.dtype)
    spread = 1 / importance.gather(-1, order).clamp(min=limits.tiny)  # a b / (a + b) = 1 / (1/a + 1/b)
    keys = upcast(gather_vectors(view.keys, order))
    keys = keys - keys.mean(-2, keepdim=True)  # a distance by products is the more exact the shorter the vectors are
    square, slots = keys.square().sum(-1), order.shape[-1]
    weaker = torch.full((slots, slots), float("inf"), device=keys.device, dtype=keys.dtype).triu()
    cost = (keys @ keys.transpose(-1, -2)).mul_(-2).add_(square[..., :, None]).add_(square[..., None, :])
    cost = cost.add_(weaker).div_(spread[..., :, None] + spread[..., None, :]).amin(-1)
    cost = cost.clamp(0.0, limits.max)  # at most: the strongest of all
    return torch.empty_like(cost).scatter_(-1, order, cost)

from __future__ import annotations

import torch
from torch import Tensor

from ..view import View


def fold(view: View) -> Tensor:
    """The policy made for folding: let go what another slot can stand in for at the least cost.

    Our own, beyond the paper; Ward's rule of hierarchical clustering with attention for mass (J. H. Ward, "Hierarchical
    grouping to optimize an objective function", 1963).
    Score: the least over all other image tokens of a b / (a + b) times the squared distance of the keys, where a and b
    say how much each counts for the coming lines (`View.strength`). That is what merging the pair would add to the
    spread of keys within a slot. Reads: ahead. Defaults: 4 anchors, 1 recent line, release "fold".
    """
    there = view.candidates()
    strength = view.strength()
    keys = view.keys.float()
    scores = []
    for layer in range(len(keys)):
        one, other = strength[layer, ..., :, None], strength[layer, ..., None, :]
        cost = one * other / (one + other).clamp(min=1e-30) * torch.cdist(keys[layer], keys[layer]).square()
        cost.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
        scores.append(cost.masked_fill(~there[layer, ..., None, :], float("inf")).amin(-1))
    return torch.stack(scores)

from __future__ import annotations

import torch
from torch import Tensor

from ..outlook import distances, wide
from ..view import View


def fold(view: View) -> Tensor:
    """The policy made for folding: let go what a stronger token can stand in for at the least cost.

    Our own, beyond the paper; Ward's rule of hierarchical clustering with attention for mass (J. H. Ward, "Hierarchical
    grouping to optimize an objective function", 1963).
    Score: the least over all stronger image tokens of a b / (a + b) times the squared distance of the keys, where a and
    b say how much each counts for the coming lines (`View.strength`): what merging the pair would add to the spread of
    keys within a slot. Only into a stronger one, as of two near tokens one has to stay; of equals the older.
    Reads: ahead. Defaults: 4 anchors, 1 recent line, release "fold".
    """
    strength, keys = view.strength(), wide(view.keys)
    one, other = strength[..., :, None], strength[..., None, :]
    index, of_other = view.index[..., :, None], view.index[..., None, :]
    stronger = (other > one) | ((other == one) & (of_other < index))
    cost = one * other / (one + other).clamp(min=1e-30) * distances(keys, keys).square()
    cost = cost.masked_fill(~(stronger & view.candidates()[..., None, :]), float("inf")).amin(-1)
    return cost.clamp(max=torch.finfo(cost.dtype).max)  # the strongest of all

from __future__ import annotations

import torch
from torch import Tensor


def sortable(scores: Tensor, tie: Tensor) -> Tensor:
    """int64 numbers in the order of `scores`, read as float32; where they are equal, in that of `tie` int32.

    One sort of these takes the place of two stable ones.
    """
    bits = (scores.float() + 0.0).view(torch.int32)  # which makes 0 of -0; positive floats sort like their bits
    return ((bits ^ (bits >> 31 & 0x7FFFFFFF)).long() << 32) + tie


def rank(scores: Tensor, index: Tensor, group: Tensor | None = None) -> Tensor:
    """Rank of each slot within its group, 0 for the highest score: int64 ... S. In a tie the newest token comes first.

    scores, index, group  ... S; without `group` all slots are one group
    """
    order = sortable(scores, index).argsort(dim=-1, descending=True)
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    if group is not None:
        order = order.gather(-1, group.gather(-1, order).argsort(dim=-1, stable=True))
        sorted_group = group.gather(-1, order)
        first = ranks.masked_fill(sorted_group == sorted_group.roll(1, dims=-1), 0)  # where each group begins
        ranks = ranks - first.cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, ranks)

from __future__ import annotations

import torch
from torch import Tensor


def rank(scores: Tensor, index: Tensor, group: Tensor | None = None) -> Tensor:
    """Place of each slot among those of its group, 0 for the greatest score: int64 ... S. Of equals the newest leads.

    scores, index, group  ... S; without groups all are one
    """
    order = index.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    place = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    if group is not None:
        order = order.gather(-1, group.gather(-1, order).argsort(dim=-1, stable=True))
        named = group.gather(-1, order)
        first = place.masked_fill(named == named.roll(1, dims=-1), 0)  # where a group begins; 0 begins the first
        place = place - first.cummax(-1).values
    return torch.empty_like(order).scatter_(-1, order, place)

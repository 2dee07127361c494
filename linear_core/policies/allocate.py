"""Who gets how much of a budget. Whole tokens, within what each may have, and not one token more in total."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import HEADROOM, CachePlan

STEPS = 60
LEAST = 1e-4  # of the mean weight: nobody weighs nothing


def allocate(weights: Tensor, held: Tensor | int, view: View, plan: CachePlan) -> Tensor:
    """Image tokens that each of N heads keeps, in proportion to `weights` ... N: int64 ... N, budget tokens on average.

    held  ... N or a number, tokens that there are to keep

    Nobody gets less than what is protected, more than there is, or more than HEADROOM times the budget; who cannot
    take more, or less, leaves the rest to the others in proportion.
    """
    low = plan.anchors + plan.recent * view.grid.stride
    budget = plan.budget * view.grid.stride
    high = (torch.zeros_like(weights, dtype=torch.int64) + held).clamp(max=HEADROOM * budget)
    total = weights.shape[-1] * budget
    weights = weights.float()
    weights = (weights / weights.mean(-1, keepdim=True).clamp(min=1e-30)).clamp(min=LEAST)
    less = weights.new_zeros(*weights.shape[:-1], 1)
    more = torch.full_like(less, HEADROOM * budget / LEAST)
    for _ in range(STEPS):
        middle = (less + more) / 2
        short = (weights * middle).clamp(min=low).minimum(high).sum(-1, keepdim=True) < total
        less, more = torch.where(short, middle, less), torch.where(short, more, middle)
    exact = (weights * more).clamp(min=low).minimum(high)
    whole = exact.floor()
    # What rounding down has left goes to the largest remainders, the first among equals.
    remainder = (exact - whole).masked_fill(whole >= high, -1.0)
    place = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (whole + (place < total - whole.sum(-1, keepdim=True))).long()


def allocate_layers(weights: Tensor, view: View, plan: CachePlan) -> Tensor:
    """The same over all layers' heads, `weights` layers B H; returns the part of the layers shown, L B H.

    A head that could take more than there is yet is full and stays so; what it cannot take the others may have until
    the picture has grown. So the budget is used from the first line on.
    """
    layers, _, heads = weights.shape
    keep = allocate(weights.transpose(0, 1).flatten(1), (view.row + 1) * view.grid.stride, view, plan)
    return keep.unflatten(-1, (layers, heads)).transpose(0, 1)[view.layer :][: len(view.index)]

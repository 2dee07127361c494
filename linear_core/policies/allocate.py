"""Allocation of a budget to heads: whole tokens, within each head's limits, and no token more than the total."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import HEADROOM, CachePlan
from ..pyramid import Pyramid

STEPS = 60  # of bisection
MIN_WEIGHT = 1e-4  # of the mean weight, so that no weight is zero


def bounds(view: View, plan: CachePlan) -> tuple[int, int]:
    """Image tokens that every head keeps at least, the protected ones, and on average, the budget.

    Over scales at least one: into nothing, nothing folds.
    """
    if isinstance(view.grid, Pyramid):
        return max(plan.protected(view.grid), 1), view.keeps
    return plan.anchors + plan.recent * view.grid.stride, plan.budget * view.grid.stride


def allocate(weights: Tensor, held: Tensor | int, view: View, plan: CachePlan, headroom: int = HEADROOM) -> Tensor:
    """Image tokens that each of N heads keeps, in proportion to `weights` ... N: int64 ... N, the budget on average.

    held  int or ... N, tokens that each head has

    No head gets fewer than the protected tokens, more than it has, or more than `headroom` times the budget. What a
    head at its limit cannot take or give up is spread over the others in proportion.
    """
    low, budget = bounds(view, plan)
    high = (torch.zeros_like(weights, dtype=torch.int64) + held).clamp(max=headroom * budget)
    total = weights.shape[-1] * budget
    weights = weights.float()
    weights = (weights / weights.mean(-1, keepdim=True).clamp(min=1e-30)).clamp(min=MIN_WEIGHT)
    lower = weights.new_zeros(*weights.shape[:-1], 1)
    upper = torch.full_like(lower, headroom * budget / MIN_WEIGHT)
    for _ in range(STEPS):
        middle = (lower + upper) / 2
        short = (weights * middle).clamp(min=low).minimum(high).sum(-1, keepdim=True) < total
        lower, upper = torch.where(short, middle, lower), torch.where(short, upper, middle)
    exact = (weights * upper).clamp(min=low).minimum(high)
    counts = exact.floor()
    # The tokens left by rounding down go to the largest remainders, the first in a tie.
    remainder = (exact - counts).masked_fill(counts >= high, -1.0)
    rank = remainder.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (counts + (rank < total - counts.sum(-1, keepdim=True))).long()


def allocate_layers(weights: Tensor, view: View, plan: CachePlan) -> Tensor:
    """`allocate` over the heads of all layers: `weights` layers B H -> int64 L B H for the layers in the view.

    Early in the picture, a head that could take more than there is keeps all it has, and the others get the rest until
    the picture has grown. So the whole budget is used from the first line on.
    """
    layers, _, heads = weights.shape
    keep = allocate(weights.transpose(0, 1).flatten(1), view.newest + 1 - view.grid.prompt, view, plan)
    return keep.unflatten(-1, (layers, heads)).transpose(0, 1)[view.layer :][: len(view.index)]

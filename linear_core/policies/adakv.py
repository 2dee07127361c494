from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import HEADROOM, CachePlan
from ..pyramid import Pyramid
from .allocate import allocate, bounds
from .choose import protect
from .policy import Policy

FLOOR = 0.2
WIDE = 4  # times the budget that a head may keep over scales, where heads of unequal room take no more for it


def adakv(policy: Policy, floor: float = FLOOR) -> Policy:
    """Ada-KV: the heads of a layer share one budget. Wraps a policy whose scores are comparable across heads.

    floor  part of the budget that every head keeps

    Paper: Feng et al., "Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation", arXiv 2407.11550.
    Score: the policy's own.
    Budgets: a layer keeps its best tokens, whichever head they belong to; `floor` of the budget, a fifth, is spread
    evenly first (the paper's safeguard). Recomputed at every line; protected tokens come first. Reads: what the policy
    reads.
    """
    return replace(policy, keep=partial(keep, floor=floor))


def keep(view: View, scores: Tensor, plan: CachePlan, *, floor: float) -> Tensor:
    _, budget = bounds(view, plan)
    in_scales = isinstance(view.grid, Pyramid)
    recent, headroom = (0, WIDE) if in_scales else (plan.recent, HEADROOM)
    scores = protect(scores, view.index, view, plan.protected(view.grid), recent)
    scores = scores.masked_fill(~view.candidates(), float("-inf"))
    heads, slots = scores.shape[-2:]
    best = scores.flatten(-2).argsort(dim=-1, descending=True, stable=True)[..., : heads * budget]
    head = best // slots
    counts = scores.new_zeros(scores.shape[:-1]).scatter_add_(-1, head, torch.ones_like(head, dtype=scores.dtype))
    return allocate((1 - floor) * counts + floor * budget, view.candidates().sum(-1), view, plan, headroom)

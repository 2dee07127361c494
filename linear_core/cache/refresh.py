"""Which slots a step of a masked model computes again, besides those drawn last and those to be drawn.

MARché (arXiv 2506.12035) recomputes what the newly drawn tokens attend to. Its abstract is all that could be read, and
no code is public. So this much is ours: attention is the mean over the decoder's layers, its heads and both halves of
guidance; the queries are those with which the tokens were drawn, since that pass is there anyway; both halves recompute
the same slots; copies of the class are candidates like any other. The other rules are controls that an attention score
has to beat, and LazyMAR's (arXiv 2503.12450).

    attention        the most attended by the tokens drawn last (MARché)
    attention x age  the same times the steps since a slot was computed
    oldest           the longest not computed; of equal age, by lot
    nearest          the nearest in the picture to the tokens drawn last, of equal distance by lot; copies of the class
                     come on top
    random           by lot
    values           those whose values moved most in the decoder's fourth layer, up to which all slots are computed
                     (LazyMAR, whose release drops the unconditional half in such steps and caches the head as well;
                     ours does neither)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..steps import StepCachePlan
from .step_cache import StepCache

LOOKS = frozenset({"attention", "attention x age"})  # rules that read attention


def scores(plan: StepCachePlan, cache: StepCache, new: slice, places: Tensor, lot: Tensor) -> Tensor:
    """How much each slot deserves to be computed again: float32 B S, higher first.

    new     slots of the tokens drawn last
    places  row and column of each token, in the order of drawing: B N 2
    lot     numbers in 0..1 drawn by lot: B S
    """
    copies = lot.shape[1] - places.shape[1]
    if plan.rule == "oldest":
        return cache.age + lot
    if plan.rule == "random":
        return lot
    if plan.rule == "nearest":
        tokens = places.float()
        distance = torch.cdist(tokens, tokens[:, new.start - copies : new.stop - copies]).amin(-1)
        return torch.cat([torch.full_like(lot[:, :copies], float("inf")), lot[:, copies:] / 1000 - distance], 1)
    assert cache.mass is not None, plan.rule
    return cache.mass * (cache.age + 1) if plan.rule == "attention x age" else cache.mass


def chosen(score: Tensor, count: int, taken: slice) -> Tensor:
    """The `count` slots of the highest score B S that are not `taken` anyway: int64 B count, in ascending order."""
    score = score.clone()
    score[:, taken] = float("-inf")
    return score.topk(count, dim=-1).indices.sort(-1).values

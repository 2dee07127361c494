"""CAKE: scores by mean and variance of the line's attention; layers share the budget by their preference.

Paper: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491.
Score: mean + 200 times the variance of a token's attention over the observed queries, mean-pooled with kernel 5 by
index; the prompt is left out of the pooling. The paper observes the last 32 queries; here they are the finished line's,
possibly only one: hence the population variance.
Budgets: layers in proportion to the entropy of their attention times its variance over queries. The paper tunes the
exponents for each language model; both are 1 here. Measured when the cache first overflows; the paper does it at the
end of a prompt. Reads: queries.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from .allocate import allocate_layers
from .policy import Policy

GAMMA = 200.0
KERNEL = 5


def score(view: View) -> Tensor:
    scores = view.attention(lambda p: p.mean(2) + GAMMA * p.var(2, correction=0)).masked_fill(~view.candidates(), 0.0)

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    return view.by_index(scores, pool)


def preference(view: View) -> Tensor:
    """The layer's preference, the same for each of its heads: L B H."""
    candidates = view.candidates()
    entropy = view.attention(lambda p: torch.special.entr(p).sum(2)) * candidates
    variance = view.attention(lambda p: p.var(2, correction=0)) * candidates
    preference = entropy.sum((-2, -1)) * variance.sum((-2, -1))
    return preference[..., None].expand(view.index.shape[:3])


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    return allocate_layers(view.survey, view, plan)


cake = Policy(score, frozenset({"queries"}), keep, preference)

"""CAKE: what the line attended to and what its queries disagreed about; layers by their worth.

Paper: Qin et al., "CAKE: Cascading and Adaptive KV Cache Eviction with Layer Preferences", arXiv 2503.12491.
Score: mean + 200 times the variance of a token's attention over the observed queries, mean-pooled with kernel 5 by
index; the prompt lends its neighbours nothing. The paper observes the last 32 queries; here they are the finished
line's, of which there may be one: hence the population's variance.
Budgets: layers in proportion to the entropy of their attention times its variance over queries. The paper's exponents
are tuned for each language model; both are 1 here. Measured when the cache first overflows, where the paper has the
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
    """What a layer is worth, the same for each of its heads: L B H."""
    there = view.candidates()
    entropy = view.attention(lambda p: torch.special.entr(p).sum(2)) * there
    variance = view.attention(lambda p: p.var(2, correction=0)) * there
    worth = entropy.sum((-2, -1)) * variance.sum((-2, -1))
    return worth[..., None].expand(view.index.shape[:3])


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    return allocate_layers(view.survey, view, plan)


cake = Policy(score, frozenset({"queries"}), keep, preference)

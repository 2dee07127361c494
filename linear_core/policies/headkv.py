"""HeadKV: within a layer, heads that look far keep many tokens and local heads keep few.

Paper: Liang et al., "HeadKV", arXiv 2605.20600, of which we know the abstract: heads are classified online, on early
tokens, and eviction is stratified. Not the HeadKV of language models.
Score: `stratified` around `line`.
Budgets: in proportion to `attention_distance` when the cache first overflows; a fifth is spread evenly. Proportions
instead of two classes are our reading. Reads: queries.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from .allocate import allocate
from .attention_distance import attention_distance
from .line import line
from .policy import Policy
from .stratified import stratified

FLOOR = 0.2


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    weights = view.own(view.survey)
    weights = (1 - FLOOR) * weights / weights.mean(-1, keepdim=True).clamp(min=1e-30) + FLOOR
    return allocate(weights, view.candidates().sum(-1), view, plan)


headkv = replace(stratified(Policy(line, frozenset({"queries"}))), keep=keep, survey=attention_distance)

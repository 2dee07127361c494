from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ..cache.look_ahead import upcast
from ..cache.view import View
from .policy import Policy
from .rank import rank

FIRST = 0.5
EPSILON = 1e-4


def criticalkv(policy: Policy) -> Policy:
    """CriticalKV around a policy that scores by attention: half by its score, half by what the output would lose.

    Paper: Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", arXiv
    2502.03805.
    Score: the best half of the budget by the policy's own score come first; the others are ranked by (score + 1e-4)
    times the value's size. The paper takes the L1 norm of the value behind the output projection, which a policy does
    not see: here it is the value's own length. Reads: what the policy reads.
    """

    def score(view: View) -> Tensor:
        there = view.candidates()
        scores = policy.score(view).float()
        budget = there.sum(-1, keepdim=True) - view.grid.stride  # a line has to leave
        first = rank(scores.masked_fill(~there, float("-inf")), view.index) < FIRST * budget
        worth = ((scores + EPSILON) * upcast(view.values).norm(dim=-1).float()).masked_fill(~there, 0.0)
        return worth + first * (worth.amax(-1, keepdim=True) + 1)

    return replace(policy, score=score)

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
    """CriticalKV: half of the budget by score, half by the effect on the attention output. Wraps an attention score.

    Paper: Feng et al., "Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective", arXiv
    2502.03805.
    Score: the best tokens by the policy's own score, half of the budget, come first; the others are ranked by (score +
    1e-4) times the size of the value. The paper takes the L1 norm of the value after the output projection, which a
    policy does not see; here it is the L2 norm of the value itself. Reads: what the policy reads.
    """

    def score(view: View) -> Tensor:
        candidates = view.candidates()
        scores = policy.score(view).float()
        first = rank(scores.masked_fill(~candidates, float("-inf")), view.index) < FIRST * view.staying()
        effect = ((scores + EPSILON) * upcast(view.values).norm(dim=-1).float()).masked_fill(~candidates, 0.0)
        return effect + first * (effect.amax(-1, keepdim=True) + 1)

    return replace(policy, score=score)

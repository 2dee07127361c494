from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cache.look_ahead import upcast
from ..cache.view import View
from .policy import Policy
from .random import random
from .rank import rank

LARGEST = 0.01


def vase(policy: Policy) -> Policy:
    """VaSE: tokens with large values stay, and the others are sampled. Wraps an attention score.

    Paper: "VaSE", arXiv 2606.03928, of which we know the abstract: never evict the few tokens with abnormally long
    values; sample what is evicted instead of taking the lowest scores.
    Score: the 1 % of a head's image tokens with the longest values come first. The others are sampled without
    replacement in proportion to the policy's score: its logarithm plus Gumbel noise. How many are spared and what the
    sampling is proportional to are our reading. The noise is a hash of layer, head, token and line, the same for every
    row of the batch. Reads: what the policy reads.
    """

    def score(view: View) -> Tensor:
        candidates = view.candidates()
        uniform = (random(view) + 0.5) / 2**32
        sampled = policy.score(view).float().clamp(min=1e-30).log() - torch.log(-torch.log(uniform)).float()
        length = upcast(view.values).norm(dim=-1).masked_fill(~candidates, float("-inf"))
        spared = rank(length, view.index) < torch.ceil(LARGEST * candidates.sum(-1, keepdim=True))
        return sampled + spared * 1e3  # the logarithm, at least that of 1e-30, and the noise span less

    return replace(policy, score=score)

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
    """VaSE around a policy that scores by attention: large values stay, and chance has a say in what else does.

    Paper: "VaSE", arXiv 2606.03928, known to us by its abstract: never evict the few tokens whose value is abnormally
    long; draw what is evicted instead of taking the least.
    Score: the hundredth of a head's image tokens with the longest values come first. The others are drawn without
    replacement in proportion to the policy's score: its logarithm plus Gumbel noise. How many are spared and what the
    draw is proportional to are our reading. The noise is a hash of layer, head, token and line, the same for every row
    of the batch. Reads: what the policy reads.
    """

    def score(view: View) -> Tensor:
        there = view.candidates()
        even = (random(view) + 0.5) / 2**32
        drawn = policy.score(view).float().clamp(min=1e-30).log() - torch.log(-torch.log(even)).float()
        length = upcast(view.values).norm(dim=-1).masked_fill(~there, float("-inf"))
        spared = rank(length, view.index) < torch.ceil(LARGEST * there.sum(-1, keepdim=True))
        return drawn + spared * 1e3  # a logarithm of at least 1e-30 and such noise span less

    return replace(policy, score=score)

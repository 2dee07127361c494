from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cache.view import View
from .policy import Policy
from .rank import rank

BANDS = 8
SHARE = 0.5


def stratified(policy: Policy) -> Policy:
    """Quotas around any policy: no region of the picture is forgotten altogether.

    Papers: "HeadKV", arXiv 2605.20600, evicts by strata, and "AdaptiveMassSegment", arXiv 2605.23200, gives segments of
    a text a minimum each. Neither says what a stratum of a picture is: here the lines drawn so far are cut into 8 bands
    of equal height, and half of the budget is theirs in equal parts.
    Score: the policy's own; the best tokens of each band, as many as its quota, come first. Reads: what the policy
    reads.
    """

    def score(view: View) -> Tensor:
        there = view.candidates()
        line = (view.index - view.grid.prompt) // view.grid.stride
        band = torch.where(there, line * BANDS // (view.row + 1), BANDS)
        scores = policy.score(view).float()
        budget = there.sum(-1, keepdim=True) - view.grid.stride  # a line has to leave
        place = rank(scores, view.index, band)
        # Within the share of one of so many bands as there are lines yet, BANDS at most.
        safe = (place * (view.row + 1) < SHARE * budget) | (place * BANDS < SHARE * budget)
        span = scores.masked_fill(~there, float("-inf")).amax(-1) - scores.masked_fill(~there, float("inf")).amin(-1)
        return scores + safe * (span[..., None] + 1)

    return replace(policy, score=score)

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..cache.view import View
from ..pyramid import Pyramid
from .policy import Policy
from .rank import rank

BANDS = 8
SHARE = 0.5


def stratified(policy: Policy) -> Policy:
    """Quotas around any policy, so that no region of the picture is forgotten altogether.

    Papers: "HeadKV", arXiv 2605.20600, evicts by strata, and "AdaptiveMassSegment", arXiv 2605.23200, gives each
    segment of a text a minimum. Neither defines a stratum of a picture: here the lines drawn so far are cut into 8
    bands of equal height, which get equal parts of half the budget. Of a pyramid, every scale is a band.
    Score: the policy's own; the best tokens of each band, up to its quota, come first. Reads: what the policy reads.
    """

    def score(view: View) -> Tensor:
        candidates = view.candidates()
        if isinstance(view.grid, Pyramid):
            firsts = torch.tensor(
                [view.grid.index(scale) for scale in range(view.grid.stages)], device=view.index.device
            )
            band = torch.bucketize(view.index, firsts.int(), right=True)
        else:
            line = (view.index - view.grid.prompt) // view.grid.stride
            band = torch.where(candidates, line * BANDS // (view.row + 1), BANDS)
        scores, budget = policy.score(view).float(), view.staying()
        ranks = rank(scores, view.index, band)
        # Within the quota of a band; while there are fewer lines than BANDS, every line is a band.
        safe = (ranks * (view.row + 1) < SHARE * budget) | (ranks * BANDS < SHARE * budget)
        span = scores.masked_fill(~candidates, float("-inf")).amax(-1) - scores.masked_fill(
            ~candidates, float("inf")
        ).amin(-1)
        return scores + safe * (span[..., None] + 1)

    return replace(policy, score=score)

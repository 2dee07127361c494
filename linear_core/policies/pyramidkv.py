"""PyramidKV: budgets fall with depth.

Paper: Cai et al., "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069.
Score: `snapkv`'s.
Budgets: linear from the first layer to the last, as published: the last has 1/20 of the mean and the first has 2 minus
that, but none less than the protected tokens. That attention narrows with depth was found in language models. Reads:
queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from .allocate import allocate_layers
from .policy import Policy
from .snapkv import snapkv

BETA = 20


def count_layers(view: View) -> Tensor:
    """1 for each head, L B H. The survey of all layers then shows how many layers there are."""
    return torch.ones(view.index.shape[:3], device=view.index.device)


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    slope = torch.linspace(2 - 1 / BETA, 1 / BETA, len(view.survey), device=view.survey.device)
    return allocate_layers(slope[:, None, None] * view.survey, view, plan)


pyramidkv = Policy(
    snapkv,
    frozenset({"queries"}),
    keep,
    count_layers,
    lines="scores as snapkv, which looks at the last queries of a line, and the tokens of a scale have no order",
)

"""PrefixKV: every layer keeps the same share of its attention, which takes many tokens in some layers, few in others.

Paper: Wang et al., "PrefixKV: Adaptive Prefix KV Cache is What Vision Instruction-Following Models Need for Efficient
Generation", arXiv 2412.03409.
Score: `line`'s. The paper averages heads; here, as in `line`, each head chooses its own tokens.
Budgets: the paper searches for the share of attention that all layers can keep within the total. Sorting all layers'
tokens by the share kept before them gives the same result directly. Measured when the cache first overflows, at the
ratio of the budget to the whole picture; the paper measures offline, on prompts. Reads: queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from .allocate import allocate_layers
from .line import line
from .policy import Policy


def cumulative_attention(view: View) -> Tensor:
    """For each image token of a layer, the share of attention on the tokens that got more, most attended first: L B N.

    Attention is the line's to the picture. Tokens are sorted within each head, then heads are averaged.
    """
    attention = view.attention(lambda p: p.mean(2), image_only=True)
    ranked = attention.sort(dim=-1, descending=True).values[..., : view.newest + 1 - view.grid.prompt].mean(2)
    return ranked.cumsum(-1) - ranked


def keep(view: View, scores: Tensor, plan: CachePlan) -> Tensor:
    assert view.survey is not None
    layers, _, tokens = view.survey.shape
    pooled = view.survey.transpose(0, 1).flatten(1)
    best = pooled.argsort(dim=-1, stable=True)[:, : max(1, round(layers * tokens * plan.ratio(view.grid)))]
    layer = best // tokens
    counts = pooled.new_zeros(len(pooled), layers).scatter_add_(-1, layer, torch.ones_like(layer, dtype=pooled.dtype))
    return allocate_layers(counts.T[..., None].expand(-1, -1, view.index.shape[2]), view, plan)


prefixkv = Policy(line, frozenset({"queries"}), keep, cumulative_attention)

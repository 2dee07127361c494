from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View

WINDOW = 8
KERNEL = 7
SIMILAR = 0.5
LAMBDA = 0.1


def rkv(view: View) -> Tensor:
    """R-KV: keep tokens that matter to the last queries and whose keys are not redundant.

    Paper: Cai et al., "R-KV: Redundancy-aware KV Cache Compression for Reasoning Models", arXiv 2505.24133.
    Score: lambda * importance - (1 - lambda) * redundancy, with lambda 0.1 as in its README.
    Importance: mean over the last 8 queries of the softmax over image tokens only, max-pooled with kernel 7 by index.
    Redundancy: softmax over tokens of the mean cosine similarity with the other keys; of the keys more similar than
    0.5, the newest is not counted. The published code takes the first sample's keys for the whole batch; here each row
    and head has its own. Reads: queries.
    """
    outside = ~view.candidates()
    importance = view.attention(lambda p: p.mean(2), last=WINDOW, image_only=True)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    importance = view.by_index(importance, pool)
    layers = [_redundancy(k, i, o) for k, i, o in zip(view.keys, view.index, outside, strict=True)]
    return LAMBDA * importance - (1 - LAMBDA) * torch.stack(layers)


def _redundancy(keys: Tensor, index: Tensor, outside: Tensor) -> Tensor:
    """One layer: keys B H S D, index and outside B H S -> B H S."""
    keys = F.normalize(keys.float(), dim=-1).masked_fill(outside[..., None], 0.0)
    cosine = keys @ keys.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    # Of the tokens similar to a token the newest is spared: that similarity does not count against it.
    age = torch.where(cosine > SIMILAR, index[..., None, :].float(), -1.0)
    newest, slot = age.max(-1, keepdim=True)
    spared = cosine.gather(-1, slot).masked_fill(newest >= 0, 0.0)
    cosine = cosine.scatter(-1, slot, spared)
    mean = cosine.sum(-2) / (~outside).sum(-1, keepdim=True).clamp(min=1)
    return mean.masked_fill(outside, float("-inf")).softmax(-1)

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View

WINDOW = 32
KERNEL = 7


def snapkv(view: View) -> Tensor:
    """SnapKV, applied while decoding: the attention of the last queries, max-pooled along the sequence.

    Paper: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.
    Score: mean over a window of 32 queries (at most one line is kept), max-pooled with kernel 7 over neighbours by
    index. The prompt is left out of the pooling: its effect on the first image tokens would depend on the number of its
    slots. Reads: queries.
    """
    scores = view.attention(lambda p: p.mean(2), last=WINDOW).masked_fill(~view.candidates(), 0.0)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    return view.by_index(scores, pool)

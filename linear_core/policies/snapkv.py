from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..view import View

WINDOW = 32
KERNEL = 7


def snapkv(view: View) -> Tensor:
    """SnapKV, applied while decoding: the attention of the last queries, max-pooled along the sequence.

    Paper: Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469.
    Window of 32 queries (at most one line is remembered), pooling kernel 7 over neighbours by index, mean over queries.
    Reads: queries.
    """
    scores = view.attention(lambda p: p.mean(2), last=WINDOW)

    def pool(x: Tensor) -> Tensor:
        return F.max_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    return view.by_index(scores, pool)

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View

KERNEL = 7
EPSILON = 1e-6


def dropkv(view: View) -> Tensor:
    """DropKV: keep the tokens without which the finished line's attention outputs would have changed most.

    Paper: "DropKV", openreview.net/forum?id=MqfNzH3TVH, known to us by its authors' code: NVIDIA's kvpress, pull
    request 285 (DropKVPress).
    Score: sum over queries of (p / (1 - p))^2 |v - o|^2, where p is the attention that the query pays to the token, v
    the token's value and o the query's output. It is exact for one token: without it, the softmax over the others moves
    the output by p / (1 - p) (o - v). As published, 1e-6 is added to 1 - p, and scores are the mean over query heads
    that share a key head, mean-pooled with kernel 7 over neighbours by index. The queries are the finished line's,
    where the press takes the last 32. The prompt is left out of the pooling: its effect on the first image tokens would
    depend on the number of its slots. Reads: queries.
    """
    attention = view.attention(lambda p: p, apart=True)  # L B H G C S, and below L B H 1 S D
    values = view.values.float()[:, :, :, None]
    outputs = attention @ values
    moves = (attention / (1 - attention + EPSILON)).square()
    # |v - o|^2 = |v|^2 - 2 v o + |o|^2, each summed over the queries by a product of matrices
    by_value = moves.sum(-2) * values.square().sum(-1)
    by_both = ((moves.transpose(-1, -2) @ outputs) * values).sum(-1)
    by_output = (outputs.square().sum(-1)[..., None, :] @ moves)[..., 0, :]
    scores = (by_value - 2 * by_both + by_output).mean(3).masked_fill(~view.candidates(), 0.0)

    def pool(x: Tensor) -> Tensor:
        return F.avg_pool1d(x.flatten(0, 2)[:, None], KERNEL, stride=1, padding=KERNEL // 2).view_as(x)

    return view.by_index(scores, pool)

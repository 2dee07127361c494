from __future__ import annotations

from torch import Tensor

from ..cache.view import View

EPSILON = 1e-6


def dropkv(view: View) -> Tensor:
    """DropKV: keep the tokens without which the finished line's attention outputs would have changed most.

    Paper: "DropKV: KV cache eviction by decoupled residual-output perturbation", openreview.net/forum?id=MqfNzH3TVH;
    code: NVIDIA's kvpress, pull request 285 (DropKVPress).
    Score: sum over queries of (p / (1 - p))^2 |v - o|^2, where p is the attention that the query pays to the token, v
    the token's value and o the query's output. It is exact for one token: without it, the softmax over the others moves
    the output by p / (1 - p) (o - v). Mean over query heads that share a key head. As published, 1e-6 is added to
    1 - p.
    Silent points, and what is ours: the queries are the finished line's, where the press takes the last 32. The press
    smooths the scores over 7 neighbours in the sequence, which neither the formula nor a grid of tokens asks for: not
    done. Reads: queries.
    """
    attention = view.attention(lambda p: p, apart=True)  # L B H G C S, and below L B H 1 S D
    values = view.values.float()[:, :, :, None]
    outputs = attention @ values
    moves = (attention / (1 - attention + EPSILON)).square()
    # |v - o|^2 = |v|^2 - 2 v o + |o|^2, each summed over the queries by a product of matrices
    by_value = moves.sum(-2) * values.square().sum(-1)
    by_both = ((moves.transpose(-1, -2) @ outputs) * values).sum(-1)
    by_output = (outputs.square().sum(-1)[..., None, :] @ moves)[..., 0, :]
    return (by_value - 2 * by_both + by_output).mean(3).clamp(min=0.0)

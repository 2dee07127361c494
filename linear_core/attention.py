"""The one door to attention. B batch, H heads, T queries, S slots, D numbers a head, L layers, C tokens a line."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Queries B H T D over slots B H S D; `bias` is ln(weight) of each slot, -inf where there is nothing.

    B H S: the same for all queries; B H T S: each its own.
    """
    if q.shape[2] == 1 and bias.ndim == 3 and q.device.type == "cpu":
        return _attend_one(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None] if bias.ndim == 3 else bias)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same for T = 1 as two products, which read keys and values where they lie.

    The kernel for CPUs is made for many queries: for one it takes a fifth longer, in bfloat16 more than twice as long.
    """
    scores = (k @ q.transpose(-1, -2))[..., 0] * q.shape[-1] ** -0.5 + bias
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    return weights.to(v.dtype)[:, :, None] @ v


def line_probabilities(queries: Tensor, keys: Tensor, bias: Tensor, index: Tensor, first: int | Tensor) -> Tensor:
    """Full softmax of a line's queries over everything held, causal within the line, for one layer.

    queries B H C D (the token at `first`, `first` + 1, …), keys B H S D, bias and index B H S -> float32 B H C S.
    """
    scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5 + bias.float()[:, :, None]
    own = first + torch.arange(queries.shape[2], device=index.device, dtype=index.dtype)
    later = index[:, :, None] > own[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)

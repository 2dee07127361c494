"""The pieces that line-raster transformers share. Nothing here knows of a cache: a block is handed `attend`."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ops = ModuleType | type[Any]
Turn = Callable[[Tensor], Tensor]  # RoPE: rotates queries or keys B H T D
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v B H T D -> B H T D


@lru_cache(maxsize=8)
def rope_2d(rows: int, cols: int, dim: int, base: float, device: torch.device) -> Tensor:
    """LlamaGen's rotary table, cosine and sine per pair: float32 rows*cols dim/2 2.

    The first half of the pairs turns by the row, the second by the column.
    """
    half = dim // 2
    inverse = base ** -(torch.arange(0, half, 2, device=device)[: half // 2].float() / half)
    row = (torch.arange(rows, device=device)[:, None] * inverse)[:, None].expand(-1, cols, -1)
    col = (torch.arange(cols, device=device)[:, None] * inverse)[None].expand(rows, -1, -1)
    angle = torch.cat([row, col], -1).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()], -1)


def turn_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x0 x1), (x2 x3), … of x B H T D by `table` T D/2 2, in float32."""
    pairs = x.float().unflatten(-1, (-1, 2))
    cos, sin = table.unbind(-1)
    a, b = pairs.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Projections only; key names are LlamaGen's."""

    def __init__(self, width: int, heads: int, ops: Ops = nn):
        super().__init__()
        self.heads = heads
        self.wqkv = ops.Linear(width, 3 * width, bias=False)
        self.wo = ops.Linear(width, width, bias=False)

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        """x B T W."""
        q, k, v = self.wqkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.wo(attend(turn(q), turn(k), v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int, ops: Ops = nn):
        super().__init__()
        self.w1 = ops.Linear(width, hidden, bias=False)
        self.w3 = ops.Linear(width, hidden, bias=False)
        self.w2 = ops.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block, B T W -> B T W."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float, ops: Ops = nn):
        super().__init__()
        self.attention = Attention(width, heads, ops)
        self.feed_forward = FeedForward(width, hidden, ops)
        self.attention_norm = ops.RMSNorm(width, eps=eps)
        self.ffn_norm = ops.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, turn: Turn, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turn, attend)
        return x + self.feed_forward(self.ffn_norm(x))

"""Building blocks of raster transformers. They know nothing of a cache: a block is passed `attend`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ops = ModuleType | type[Any]
Rotate = Callable[[Tensor], Tensor]  # applies RoPE to queries and keys, B H T D
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q B Q T D, k and v B H T D, Q a multiple of H -> B Q T D


@lru_cache(maxsize=64)  # captured graphs read the tensors kept here
def rope_2d(rows: int, cols: int, dim: int, base: float, device: torch.device) -> Tensor:
    """LlamaGen's 2-D RoPE table for `rotate_pairs`: float32 rows*cols 2 dim, cosines and signed sines.

    The first half of the pairs rotates by the row, the second by the column.
    """
    half = dim // 2
    inverse = base ** -(torch.arange(0, half, 2, device=device)[: half // 2].float() / half)
    row = (torch.arange(rows, device=device)[:, None] * inverse)[:, None].expand(-1, cols, -1)
    col = (torch.arange(cols, device=device)[:, None] * inverse)[None].expand(rows, -1, -1)
    angle = torch.cat([row, col], -1).flatten(0, 1)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)], -2)


@lru_cache(maxsize=64)
def _inverse_frequencies(dim: int, base: float, device: torch.device) -> Tensor:
    """Radians per position of each pair: float32 dim/2."""
    return base ** -(torch.arange(0, dim, 2, device=device).float() / dim)


def rope_1d(position: Tensor, dim: int, base: float) -> Tensor:
    """Llama's RoPE table for `rotate_halves`, at integer positions of any shape: float32 ... 2 dim."""
    angle = position.float()[..., None] * _inverse_frequencies(dim, base, position.device)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)], -2)


def for_pairs(table: Tensor) -> Tensor:
    """A table for `rotate_halves` as one for `rotate_pairs`: the same rotations, of neighbouring pairs."""
    return table.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


def rotate_pairs(x: Tensor, table: Tensor) -> Tensor:
    """Rotate neighbouring pairs (x0 x1), (x2 x3), … of x ... T D by `table` T 2 D, in float32."""
    x32 = x.float()
    if x.device.type == "cpu" and not torch.compiler.is_compiling():  # in a third of the time, with the same result
        turns = torch.complex(table[..., 0, ::2], table[..., 1, 1::2])
        turned = torch.view_as_complex(x32.unflatten(-1, (-1, 2))) * turns
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)
    return _rotate(x32, x32.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), table).to(x.dtype)


def rotate_halves(x: Tensor, table: Tensor) -> Tensor:
    """Rotate pairs half a head apart, (x0 xD/2), (x1 xD/2+1), … of x ... T D by `table` ... T 2 D, in float32.

    This is transformers' layout of Llama heads; `rotate_pairs` is Meta's, and LlamaGen's after it.
    """
    x32 = x.float()
    return _rotate(x32, x32.roll(x.shape[-1] // 2, -1), table).to(x.dtype)


def _rotate(x: Tensor, other: Tensor, table: Tensor) -> Tensor:
    """Multiply each element by its cosine and add its partner times the signed sine."""
    cos, sin = table.unbind(-2)
    return x * cos + other * sin


class HeadNorm(nn.Module):
    """LayerNorm over each head, with a weight and a bias per head."""

    def __init__(self, heads: int, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(heads, dim))
        self.bias = nn.Parameter(torch.zeros(heads, dim))

    def forward(self, x: Tensor) -> Tensor:
        """x B H T D."""
        return F.layer_norm(x, x.shape[-1:], eps=self.eps) * self.weight[:, None] + self.bias[:, None]


@dataclass(frozen=True)
class Heads:
    """The heads of an attention layer: `queries` of them share `keys` key heads, in order, each of `dim` numbers.

    norm  of queries and keys before they are rotated: "layer", a LayerNorm with a weight and a bias per head
          (Chameleon); "rms", an RMSNorm with one weight for all heads (Qwen3); "": none
    """

    queries: int
    keys: int
    dim: int
    norm: str = ""
    eps: float = 1e-5  # of an RMSNorm


class Attention(nn.Module):
    """Projections, and norms of queries and keys if the model has them. Key names are LlamaGen's."""

    def __init__(self, width: int, heads: Heads, ops: Ops = nn):
        super().__init__()
        self.heads = heads
        self.wqkv = ops.Linear(width, (heads.queries + 2 * heads.keys) * heads.dim, bias=False)
        self.wo = ops.Linear(heads.queries * heads.dim, width, bias=False)
        self.q_norm, self.k_norm = (self._norm(count, ops) for count in (heads.queries, heads.keys))

    def _norm(self, count: int, ops: Ops) -> nn.Module | None:
        if self.heads.norm == "rms":
            norm: nn.Module = ops.RMSNorm(self.heads.dim, eps=self.heads.eps)
            return norm
        return HeadNorm(count, self.heads.dim) if self.heads.norm else None

    def forward(self, x: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        """x B T W."""
        queries, keys = self.heads.queries, self.heads.keys
        heads = self.wqkv(x).unflatten(-1, (-1, self.heads.dim)).transpose(1, 2)
        qk, v = heads.split([queries + keys, keys], 1)
        if self.q_norm and self.k_norm:
            q, k = qk.split([queries, keys], 1)
            qk = torch.cat([self.q_norm(q), self.k_norm(k)], 1)
        # Rotated together, because a rotation is several operations too small to be worth a launch each.
        q, k = rotate(qk).split([queries, keys], 1)
        return self.wo(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU, ... W -> ... W."""

    def __init__(self, width: int, hidden: int, ops: Ops = nn):
        super().__init__()
        self.w1 = ops.Linear(width, hidden, bias=False)
        self.w3 = ops.Linear(width, hidden, bias=False)
        self.w2 = ops.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """Pre-norm transformer block, B T W -> B T W."""

    def __init__(self, width: int, heads: Heads, hidden: int, eps: float, ops: Ops = nn):
        super().__init__()
        self.attention = Attention(width, heads, ops)
        self.feed_forward = FeedForward(width, hidden, ops)
        self.attention_norm = ops.RMSNorm(width, eps=eps)
        self.ffn_norm = ops.RMSNorm(width, eps=eps)

    def forward(self, x: Tensor, rotate: Rotate, attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotate, attend)
        return x + self.feed_forward(self.ffn_norm(x))

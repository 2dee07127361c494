"""The encoder and decoder networks of a VQ-GAN, in LlamaGen's layout and key names.

Widths, depth and the levels with attention are read from a state dict, so one pair of classes serves every size. Level
0 of `conv_blocks` is the full resolution in the encoder and the *lowest* resolution in the decoder, as in the published
files (github.com/FoundationVision/LlamaGen, tokenizer/tokenizer_image/vq_model.py).

Every class takes `ops`, the namespace of its layers: `torch.nn`, or a host's casting layers. `entries` are the
codebook's vectors, which the norms of a MoVQ's decoder read; None: ordinary norms.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Ops = ModuleType | type[Any]
Norm = Callable[[int], nn.Module]  # channels -> norm


def groups(channels: int) -> int:
    """32 as published; networks narrower than the published ones keep four channels per group."""
    return min(32, channels // 4)


def group_norm(channels: int, ops: Ops) -> nn.Module:
    return ops.GroupNorm(groups(channels), channels, eps=1e-6, affine=True)


class SpatialNorm(nn.Module):
    """A group norm whose scale and shift at each place are read from the codebook entry there, as in MoVQ.

    Source: github.com/ai-forever/MoVQGAN, movqgan/modules/vqvae/movq_modules.py.
    """

    def __init__(self, channels: int, code_dim: int, ops: Ops = nn):
        super().__init__()
        self.norm_layer = group_norm(channels, ops)
        self.conv_y = ops.Conv2d(code_dim, channels, 1)
        self.conv_b = ops.Conv2d(code_dim, channels, 1)

    def forward(self, x: Tensor, entries: Tensor) -> Tensor:
        """x B C H W, entries B E h w, each of which serves a square of x.

        Published code enlarges `entries` to x's size first. A convolution of one pixel gives the same before, and then
        only the rows need copies in memory.
        """
        rows, cols = entries.shape[2:]
        wide = x.shape[3] // cols
        scale, shift = (conv(entries).repeat_interleave(wide, -1)[:, :, :, None] for conv in (self.conv_y, self.conv_b))
        return torch.addcmul(shift, self.norm_layer(x).unflatten(2, (rows, -1)), scale).flatten(2, 3)


def _normalize(norm: nn.Module, x: Tensor, entries: Tensor | None) -> Tensor:
    normalized: Tensor = norm(x) if entries is None else norm(x, entries)
    return normalized


class ResBlock(nn.Module):
    """B I H W -> B O H W."""

    def __init__(self, inner: int, outer: int, ops: Ops = nn, norm: Norm | None = None):
        super().__init__()
        norm = norm or partial(group_norm, ops=ops)
        self.norm1 = norm(inner)
        self.conv1 = ops.Conv2d(inner, outer, 3, padding=1)
        self.norm2 = norm(outer)
        self.conv2 = ops.Conv2d(outer, outer, 3, padding=1)
        self.nin_shortcut = ops.Conv2d(inner, outer, 1) if inner != outer else None

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        h = self.conv1(F.silu(_normalize(self.norm1, x, entries)))
        h = self.conv2(F.silu(_normalize(self.norm2, h, entries)))
        return h + (x if self.nin_shortcut is None else self.nin_shortcut(x))


class AttentionBlock(nn.Module):
    """Self-attention of one head over all H x W positions."""

    def __init__(self, channels: int, ops: Ops = nn, norm: Norm | None = None):
        super().__init__()
        self.norm = (norm or partial(group_norm, ops=ops))(channels)
        self.q, self.k, self.v, self.proj_out = (ops.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        h = _normalize(self.norm, x, entries)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape_as(x)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    def __init__(self, channels: int, ops: Ops = nn):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # padded on the right and below only, as published


class Upsample(nn.Module):
    def __init__(self, channels: int, ops: Ops = nn):
        super().__init__()
        self.conv = ops.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention if the layout has it, then resampling."""

    def __init__(
        self,
        inner: int,
        outer: int,
        blocks: int,
        attention: bool,
        ops: Ops,
        resample: str = "",
        norm: Norm | None = None,
    ):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(inner if i == 0 else outer, outer, ops, norm) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(outer, ops, norm) for _ in range(blocks if attention else 0))
        self.resample = resample
        if resample:
            self.add_module(resample, (Upsample if resample == "upsample" else Downsample)(outer, ops))

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        for i, block in enumerate(self.res):
            x = block(x, entries)
            if self.attn:
                x = self.attn[i](x, entries)
        return self.get_submodule(self.resample)(x) if self.resample else x


class Nothing(nn.Module):
    """In place of attention."""

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        return x


def _middle(channels: int, attention: bool, ops: Ops, norm: Norm | None = None) -> nn.ModuleList:
    first, last = (ResBlock(channels, channels, ops, norm) for _ in range(2))
    return nn.ModuleList([first, AttentionBlock(channels, ops, norm) if attention else Nothing(), last])


class Encoder(nn.Module):
    """Picture B 3 H W in -1..1 -> features B Z H/f W/f, f = 2 ** (levels - 1).

    widths     channels of each level, from full resolution down
    attention  in the level of the lowest resolution
    middle     attention between that level and the output
    """

    def __init__(
        self, widths: list[int], blocks: int, z: int, attention: bool = True, ops: Ops = nn, middle: bool = True
    ):
        super().__init__()
        self.conv_in = ops.Conv2d(3, widths[0], 3, padding=1)
        last = len(widths) - 1
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, blocks, attention and i == last, ops, "downsample" if i < last else "")
            for i, w in enumerate(widths)
        )
        self.mid = _middle(widths[-1], middle, ops)
        self.norm_out = group_norm(widths[-1], ops)
        self.conv_out = ops.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """Features B Z h w -> picture B 3 h*f w*f in about -1..1.

    widths    channels of each level, from the lowest resolution up
    code_dim  size of a codebook entry, if the norms read them (MoVQ)
    middle    attention between the input and that level
    """

    def __init__(
        self,
        widths: list[int],
        blocks: int,
        z: int,
        attention: bool = True,
        ops: Ops = nn,
        code_dim: int | None = None,
        middle: bool = True,
    ):
        super().__init__()
        norm = partial(SpatialNorm, code_dim=code_dim, ops=ops) if code_dim else partial(group_norm, ops=ops)
        self.conv_in = ops.Conv2d(z, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], middle, ops, norm)
        last = len(widths) - 1
        self.conv_blocks = nn.ModuleList(
            Level(widths[max(i - 1, 0)], w, blocks, attention and i == 0, ops, "upsample" if i < last else "", norm)
            for i, w in enumerate(widths)
        )
        self.norm_out = norm(widths[-1])
        self.conv_out = ops.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        """entries  the codebook's vectors at the same places, B E h w, if the norms read them"""
        x = self.conv_in(x)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x, entries)
        return self.conv_out(F.silu(_normalize(self.norm_out, x, entries)))

"""Emu3's tokenizer, made for videos and used here for one still picture, without its third dimension.

As published, a picture is a video of four equal frames when it is encoded, and decoding makes four frames of which the
first is kept. Convolutions in time are padded in front only, so the first frame depends on the last slice of each
kernel, and the four equal frames on sums of slices: a convolution in three dimensions becomes one in two, exactly, and
a picture takes a quarter of the work. `flatten` does this to the file's weights.

Source: github.com/baaivision/Emu3, emu3/tokenizer/modeling_emu3visionvq.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import Decoder, Encoder, Ops


class BatchNorm(nn.Module):
    """BatchNorm with the statistics of training, B C H W."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias, self.running_mean, self.running_var = (
            nn.Parameter(torch.ones(channels)) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


class TimeResBlock(nn.Module):
    """B Z h w -> B Z h w."""

    def __init__(self, z: int, ops: Ops = nn):
        super().__init__()
        self.norm1, self.norm2 = BatchNorm(z), BatchNorm(z)
        self.conv1, self.conv2 = (ops.Conv2d(z, z, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class StillEncoder(Encoder):
    """Picture B 3 H W in -1..1 -> features B Z H/f W/f."""

    def __init__(self, widths: list[int], blocks: int, z: int, attention: bool = True, ops: Ops = nn):
        super().__init__(widths, blocks, z, attention, ops)
        # Four equal frames become two different ones, then one.
        self.time_conv = nn.ModuleList(ops.Conv2d(*sizes, 3, padding=1) for sizes in ((z, 2 * z), (2 * z, z)))
        self.time_res_stack = nn.ModuleList(TimeResBlock(z, ops) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        for conv in self.time_conv:
            x = F.silu(conv(x))
        for block in self.time_res_stack:
            x = block(x)
        return x


class StillDecoder(Decoder):
    """Features B Z h w and codebook entries B Z h w -> picture B 3 h*f w*f in about -1..1."""

    def __init__(
        self, widths: list[int], blocks: int, z: int, attention: bool = True, ops: Ops = nn, code_dim: int | None = None
    ):
        super().__init__(widths, blocks, z, attention, ops, code_dim)
        self.time_res_stack = nn.ModuleList(TimeResBlock(z, ops) for _ in range(blocks - 1))
        self.time_conv = nn.ModuleList(ops.Conv2d(z, z, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        assert entries is not None
        both = torch.cat([x, entries])  # the norms read entries that have passed these layers too
        for block in self.time_res_stack:
            both = block(both)
        for conv in self.time_conv:
            both = F.silu(conv(both))
        return super().forward(*both.chunk(2))


def flatten(key: str, tensor: Tensor) -> Tensor:
    """A weight or bias of a published layer in time, by its key in the file, as ours: without time.

    Of a kernel O I T H W the first frame needs the last slice, as what comes before it is padding. The encoder's two
    layers of stride 2 make two frames of four equal ones, kept as twice the channels, and one frame of those.
    """
    if key.startswith("encoder.time_conv.0."):
        if tensor.ndim == 1:
            return tensor.repeat(2)
        return torch.cat([tensor[:, :, -2:].sum(2), tensor.sum(2)])  # frames 0 0 x x, then x x x x
    if key.startswith("encoder.time_conv.1.") and tensor.ndim > 1:
        return torch.cat([tensor[:, :, -2], tensor[:, :, -1]], 1)  # frames 0 0 x y
    return tensor if tensor.ndim == 1 else tensor[:, :, -1]

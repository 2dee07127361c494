"""Bit-wise multi-scale tokenizer: a token is a number, and each of its bits is the sign of one number of the canvas.

No table: what a token stands for is its bits, as the corner of a cube around the origin. Otherwise as in `pyramid`:
each scale adds to the canvas what those before it left over. This is Infinity's tokenizer
(github.com/FoundationVision/Infinity, infinity/models/bsq_vae, MIT); key names are those of the house's networks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pyramid import Pyramid
from .layouts import rename_key
from .network import Decoder, Encoder, Ops
from .tokenizer import levels

PIXELS = 16  # per token along each side, in every published file


@dataclass(frozen=True)
class BitConfig:
    """Sizes of a bit-wise tokenizer; can be read from a state dict (`read_config`).

    channels  of the canvas
    """

    kind: ClassVar[str] = "bits"
    normalized: ClassVar[bool] = False

    channels: int
    decoder_widths: tuple[int, ...]  # lowest resolution first
    decoder_blocks: int
    encoder_widths: tuple[int, ...] = ()  # full resolution first; empty: the file has no encoder
    encoder_blocks: int = 0

    @property
    def patch(self) -> int:
        """Places of the canvas that a token covers, along each side: 2 where a place has 8 pixels."""
        return PIXELS // 2 ** (len(self.decoder_widths) - 1)

    @property
    def bits(self) -> int:
        """Bits of a token."""
        return self.channels * self.patch**2

    @property
    def codes(self) -> int:
        return 2**self.bits

    @property
    def code_dim(self) -> int:
        """Numbers of the canvas that a token stands for."""
        return self.bits

    @property
    def factor(self) -> int:
        """Pixels per token of the last scale along each side."""
        return PIXELS


class BitPyramid(nn.Module):
    """The quantizer: from token maps to the canvas and back. Has no weights.

    `pyramid` belongs to the transformer, so one tokenizer serves every pyramid: each method takes it.
    """

    def __init__(self, channels: int, patch: int):
        super().__init__()
        self.channels, self.patch = channels, patch
        self.bits = channels * patch**2

    def side(self, pyramid: Pyramid, stage: int) -> tuple[int, int]:
        """Rows and columns of the canvas at a scale."""
        rows, cols = pyramid.sides[stage]
        return rows * self.patch, cols * self.patch

    def empty(self, images: int, pyramid: Pyramid) -> Tensor:
        """The canvas before the first scale: float32 B Z h w, zero."""
        return torch.zeros(images, self.channels, *self.side(pyramid, -1))

    def entries(self, tokens: Tensor) -> Tensor:
        """Tokens int64 B h w -> their corners B Z h*p w*p. The first bit is the highest."""
        place = torch.arange(self.bits - 1, -1, -1, device=tokens.device)
        bits = (tokens[:, None] >> place[:, None, None]) & 1
        return F.pixel_shuffle((2.0 * bits - 1) / self.channels**0.5, self.patch)

    def number(self, features: Tensor) -> Tensor:
        """Features B Z h*p w*p -> the tokens whose corners are nearest: int64 B h w."""
        bits = F.pixel_unshuffle((features > 0).long(), self.patch)
        place = torch.arange(self.bits - 1, -1, -1, device=features.device)
        return (bits << place[:, None, None]).sum(1)

    def rise(self, pyramid: Pyramid, stage: int, entries: Tensor) -> Tensor:
        """What a scale's corners add to the canvas: B Z H W."""
        if stage + 1 == pyramid.stages:
            return entries
        return F.interpolate(entries, size=self.side(pyramid, -1), mode="bilinear")

    def add(self, pyramid: Pyramid, stage: int, tokens: Tensor, canvas: Tensor) -> Tensor:
        """The canvas with scale `stage` drawn: tokens int64 B h w."""
        return canvas + self.rise(pyramid, stage, self.entries(tokens))

    def shrink(self, pyramid: Pyramid, stage: int, canvas: Tensor) -> Tensor:
        """The canvas at the size of scale `stage`, in raster order: B n Z*p*p. What the model reads to draw it."""
        small = F.interpolate(canvas, size=self.side(pyramid, stage), mode="bilinear")
        return F.pixel_unshuffle(small, self.patch).flatten(2).transpose(1, 2)

    def encode(self, pyramid: Pyramid, features: Tensor) -> list[Tensor]:
        """Features B Z H W -> tokens of every scale, int64 B h w each."""
        rest, tokens = features, []
        for stage in range(pyramid.stages):
            side = self.side(pyramid, stage)
            small = F.interpolate(rest, size=side, mode="area") if stage + 1 < pyramid.stages else rest
            tokens.append(self.number(small))
            rest = rest - self.rise(pyramid, stage, self.entries(tokens[-1]))
        return tokens

    def canvas(self, pyramid: Pyramid, tokens: Sequence[Tensor]) -> Tensor:
        """The canvas after the given first scales."""
        canvas = self.empty(len(tokens[0]), pyramid).to(tokens[0].device)
        for stage, one in enumerate(tokens):
            canvas = self.add(pyramid, stage, one, canvas)
        return canvas


class BitTokenizer(nn.Module):
    """An autoencoder over a pyramid of bits, without its losses and without attention."""

    def __init__(self, config: BitConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        self.compute_device: torch.device | None = None  # as in models.raster.Raster
        z = config.channels
        self.quantize = BitPyramid(z, config.patch)
        self.decoder = Decoder(list(config.decoder_widths), config.decoder_blocks, z, False, ops, middle=False)
        if config.encoder_widths:
            self.encoder = Encoder(list(config.encoder_widths), config.encoder_blocks, z, False, ops, middle=False)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.decoder.conv_in.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 -> features to quantize: B Z h w."""
        return self.encoder(pictures)

    def encode(self, pictures: Tensor, pyramid: Pyramid) -> list[Tensor]:
        """Pictures B 3 H W in -1..1 -> tokens of every scale, int64 B h w each."""
        return self.quantize.encode(pyramid, self.features(pictures).float())

    def decode(self, canvas: Tensor) -> Tensor:
        """Canvas B Z h w -> pictures B 3 H W, about -1..1. Any h and w."""
        return self.decoder(canvas)


def file_key(key: str, top: int | None = None) -> str:
    """The name here of a key in a published file, which wraps each convolution and norm; `top` as in `rename_key`."""
    return rename_key(re.sub(r"(?<!sample)\.(?:conv|norm)(?=\.(?:weight|bias)$)", "", key), top)


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> BitConfig:
    """Every size of a bit-wise tokenizer from its shapes, under our names.

    Raises KeyError, ValueError or IndexError if they are not one's.
    """
    channels = shapes["decoder.conv_in.weight"][1]
    decoder, decoder_blocks = levels(shapes, "decoder")
    encoder, encoder_blocks = levels(shapes, "encoder") if "encoder.conv_in.weight" in shapes else ((), 0)
    config = BitConfig(channels, decoder, decoder_blocks, encoder, encoder_blocks)
    if not channels or not 1 <= len(decoder) <= 5 or config.bits > 62:
        raise ValueError(f"{channels} channels, {len(decoder)} levels")
    return config

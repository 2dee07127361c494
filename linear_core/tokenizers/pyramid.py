"""Multi-scale VQ: a picture as token maps from coarse to fine, each the quantized remainder of those before it.

The running sum, raised to the side of the last scale, is the canvas: what a next-scale model reads, and what is decoded
into the picture. The canvas stays float32. This is VAR's tokenizer (github.com/FoundationVision/VAR, models/quant.py
and models/vqvae.py, MIT); key names are those of the published file, and of the house's networks within it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..pyramid import Pyramid
from .network import AttentionBlock, Decoder, Encoder, Ops
from .tokenizer import levels

PUBLISHED_PHI = (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)  # of 10 scales and 4 convolutions; 2 and 7 are ties, see `phi_of_stage`
RESIDUAL = 0.5  # share of the convolution in phi


@dataclass(frozen=True)
class PyramidConfig:
    """Sizes of a multi-scale VQ tokenizer; all but the pyramid can be read from a state dict (`read_config`).

    phis  convolutions that all scales share
    """

    kind: ClassVar[str] = "pyramid"
    normalized: ClassVar[bool] = False

    codes: int
    code_dim: int
    decoder_widths: tuple[int, ...]  # lowest resolution first
    decoder_blocks: int
    phis: int = 4
    attention: bool = True
    encoder_widths: tuple[int, ...] = ()  # full resolution first; empty: the file has no encoder
    encoder_blocks: int = 0

    @property
    def factor(self) -> int:
        """Pixels per token of the last scale along each side."""
        return 2 ** (len(self.decoder_widths) - 1)


def phi_of_stage(stages: int, phis: int) -> tuple[int, ...]:
    """Which of `phis` convolutions each of `stages` scales uses.

    The convolutions sit at even ticks between 0 and 1, and a scale takes the nearest, the first in a tie. With the
    published ten scales two are exact ties that double rounding decides upwards, so that row is written down.
    """
    if (stages, phis) == (len(PUBLISHED_PHI), max(PUBLISHED_PHI) + 1):
        return PUBLISHED_PHI
    edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
    step = (1 - edge - edge) / max(phis - 1, 1)
    ticks = [n * step + edge for n in range(phis)]  # rounded as numpy's linspace does: nine scales have a tie too
    return tuple(min(range(phis), key=lambda n: abs(ticks[n] - stage / max(stages - 1, 1))) for stage in range(stages))


class Phi(nn.Conv2d):
    """Half of x and half of its 3 x 3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 - RESIDUAL) + super().forward(x) * RESIDUAL


class SharedPhi(nn.Module):
    def __init__(self, phis: int, dim: int):
        super().__init__()
        self.qresi_ls = nn.ModuleList(Phi(dim, dim, 3, padding=1) for _ in range(phis))


class ResidualPyramid(nn.Module):
    """The quantizer: from token maps to the canvas and back. Float32, whatever the networks compute in.

    `pyramid` belongs to the transformer, so one tokenizer serves every pyramid: each method takes it.
    """

    def __init__(self, codes: int, dim: int, phis: int, ops: Ops = nn):
        super().__init__()
        self.embedding = ops.Embedding(codes, dim)
        self.quant_resi = SharedPhi(phis, dim)

    @property
    def codes(self) -> int:
        return self.embedding.num_embeddings

    @property
    def dim(self) -> int:
        """Channels of the canvas."""
        return self.embedding.embedding_dim

    def empty(self, images: int, pyramid: Pyramid) -> Tensor:
        """The canvas before the first scale: float32 B Z h w, zero."""
        return self.embedding.weight.new_zeros(images, self.dim, *pyramid.sides[-1])

    def entries(self, tokens: Tensor) -> Tensor:
        """Codes int64 B h w -> their vectors B Z h w."""
        return self.embedding(tokens).permute(0, 3, 1, 2)

    def rise(self, pyramid: Pyramid, stage: int, entries: Tensor) -> Tensor:
        """What a scale's vectors B Z h w add to the canvas: B Z H W."""
        if stage + 1 < pyramid.stages:
            entries = F.interpolate(entries, size=pyramid.sides[-1], mode="bicubic")
        phi = phi_of_stage(pyramid.stages, len(self.quant_resi.qresi_ls))[stage]
        return self.quant_resi.qresi_ls[phi](entries)

    def add(self, pyramid: Pyramid, stage: int, tokens: Tensor, canvas: Tensor) -> Tensor:
        """The canvas with scale `stage` drawn: tokens int64 B h w."""
        return canvas + self.rise(pyramid, stage, self.entries(tokens))

    def add_mixture(self, pyramid: Pyramid, stage: int, logits: Tensor, noise: Tensor, canvas: Tensor) -> Tensor:
        """The canvas with a mixture of codes at each place of scale `stage`, instead of the one that is sampled.

        A Gumbel softmax that grows sharper from scale to scale (`more_smooth` in models/var.py of VAR). The noise is
        that of sampling, so the mixture lies around the sampled code.

        logits  B n V, already filtered; noise B n V, exponential
        """
        ratio = stage / max(pyramid.stages - 1, 1)
        mixture = ((logits * (1 + ratio) - noise.log()) / max(0.27 * (1 - 0.95 * ratio), 0.005)).softmax(-1)
        entries = (mixture @ self.embedding.weight).transpose(1, 2).unflatten(2, pyramid.sides[stage])
        return canvas + self.rise(pyramid, stage, entries)

    def shrink(self, pyramid: Pyramid, stage: int, canvas: Tensor) -> Tensor:
        """The canvas at the size of scale `stage`, in raster order: B n Z. What the model reads to draw that scale."""
        return F.interpolate(canvas, size=pyramid.sides[stage], mode="area").flatten(2).transpose(1, 2)

    def nearest(self, features: Tensor) -> Tensor:
        """Vectors ... Z -> codes of the nearest entries: int64 ..."""
        table = self.embedding.weight
        return (features @ table.T * 2 - (table * table).sum(-1)).argmax(-1)

    def encode(self, pyramid: Pyramid, features: Tensor) -> list[Tensor]:
        """Features B Z H W -> codes of every scale, int64 B h w each."""
        rest, tokens = features, []
        for stage in range(pyramid.stages):
            side = pyramid.sides[stage]
            small = F.interpolate(rest, size=side, mode="area") if stage + 1 < pyramid.stages else rest
            tokens.append(self.nearest(small.permute(0, 2, 3, 1)))
            rest = rest - self.rise(pyramid, stage, self.entries(tokens[-1]))
        return tokens

    def canvas(self, pyramid: Pyramid, tokens: Sequence[Tensor]) -> Tensor:
        """The canvas after the given first scales."""
        canvas = self.empty(len(tokens[0]), pyramid)
        for stage, one in enumerate(tokens):
            canvas = self.add(pyramid, stage, one, canvas)
        return canvas


class FusedAttentionBlock(nn.Module):
    """AttentionBlock with one convolution for queries, keys and values, as in the published file."""

    def __init__(self, block: AttentionBlock, ops: Ops):
        super().__init__()
        channels = block.proj_out.weight.shape[0]
        self.norm, self.proj_out = block.norm, block.proj_out
        self.qkv = ops.Conv2d(channels, 3 * channels, 1)

    def forward(self, x: Tensor, entries: Tensor | None = None) -> Tensor:
        q, k, v = (part.flatten(2).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=1))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape_as(x)
        return x + self.proj_out(h)


def _fuse(network: nn.Module, ops: Ops) -> None:
    """Replace every AttentionBlock in `network`."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, AttentionBlock):
                setattr(parent, name, FusedAttentionBlock(child, ops))


class PyramidTokenizer(nn.Module):
    """A VQ-GAN over a pyramid of codes, without its losses."""

    def __init__(self, config: PyramidConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        self.compute_device: torch.device | None = None  # as in models.raster.Raster
        z = config.code_dim
        self.quantize = ResidualPyramid(config.codes, z, config.phis)
        self.post_quant_conv = ops.Conv2d(z, z, 3, padding=1)
        self.decoder = Decoder(list(config.decoder_widths), config.decoder_blocks, z, config.attention, ops)
        if config.encoder_widths:
            self.encoder = Encoder(list(config.encoder_widths), config.encoder_blocks, z, config.attention, ops)
            self.quant_conv = ops.Conv2d(z, z, 3, padding=1)
        _fuse(self, ops)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.quantize.embedding.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 -> features to quantize: B Z h w."""
        return self.quant_conv(self.encoder(pictures))

    def encode(self, pictures: Tensor, pyramid: Pyramid) -> list[Tensor]:
        """Pictures B 3 H W in -1..1 -> codes of every scale, int64 B h w each."""
        return self.quantize.encode(pyramid, self.features(pictures).float())

    def decode(self, canvas: Tensor) -> Tensor:
        """Canvas B Z h w -> pictures B 3 H W, about -1..1. Any h and w."""
        return self.decoder(self.post_quant_conv(canvas))


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> PyramidConfig:
    """Every size of a multi-scale VQ tokenizer from its shapes, under our names.

    Raises KeyError, ValueError or IndexError if they are not one's.
    """
    codes, code_dim = shapes["quantize.embedding.weight"]
    decoder, decoder_blocks = levels(shapes, "decoder")
    encoder, encoder_blocks = levels(shapes, "encoder") if "encoder.conv_in.weight" in shapes else ((), 0)
    phis = sum(key.startswith("quantize.quant_resi.qresi_ls.") and key.endswith(".weight") for key in shapes)
    if not decoder or not all((codes, code_dim, phis)):
        raise ValueError(f"{codes} codes of size {code_dim}, {len(decoder)} levels, {phis} shared convolutions")
    return PyramidConfig(
        codes=codes,
        code_dim=code_dim,
        decoder_widths=decoder,
        decoder_blocks=decoder_blocks,
        phis=phis,
        attention="decoder.conv_blocks.0.attn.0.qkv.weight" in shapes,
        encoder_widths=encoder,
        encoder_blocks=encoder_blocks,
    )

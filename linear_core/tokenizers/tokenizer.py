"""VQTokenizer: from pictures to codes and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import Decoder, Encoder, Ops, groups
from .still import StillDecoder, StillEncoder

IBQ = (131072, 256)  # codes and their size, by which its published file is known


@dataclass(frozen=True)
class VQConfig:
    """What the layout leaves open; can be read from a state dict (`read_config`)."""

    codes: int  # codebook entries
    code_dim: int  # size of an entry
    z: int  # latent channels between codebook and network
    decoder_widths: tuple[int, ...]  # lowest resolution first
    decoder_blocks: int
    attention: bool = True  # in the lowest-resolution level
    encoder_widths: tuple[int, ...] = ()  # full resolution first; empty: the file has no encoder
    encoder_blocks: int = 0
    normalized: bool = True  # entries and features are normalised to unit length (LlamaGen, Janus)
    kind: str = "vqgan"  # or one of KINDS

    @property
    def factor(self) -> int:
        """Pixels per token along each side."""
        return 2 ** (len(self.decoder_widths) - 1)

    @property
    def spatial_norm(self) -> bool:
        """Whether the decoder's norms read the codebook entries."""
        return self.kind in ("movq", "emu3")


KINDS = {
    "movq": "MoVQ: the decoder's norms read the codebook entries (Lumina-mGPT 2.0)",
    "emu3": "a MoVQ for videos, of which only what a still picture needs is kept (Emu3)",
    "ibq": "the code of a feature is the entry with the largest dot product, not the nearest (Emu3.5)",
    "pyramid": "codes of several scales, each the remainder of those before it (VAR): PyramidTokenizer",
    "bits": "the same with the signs of numbers in place of codes of a table (Infinity): BitTokenizer",
}


class Codebook(nn.Module):
    def __init__(self, codes: int, dim: int, ops: Ops):
        super().__init__()
        self.embedding = ops.Embedding(codes, dim)


class VQTokenizer(nn.Module):
    """A VQ-GAN without its losses. Key names are LlamaGen's."""

    def __init__(self, config: VQConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        self.compute_device: torch.device | None = None  # as in models.raster.Raster
        self.quantize = Codebook(config.codes, config.code_dim, ops)
        self.post_quant_conv = ops.Conv2d(config.code_dim, config.z, 1)
        encoder, decoder = (StillEncoder, StillDecoder) if config.kind == "emu3" else (Encoder, Decoder)
        read = config.code_dim if config.spatial_norm else None
        self.decoder = decoder(
            list(config.decoder_widths), config.decoder_blocks, config.z, config.attention, ops, read
        )
        if config.encoder_widths:
            self.encoder = encoder(list(config.encoder_widths), config.encoder_blocks, config.z, config.attention, ops)
            self.quant_conv = ops.Conv2d(config.z, config.code_dim, 1)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.quantize.embedding.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    def codebook(self) -> Tensor:
        """The codebook as used for look-up: K E."""
        table = self.quantize.embedding.weight.to(self.device)
        return F.normalize(table, dim=-1) if self.config.normalized else table

    def features(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 -> features to quantize: B h w E."""
        z = self.quant_conv(self.encoder(pictures)).permute(0, 2, 3, 1)
        return F.normalize(z, dim=-1) if self.config.normalized else z

    def nearest(self, features: Tensor) -> Tensor:
        """Features B h w E -> codes of the nearest entries, for IBQ those of the largest dot product: int64 B h w."""
        table = self.codebook()
        products = features @ table.T
        return (products if self.config.kind == "ibq" else products * 2 - (table * table).sum(-1)).argmax(-1)

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 -> codes int64 B h w. H and W are multiples of `config.factor`."""
        return self.nearest(self.features(pictures))

    def decode(self, codes: Tensor) -> Tensor:
        """Codes int64 B h w -> pictures B 3 H W, about -1..1. Any h and w."""
        return self.decode_features(F.embedding(codes, self.codebook()))

    def decode_features(self, features: Tensor) -> Tensor:
        """Codebook vectors B h w E -> pictures B 3 H W."""
        entries = features.permute(0, 3, 1, 2)
        return self.decoder(self.post_quant_conv(entries), entries if self.config.spatial_norm else None)


def to_pixels(pictures: Tensor) -> Tensor:
    """Decoder output B 3 H W -> ComfyUI's IMAGE: float32 B H W 3 in 0..1."""
    return ((pictures.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def levels(shapes: Mapping[str, tuple[int, ...]], part: str) -> tuple[tuple[int, ...], int]:
    """Widths of the encoder's or decoder's levels, and the residual blocks of each. Raises ValueError for odd ones."""
    widths: list[int] = []
    while (shape := shapes.get(f"{part}.conv_blocks.{len(widths)}.res.0.conv1.weight")) is not None:
        widths.append(shape[0])
        if shape[0] < 4 or shape[0] % groups(shape[0]):
            raise ValueError(f"{shape[0]} channels cannot be divided into groups")
    blocks = sum(k.startswith(f"{part}.conv_blocks.0.res.") and k.endswith(".conv1.weight") for k in shapes)
    return tuple(widths), blocks


def read_config(shapes: Mapping[str, tuple[int, ...]], normalized: bool = True, kind: str = "") -> VQConfig:
    """Every size of a tokenizer file in LlamaGen's layout from its keys and shapes.

    normalized  not told by shapes; those of KINDS never are
    kind        one of KINDS, if it is known; an IBQ is otherwise known by its size alone
    Raises KeyError, ValueError or IndexError if they are not a VQ tokenizer's.
    """
    codes, code_dim = shapes["quantize.embedding.weight"]
    decoder, decoder_blocks = levels(shapes, "decoder")
    encoder, encoder_blocks = levels(shapes, "encoder") if "encoder.conv_in.weight" in shapes else ((), 0)
    if not decoder:
        raise KeyError("decoder.conv_blocks.0")
    z = shapes["post_quant_conv.weight"][0]
    if not all((codes, code_dim, z)):
        raise ValueError(f"{codes} codes of size {code_dim}, {z} channels")
    if "decoder.norm_out.conv_y.weight" in shapes:
        kind = "emu3" if "decoder.time_conv.0.weight" in shapes else "movq"
        if kind == "emu3" and code_dim != z:
            raise ValueError(f"entries of {code_dim} numbers pass layers of {z} channels")
    elif not kind:
        kind = "ibq" if not normalized and (codes, code_dim) == IBQ else "vqgan"
    return VQConfig(
        codes=codes,
        code_dim=code_dim,
        z=z,
        decoder_widths=decoder,
        decoder_blocks=decoder_blocks,
        attention="decoder.conv_blocks.0.attn.0.q.weight" in shapes,
        encoder_widths=encoder,
        encoder_blocks=encoder_blocks,
        normalized=normalized and kind not in KINDS,
        kind=kind,
    )

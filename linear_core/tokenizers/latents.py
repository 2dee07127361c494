"""LatentTokenizer: from pictures to continuous latents and back, for models that draw masked tokens.

KL-16 of latent diffusion (github.com/CompVis/latent-diffusion, MIT), as github.com/LTH14/mar uses it: the network of a
VQ-GAN without a codebook. Stable Diffusion's and SDXL's, in diffusers' layout, for NOVA: their scale is in the
config.json beside them. KL-16's latents are no ComfyUI LATENT: other VAEs have other channels, sizes and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .network import Decoder, Encoder, Ops
from .tokenizer import levels

SCALE = 0.2325  # models see latents of KL-16 times this. It is not in the file


@dataclass(frozen=True)
class LatentConfig:
    """Sizes; can be read from a state dict (`read_config`).

    channels  of the latents
    scale     models see latents times this
    """

    channels: int
    decoder_widths: tuple[int, ...]  # lowest resolution first
    decoder_blocks: int
    attention: bool = False  # in the decoder's level of the lowest resolution
    encoder_widths: tuple[int, ...] = ()  # full resolution first; empty: the file has no encoder
    encoder_blocks: int = 0
    encoder_attention: bool = True
    kind: str = "latents"
    scale: float = SCALE

    @property
    def factor(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** (len(self.decoder_widths) - 1)


class LatentTokenizer(nn.Module):
    """A KL autoencoder without its losses. Key names are LlamaGen's."""

    def __init__(self, config: LatentConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        self.compute_device: torch.device | None = None  # as in models.raster.Raster
        z = config.channels
        self.post_quant_conv = ops.Conv2d(z, z, 1)
        self.decoder = Decoder(list(config.decoder_widths), config.decoder_blocks, z, config.attention, ops)
        if config.encoder_widths:
            self.encoder = Encoder(
                list(config.encoder_widths), config.encoder_blocks, 2 * z, config.encoder_attention, ops
            )
            self.quant_conv = ops.Conv2d(2 * z, 2 * z, 1)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.decoder.conv_in.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 H W in -1..1 -> latents as models see them, B Z h w: the mean of what the encoder says."""
        return self.quant_conv(self.encoder(pictures)).chunk(2, 1)[0] * self.config.scale

    def decode(self, latents: Tensor) -> Tensor:
        """Latents B Z h w -> pictures B 3 H W, about -1..1. Any h and w."""
        return self.decoder(self.post_quant_conv(latents / self.config.scale))


def read_config(shapes: Mapping[str, tuple[int, ...]], scale: float = SCALE) -> LatentConfig:
    """Every size of a KL autoencoder from its shapes, under our names; the shapes do not tell its scale.

    Raises KeyError, ValueError or IndexError if they are not one's.
    """
    channels = shapes["decoder.conv_in.weight"][1]
    decoder, decoder_blocks = levels(shapes, "decoder")
    encoder, encoder_blocks = levels(shapes, "encoder") if "encoder.conv_in.weight" in shapes else ((), 0)
    if not channels or not decoder:
        raise ValueError(f"{channels} channels, {len(decoder)} levels")
    lowest = len(encoder) - 1
    return LatentConfig(
        channels=channels,
        decoder_widths=decoder,
        decoder_blocks=decoder_blocks,
        attention="decoder.conv_blocks.0.attn.0.q.weight" in shapes,
        encoder_widths=encoder,
        encoder_blocks=encoder_blocks,
        encoder_attention=f"encoder.conv_blocks.{lowest}.attn.0.q.weight" in shapes,
        scale=scale,
    )

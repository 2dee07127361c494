"""What the published NOVA computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/baaivision/NOVA at commit 2cd254a (Apache-2.0) with
the weights that `nova_weights()`, `vae_weights()` and `phi_weights()` make again here. Upstream's pipeline
(diffnext/pipelines/nova/pipeline_nova.py) ran in float32 on the CPU with torch 2.13 and one thread, given features in
place of a text; its random numbers were replaced: the orders by `orders()`, the noise by `noise()`. None of its code is
here, only its key names and shapes. `tests/drawn.py` says how weights are drawn and what the digests are for.

    nova   width 24, 3 heads of 8, CONDITION layers before and IMAGE in the image encoder, feed-forward 96, SIDE x SIDE
           tokens of 2 x 2 latents of 4 channels, 3 x 3 cells, texts of LENGTH tokens of 20 features; diffusion head
           16 x 2, DENOISING steps
    vae    widths 32 32 64, one block a level, z 4; scaling factor 0.13025

    phi    width FEATURES, 2 heads of 10 of which 4 are rotated, 2 layers, feed-forward 40, 30 words

A run is upstream's pipeline with the prompts of `prompts()` and the settings of RUNS, and DDPMScheduler with
squaredcos_cap_v2, fixed_small, epsilon and the run's spacing.

    nova_digest, vae_digest, phi_digest  uint8 32  digests of the weights
    condition    float32 4 9 24        what the first encoder says, of run "guided": conditional rows first
    x_latents    float32 2 4 12 12     what run x draws
    x_conditions float32 n 24          z of the tokens of each step, in the order of drawing: rows, then tokens
    x_timesteps  int64 DENOISING       first to last
    published_timesteps, published_tables  int64 25, float32 3 25: of 25 trailing steps, and of each upstream's
                                       factors of x and of the noise, and the deviation that it adds
    known        int64 64              tokens known after each of 64 steps of 1024
    features     float32 5 20          upstream's text encoder on the words WORDS
    vae_picture  float32 2 3 96 96     `vae_latents()` decoded; vae_mean float32 2 4 12 12: mean for `pictures()`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.drawn import Layers, Weights, draw

WIDTH, HEADS, CONDITION, IMAGE, FEATURES, LENGTH = 24, 3, 2, 4, 20, 7
SIDE, PATCH, CHANNELS = 6, 2, 4
TOKENS, NUMBERS = SIDE * SIDE, CHANNELS * PATCH * PATCH
HEAD_WIDTH, HEAD_BLOCKS, DENOISING = 16, 2, 5
STEPS, IMAGES = 8, 2
RUNS: dict[str, dict[str, Any]] = {
    "guided": {"guidance_scale": 3.0, "spacing": "trailing"},
    "leading": {"guidance_scale": 1.7, "spacing": "leading", "negative": True},
}
VAE_WIDTHS, VAE_BLOCKS, VAE_SCALE = (32, 32, 64, 64), 1, 0.13025
PHI_HEADS, PHI_LAYERS, PHI_HIDDEN, VOCABULARY, ROTATED, WORDS = 2, 2, 40, 30, 0.4, (3, 17, 9, 28, 3)
FIXTURE = Path(__file__).parents[1] / "fixtures" / "nova.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def orders() -> Tensor:
    """Upstream's orders of two pictures: int64 2 36."""
    rng = np.random.default_rng(22)
    return torch.from_numpy(np.stack([rng.permutation(TOKENS) for _ in range(IMAGES)]))


def noise() -> Tensor:
    """Stands for normal noise: latents to begin with, then of each denoising step: float32 6 2 4 12 12."""
    side = SIDE * PATCH
    return draw(np.random.default_rng(23), (1 + DENOISING, IMAGES, CHANNELS, side, side), 1.0)


def prompts(negative: bool = False) -> list[Tensor]:
    """Features of two texts, of 3 and 5 tokens, or of two negative ones, of 2 and 7."""
    rng = np.random.default_rng(25 if negative else 24)
    return [draw(rng, (count, FEATURES), 1.0) for count in ((2, 7) if negative else (3, 5))]


def pictures() -> Tensor:
    """Two random pictures in -1..1."""
    return draw(np.random.default_rng(26), (IMAGES, 3, 8 * PATCH * SIDE, 8 * PATCH * SIDE), 0.5)


def vae_latents() -> Tensor:
    """As the model sees them."""
    side = SIDE * PATCH
    return draw(np.random.default_rng(27), (IMAGES, CHANNELS, side, side), 1.0)


def nova_weights() -> Weights:
    """All that a published transformer holds."""
    rng = np.random.default_rng(20)
    weights: Weights = {}

    def linear(name: str, outer: int, inner: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = draw(rng, (outer, inner), gain * inner**-0.5)
        weights[f"{name}.bias"] = draw(rng, (outer,), 0.2)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = draw(rng, (width,), 0.2, mean=1.0)
        weights[f"{name}.bias"] = draw(rng, (width,), 0.2)

    def patches(name: str, width: int, patch: int) -> None:
        shape = (width, CHANNELS, patch, patch)
        weights[f"{name}.patch_embed.proj.weight"] = draw(rng, shape, (CHANNELS * patch**2) ** -0.5)
        weights[f"{name}.patch_embed.proj.bias"] = draw(rng, (width,), 0.2)

    def stack(name: str, layers: int, patch: int) -> None:
        patches(name, WIDTH, patch)
        for n in range(layers):
            block = f"{name}.blocks.{n}"
            norm(f"{block}.norm1", WIDTH)
            linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
            linear(f"{block}.attn.proj", WIDTH, WIDTH)
            norm(f"{block}.norm2", WIDTH)
            linear(f"{block}.mlp.fc1", 4 * WIDTH, WIDTH)
            linear(f"{block}.mlp.fc2", WIDTH, 4 * WIDTH)
        norm(f"{name}.norm", WIDTH)

    stack("video_encoder", CONDITION, 2 * PATCH)
    stack("image_encoder", IMAGE, PATCH)
    head = "image_decoder"
    patches(head, HEAD_WIDTH, PATCH)
    linear(f"{head}.time_cond_embed.timestep_proj.fc1", HEAD_WIDTH, 256, 3.0)
    linear(f"{head}.time_cond_embed.timestep_proj.fc2", HEAD_WIDTH, HEAD_WIDTH)
    linear(f"{head}.time_cond_embed.condition_proj.fc1", HEAD_WIDTH, WIDTH)
    linear(f"{head}.time_cond_embed.condition_proj.fc2", HEAD_WIDTH, HEAD_WIDTH)
    for n in range(HEAD_BLOCKS):
        linear(f"{head}.blocks.{n}.norm1.proj", 3 * HEAD_WIDTH, HEAD_WIDTH)
        linear(f"{head}.blocks.{n}.proj.fc1", HEAD_WIDTH, HEAD_WIDTH)
        linear(f"{head}.blocks.{n}.proj.fc2", HEAD_WIDTH, HEAD_WIDTH)
        norm(f"{head}.blocks.{n}.norm2", HEAD_WIDTH)
    linear(f"{head}.norm.proj", 2 * HEAD_WIDTH, HEAD_WIDTH)
    linear(f"{head}.head", NUMBERS, HEAD_WIDTH)
    weights["mask_embed.bos_token"] = draw(rng, (1, WIDTH), 1.0)
    weights["mask_embed.mask_token"] = draw(rng, (1, WIDTH), 1.0)
    linear("text_embed.proj", WIDTH, FEATURES)
    norm("text_embed.norm", WIDTH)
    weights["text_embed.weight"] = draw(rng, (512, FEATURES), 1.0)
    norm("video_pos_embed.norm", WIDTH)
    linear("video_pos_embed.time_proj.0", WIDTH, 256)
    linear("video_pos_embed.time_proj.2", WIDTH, WIDTH)
    return weights


def phi_weights() -> Weights:
    """A text encoder, with the head that nobody reads."""
    rng = np.random.default_rng(28)
    weights: Weights = {"model.embed_tokens.weight": draw(rng, (VOCABULARY, FEATURES), 1.0)}

    def linear(name: str, outer: int, inner: int) -> None:
        weights[f"{name}.weight"] = draw(rng, (outer, inner), inner**-0.5)
        weights[f"{name}.bias"] = draw(rng, (outer,), 0.2)

    def norm(name: str) -> None:
        weights[f"{name}.weight"] = draw(rng, (FEATURES,), 0.2, mean=1.0)
        weights[f"{name}.bias"] = draw(rng, (FEATURES,), 0.2)

    for n in range(PHI_LAYERS):
        layer = f"model.layers.{n}"
        for part in ("q_proj", "k_proj", "v_proj", "dense"):
            linear(f"{layer}.self_attn.{part}", FEATURES, FEATURES)
        linear(f"{layer}.mlp.fc1", PHI_HIDDEN, FEATURES)
        linear(f"{layer}.mlp.fc2", FEATURES, PHI_HIDDEN)
        norm(f"{layer}.input_layernorm")
    norm("model.final_layernorm")
    linear("lm_head", VOCABULARY, FEATURES)
    return weights


def vae_weights() -> Weights:
    """A KL autoencoder in diffusers' layout."""
    layers, last = Layers(21), len(VAE_WIDTHS) - 1

    def linear(name: str, width: int) -> None:
        layers.weights[f"{name}.weight"] = draw(layers.rng, (width, width), width**-0.5)
        layers.weights[f"{name}.bias"] = draw(layers.rng, (width,), 0.1)

    def residual(name: str, inner: int, outer: int) -> None:
        layers.norm(f"{name}.norm1", inner)
        layers.conv(f"{name}.conv1", outer, inner, 3)
        layers.norm(f"{name}.norm2", outer)
        layers.conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            layers.conv(f"{name}.conv_shortcut", outer, inner)

    def middle(name: str) -> None:
        width = VAE_WIDTHS[-1]
        residual(f"{name}.resnets.0", width, width)
        layers.norm(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            linear(f"{name}.attentions.0.{part}", width)
        residual(f"{name}.resnets.1", width, width)

    layers.conv("encoder.conv_in", VAE_WIDTHS[0], 3, 3)
    for n, width in enumerate(VAE_WIDTHS):
        for i in range(VAE_BLOCKS):
            residual(f"encoder.down_blocks.{n}.resnets.{i}", width if i else VAE_WIDTHS[max(n - 1, 0)], width)
        if n != last:
            layers.conv(f"encoder.down_blocks.{n}.downsamplers.0.conv", width, width, 3)
    middle("encoder.mid_block")
    layers.norm("encoder.conv_norm_out", VAE_WIDTHS[-1])
    layers.conv("encoder.conv_out", 2 * CHANNELS, VAE_WIDTHS[-1], 3)
    widths = VAE_WIDTHS[::-1]
    layers.conv("decoder.conv_in", widths[0], CHANNELS, 3)
    middle("decoder.mid_block")
    for n, width in enumerate(widths):
        for i in range(VAE_BLOCKS + 1):
            residual(f"decoder.up_blocks.{n}.resnets.{i}", width if i else widths[max(n - 1, 0)], width)
        if n != last:
            layers.conv(f"decoder.up_blocks.{n}.upsamplers.0.conv", width, width, 3)
    layers.norm("decoder.conv_norm_out", widths[-1])
    layers.conv("decoder.conv_out", 3, widths[-1], 3)
    layers.conv("quant_conv", 2 * CHANNELS, 2 * CHANNELS)
    layers.conv("post_quant_conv", CHANNELS, CHANNELS)
    return layers.weights

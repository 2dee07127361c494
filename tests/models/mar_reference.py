"""What the published MAR computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/LTH14/mar at commit fe470ac (2024-09-27, MIT) with the
weights that `mar_weights()` and `vae_weights()` make again here. Upstream's files ran in eval mode, float32, on the CPU
with torch 2.13, timm 0.9.12 and one thread; its calls of `.cuda()` did nothing, and its random numbers were replaced:
the orders by `orders()`, the noise by `noise()`. None of its code is here, only its key names and shapes.
`tests/drawn.py` says how weights are drawn and what the digests are for.

    mar    width 24, 3 heads of 8, 2 + 3 layers, feed-forward 96, SIDE x SIDE tokens of 16 numbers, 3 copies of the
           class, 10 classes; diffusion head 16 x 2, DENOISING steps
    vae    ch 32, so 32 32 64, two halvings, z 16; GroupNorm has 32 groups everywhere, as published; attention in the
           encoder's lowest level and both middles

A run is upstream's sample_tokens(num_iter=STEPS, labels=LABELS) with the settings of RUNS. In each step tokens are
drawn in ascending place, image by image; with guidance the unconditional rows follow.

    mar_digest, vae_digest  uint8 32  digests of the weights
    x_latents    float32 2 16 6 6     what run x draws; x_conditions float32 n 24, z of all steps one after the other
    t100_map     int64 100            timesteps of 100 denoising steps, first to last
    t100_tables  float64 6 100        upstream's sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod,
                                      posterior_mean_coef1, posterior_mean_coef2, posterior_log_variance_clipped and
                                      log betas of each
    t25_…, t7_…                       likewise
    vae_picture  float32 2 3 24 24    the decoded latents of run "linear", times VAE_SCALE, before (x + 1) / 2
    vae_mean     float32 2 16 6 6     the mean that the encoder gives for `pictures()`
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.drawn import Layers, Weights, draw

WIDTH, HEADS, ENCODER, DECODER, CLASSES = 24, 3, 2, 3, 10
SIDE, COPIES, NUMBERS = 6, 3, 16
TOKENS = SIDE * SIDE
HEAD_WIDTH, HEAD_BLOCKS, DENOISING = 16, 2, 6
STEPS, LABELS = 8, (3, 7)
RUNS: dict[str, dict[str, Any]] = {
    "linear": {"cfg": 2.7},
    "constant": {"cfg": 1.5, "cfg_schedule": "constant", "temperature": 0.9},
    "unguided": {"cfg": 1.0},
}
CHANNELS, MULTIPLIERS, BLOCKS = 32, (1, 1, 2), 2
VAE_SCALE = 1e-3  # random weights draw numbers of this size's inverse
FIXTURE = Path(__file__).parents[1] / "fixtures" / "mar.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def orders() -> Tensor:
    """Upstream's orders of two pictures, whose places are drawn from the end: int64 2 36."""
    rng = np.random.default_rng(12)
    return torch.from_numpy(np.stack([rng.permutation(TOKENS) for _ in LABELS]))


def noise() -> Tensor:
    """Stands for normal noise of each place: to begin with, then of each denoising step: float32 2 36 7 16."""
    return draw(np.random.default_rng(13), (len(LABELS), TOKENS, 1 + DENOISING, NUMBERS), 1.0)


def pictures() -> Tensor:
    """Two random pictures in -1..1."""
    return draw(np.random.default_rng(14), (2, 3, 4 * SIDE, 4 * SIDE), 0.5)


def mar_weights() -> Weights:
    """All that a published file holds."""
    rng = np.random.default_rng(10)
    weights: Weights = {}

    def linear(name: str, outer: int, inner: int, gain: float = 1.0) -> None:
        weights[f"{name}.weight"] = draw(rng, (outer, inner), gain * inner**-0.5)
        weights[f"{name}.bias"] = draw(rng, (outer,), 0.2)

    def norm(name: str, width: int) -> None:
        weights[f"{name}.weight"] = draw(rng, (width,), 0.2, mean=1.0)
        weights[f"{name}.bias"] = draw(rng, (width,), 0.2)

    def blocks(name: str, layers: int) -> None:
        for n in range(layers):
            norm(f"{name}.{n}.norm1", WIDTH)
            linear(f"{name}.{n}.attn.qkv", 3 * WIDTH, WIDTH, 2.0)
            linear(f"{name}.{n}.attn.proj", WIDTH, WIDTH)
            norm(f"{name}.{n}.norm2", WIDTH)
            linear(f"{name}.{n}.mlp.fc1", 4 * WIDTH, WIDTH)
            linear(f"{name}.{n}.mlp.fc2", WIDTH, 4 * WIDTH)

    slots = (1, COPIES + TOKENS, WIDTH)
    weights["class_emb.weight"] = draw(rng, (CLASSES, WIDTH), 1.0)
    weights["fake_latent"] = draw(rng, (1, WIDTH), 1.0)
    linear("z_proj", WIDTH, NUMBERS)
    norm("z_proj_ln", WIDTH)
    weights["encoder_pos_embed_learned"] = draw(rng, slots, 0.7)
    blocks("encoder_blocks", ENCODER)
    norm("encoder_norm", WIDTH)
    linear("decoder_embed", WIDTH, WIDTH)
    weights["mask_token"] = draw(rng, (1, 1, WIDTH), 1.0)
    weights["decoder_pos_embed_learned"] = draw(rng, slots, 0.7)
    blocks("decoder_blocks", DECODER)
    norm("decoder_norm", WIDTH)
    weights["diffusion_pos_embed_learned"] = draw(rng, (1, TOKENS, WIDTH), 0.7)
    net = "diffloss.net"
    linear(f"{net}.time_embed.mlp.0", HEAD_WIDTH, 256, 3.0)
    linear(f"{net}.time_embed.mlp.2", HEAD_WIDTH, HEAD_WIDTH)
    linear(f"{net}.cond_embed", HEAD_WIDTH, WIDTH)
    linear(f"{net}.input_proj", HEAD_WIDTH, NUMBERS)
    for n in range(HEAD_BLOCKS):
        norm(f"{net}.res_blocks.{n}.in_ln", HEAD_WIDTH)
        linear(f"{net}.res_blocks.{n}.mlp.0", HEAD_WIDTH, HEAD_WIDTH)
        linear(f"{net}.res_blocks.{n}.mlp.2", HEAD_WIDTH, HEAD_WIDTH)
        linear(f"{net}.res_blocks.{n}.adaLN_modulation.1", 3 * HEAD_WIDTH, HEAD_WIDTH)
    linear(f"{net}.final_layer.linear", 2 * NUMBERS, HEAD_WIDTH)
    linear(f"{net}.final_layer.adaLN_modulation.1", 2 * HEAD_WIDTH, HEAD_WIDTH)
    return weights


def vae_weights() -> Weights:
    layers = Layers(11)
    widths = [CHANNELS * times for times in MULTIPLIERS]
    last = len(widths) - 1

    def middle(name: str) -> None:
        layers.residual(f"{name}.block_1", widths[-1], widths[-1])
        layers.attention(f"{name}.attn_1", widths[-1])
        layers.residual(f"{name}.block_2", widths[-1], widths[-1])

    layers.conv("encoder.conv_in", widths[0], 3, 3)
    for n, width in enumerate(widths):
        for i in range(BLOCKS):
            layers.residual(f"encoder.down.{n}.block.{i}", width if i else widths[max(n - 1, 0)], width)
            if n == last:
                layers.attention(f"encoder.down.{n}.attn.{i}", width)
        if n != last:
            layers.conv(f"encoder.down.{n}.downsample.conv", width, width, 3)
    middle("encoder.mid")
    layers.norm("encoder.norm_out", widths[-1])
    layers.conv("encoder.conv_out", 2 * NUMBERS, widths[-1], 3)
    layers.conv("decoder.conv_in", widths[-1], NUMBERS, 3)
    middle("decoder.mid")
    for n, width in enumerate(widths):
        for i in range(BLOCKS + 1):
            layers.residual(f"decoder.up.{n}.block.{i}", width if i else widths[min(n + 1, last)], width)
        if n:
            layers.conv(f"decoder.up.{n}.upsample.conv", width, width, 3)
    layers.norm("decoder.norm_out", widths[0])
    layers.conv("decoder.conv_out", 3, widths[0], 3)
    layers.conv("quant_conv", 2 * NUMBERS, 2 * NUMBERS)
    layers.conv("post_quant_conv", NUMBERS, NUMBERS)
    return layers.weights

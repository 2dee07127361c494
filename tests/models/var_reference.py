"""What the published VAR computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/FoundationVision/VAR at commit 78b9539 (2025-11-10,
MIT) with the weights that `var_weights()` and `vae_weights()` make again here. Upstream's files ran as they are, in
eval mode, float32, on the CPU with torch 2.13 and one thread. None of its code is here, only its key names and shapes.
`tests/drawn.py` says how weights are drawn and what the digests are for.

    unit    width 64, 4 heads of 16, 3 layers, sides SIDES (ten scales, so that every choice among the four convolutions
            is that of the published files), 40 codes of 8 numbers, 10 classes and null; unit queries and keys
    shared  the same with one AdaLN projection for all layers (as var_d36)
    plain   the same without unit queries and keys
    vae     ch 32, so 32 32 64 64 128, z 8; GroupNorm has 32 groups everywhere, as published

A run is upstream's autoregressive_infer_cfg(label_B=LABELS, cfg=CFG, top_k=TOP_K, top_p=TOP_P), whose sampler was
replaced by one that hands out `tokens()` and writes down what it was given.

    x_digest       uint8 32           digest of the weights
    x_logits       float32 4 41 40    raw logits of every third token of all scales, conditional rows first
    x_guided       float32 2 41 40    the same after guidance
    unit_kept      bool 2 41 40       which codes top-k and top-p leave
    unit_inputs    float32 2 120 8    what the scales from the second on were asked with
    unit_canvas    float32 2 8 6 6    f_hat at the end
    smooth_canvas  float32 2 8 6 6    the same with more_smooth, the Gumbel noise made from `noise()`
    vae_digest     uint8 32
    vae_picture    float32 2 3 24 24  the picture of unit_canvas, every fourth pixel, before (x + 1) / 2
    vae_codes      int64 2 121        codes of `pictures()` at all scales
    vae_features   float32 2 8 6 6    quant_conv(encoder(pictures()))
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.drawn import Layers, Weights, draw

WIDTH, HEADS, LAYERS, CODES, CODE_DIM, CLASSES = 64, 4, 3, 40, 8, 10
SIDES = (1, 1, 2, 2, 3, 3, 4, 4, 5, 6)
TOKENS = sum(side * side for side in SIDES)
LABELS, CFG, TOP_K, TOP_P = (3, 7), 1.5, 12, 0.8
CHANNELS, MULTIPLIERS, BLOCKS = 32, (1, 1, 2, 2, 4), 2
EVERY = 3  # of the tokens' logits are recorded
FIXTURE = Path(__file__).parents[1] / "fixtures" / "var.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def var_weights(kind: str) -> Weights:
    """All that a published file holds, its buffers included."""
    rng = np.random.default_rng({"unit": 1, "shared": 2, "plain": 3}[kind])
    level = torch.cat([torch.full((side * side,), n) for n, side in enumerate(SIDES)])
    mask = torch.where(level[:, None] >= level, 0.0, float("-inf"))
    weights = {
        "pos_start": draw(rng, (1, 1, WIDTH), 0.5),
        "pos_1LC": draw(rng, (1, TOKENS, WIDTH), 0.5),
        "lvl_1L": level[None],
        "attn_bias_for_masking": mask[None, None],
        "word_embed.weight": draw(rng, (WIDTH, CODE_DIM), 0.4),
        "word_embed.bias": draw(rng, (WIDTH,), 0.2),
        "class_emb.weight": draw(rng, (CLASSES + 1, WIDTH), 1.0),
        "lvl_embed.weight": draw(rng, (len(SIDES), WIDTH), 0.5),
    }
    if kind == "shared":
        weights["shared_ada_lin.1.weight"] = draw(rng, (6 * WIDTH, WIDTH), 0.05)
        weights["shared_ada_lin.1.bias"] = draw(rng, (6 * WIDTH,), 0.3)
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        if kind == "shared":
            weights[f"{block}.ada_gss"] = draw(rng, (1, 1, 6, WIDTH), 0.5)
        if kind != "plain":
            weights[f"{block}.attn.scale_mul_1H11"] = draw(rng, (1, HEADS, 1, 1), 2.0, mean=3.0)  # some beyond ln 100
        weights |= {
            f"{block}.attn.q_bias": draw(rng, (WIDTH,), 0.3),
            f"{block}.attn.v_bias": draw(rng, (WIDTH,), 0.3),
            f"{block}.attn.zero_k_bias": torch.zeros(WIDTH),
            f"{block}.attn.mat_qkv.weight": draw(rng, (3 * WIDTH, WIDTH), 0.3),
            f"{block}.attn.proj.weight": draw(rng, (WIDTH, WIDTH), 0.15),
            f"{block}.attn.proj.bias": draw(rng, (WIDTH,), 0.2),
            f"{block}.ffn.fc1.weight": draw(rng, (4 * WIDTH, WIDTH), 0.15),
            f"{block}.ffn.fc1.bias": draw(rng, (4 * WIDTH,), 0.2),
            f"{block}.ffn.fc2.weight": draw(rng, (WIDTH, 4 * WIDTH), 0.1),
            f"{block}.ffn.fc2.bias": draw(rng, (WIDTH,), 0.2),
        }
        if kind != "shared":
            weights[f"{block}.ada_lin.1.weight"] = draw(rng, (6 * WIDTH, WIDTH), 0.05)
            weights[f"{block}.ada_lin.1.bias"] = draw(rng, (6 * WIDTH,), 0.5)
    return weights | {
        "head_nm.ada_lin.1.weight": draw(rng, (2 * WIDTH, WIDTH), 0.05),
        "head_nm.ada_lin.1.bias": draw(rng, (2 * WIDTH,), 0.3),
        "head.weight": draw(rng, (CODES, WIDTH), 0.3),
        "head.bias": draw(rng, (CODES,), 0.3),
    }


def vae_weights() -> Weights:
    layers = Layers(4)
    conv, norm, residual = layers.conv, layers.norm, layers.residual
    widths = [CHANNELS * multiplier for multiplier in MULTIPLIERS]

    def attention(name: str, channels: int) -> None:
        norm(f"{name}.norm", channels)
        conv(f"{name}.qkv", 3 * channels, channels)
        conv(f"{name}.proj_out", channels, channels)

    def middle(name: str) -> None:
        residual(f"{name}.block_1", widths[-1], widths[-1])
        attention(f"{name}.attn_1", widths[-1])
        residual(f"{name}.block_2", widths[-1], widths[-1])

    def levels(name: str, blocks: int, inner: list[int], resample: str, without: int) -> None:
        for n, width in enumerate(widths):
            for i in range(blocks):
                residual(f"{name}.{n}.block.{i}", width if i else inner[n], width)
                if n + 1 == len(widths):
                    attention(f"{name}.{n}.attn.{i}", width)
            if n != without:
                conv(f"{name}.{n}.{resample}.conv", width, width, 3)

    last = len(widths) - 1
    conv("encoder.conv_in", widths[0], 3, 3)
    levels("encoder.down", BLOCKS, [widths[0], *widths[:-1]], "downsample", last)
    middle("encoder.mid")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", CODE_DIM, widths[-1], 3)
    conv("decoder.conv_in", widths[-1], CODE_DIM, 3)
    middle("decoder.mid")
    levels("decoder.up", BLOCKS + 1, [*widths[1:], widths[-1]], "upsample", 0)
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0], 3)
    layers.weights["quantize.ema_vocab_hit_SV"] = torch.zeros(len(SIDES), CODES)
    layers.codebook(CODES, CODE_DIM, 0.5)
    for n in range(4):
        conv(f"quantize.quant_resi.qresi_ls.{n}", CODE_DIM, CODE_DIM, 3)
    conv("quant_conv", CODE_DIM, CODE_DIM, 3)
    conv("post_quant_conv", CODE_DIM, CODE_DIM, 3)
    return layers.weights


def tokens() -> Tensor:
    """Arbitrary codes of two pictures, all scales: int64 2 121."""
    return torch.from_numpy(np.random.default_rng(5).integers(0, CODES, (len(LABELS), TOKENS)))


def noise() -> Tensor:
    """Stands for exponential noise: float32 2 121 40, above 0."""
    return draw(np.random.default_rng(6), (len(LABELS), TOKENS, CODES), 0.28, mean=0.5)


def pictures() -> Tensor:
    """Two random pictures in -1..1."""
    return draw(np.random.default_rng(7), (2, 3, 16 * SIDES[-1], 16 * SIDES[-1]), 0.5)

"""What the published Infinity computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/FoundationVision/Infinity at commit 4c27bbb
(2025-11-10, MIT) with the weights that `weights()` and `vae_weights()` make again here. Upstream's files ran as they
are, in eval mode, float32, on the CPU with torch 2.13 and one thread, with three stand-ins: plain attention for
flash_attn, whose text attention was not rounded to bfloat16; no torch.compile; no random depth. Its fused norm was on,
as published: without it upstream rotates every scale by the places of the first. None of its code is here, only its key
names and shapes. `tests/drawn.py` says how weights are drawn and what the digests are for.

    upright  as the 2B: width 64, 4 heads of 16, 4 layers in 2 chunks, 8 bits; height over width 1.5 at 0.06M, guided
             away from the learned embedding
    lying    as the 8B: width 48, 2 heads of 24, 12 bits for 2 x 2 places of 3 channels, a VAE of factor 8; height over
             width 0.666 at 0.06M, guided away from another text

Text features have 256 numbers, which makes 2 heads of the pool; 16 slots, of which `LENGTHS` are words. The VAEs have
ch 32 at every level, and GroupNorm has 32 groups everywhere, as published.

A run is upstream's autoregressive_infer_cfg(cfg_list=[CFG], tau_list=[TAU], top_k=900, top_p=TOP_P,
cfg_insertion_layer=[0]) for one size, whose sampler was made to hand out `tokens()` after it had narrowed its choice.

    x_digest      uint8 32         digest of the weights; x_vae_digest: of the VAE's
    x_logits      float32 4 N 2d   raw logits of every 7th token of all scales, conditional rows first, then its pairs
    x_guided      float32 2 N 2d   the same after temperature and guidance
    x_kept        bool 2 N 2d      which outcomes top-p leaves
    x_inputs      float32 2 N d    what the scales from the second on were asked with, every 7th token
    x_canvas      float32 2 Z h w  the sum at the end
    x_picture     float32 2 3 h w  the picture of it, every 8th pixel, red first, before (x + 1) / 2
    x_features    float32 2 Z h w  the encoder's output for `pictures()`
    x_bits        bool 2 N d       its bits at all scales
    positions     uint8 P          row positions, then column positions, of all scales of all shapes, in upstream's
                                   order of shapes
    pyramids      uint8 15 13 2    sides of all scales of all shapes, likewise
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.drawn import Layers, Weights, draw

LAYERS, CHUNKS, CAPTION_DIM, SLOTS, LEVELS = 4, 2, 256, 16, 15
WIDTH = {"upright": 64, "lying": 48}
HEADS = {"upright": 4, "lying": 2}
HIDDEN = 256
CHANNELS = {"upright": 8, "lying": 3}
PATCH = {"upright": 1, "lying": 2}
SIDES = {
    "upright": ((1, 1), (2, 2), (3, 2), (6, 4), (9, 6), (15, 10), (21, 14)),
    "lying": ((1, 1), (2, 2), (2, 3), (4, 6), (6, 9), (10, 15), (14, 21)),
}
TOKENS = sum(rows * cols for rows, cols in SIDES["upright"])
LENGTHS, NEGATIVE_LENGTHS = (5, 9), (7, 3)  # tokens of each text
CFG, TAU, TOP_P = 3.0, 0.5, 0.97
BASE = 32  # channels of the VAEs
EVERY = 7
FIXTURE = Path(__file__).parents[1] / "fixtures" / "infinity.npz"


def bits(kind: str) -> int:
    return CHANNELS[kind] * PATCH[kind] ** 2


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def weights(kind: str) -> Weights:
    """All that a published file holds, its buffers included."""
    rng = np.random.default_rng({"upright": 1, "lying": 2}[kind])
    width, depth = WIDTH[kind], bits(kind)
    found: Weights = {}

    def linear(name: str, outer: int, inner: int, deviation: float, bias: float = 0.2) -> None:
        found[f"{name}.weight"] = draw(rng, (outer, inner), deviation)
        if bias:
            found[f"{name}.bias"] = draw(rng, (outer,), bias)

    found["cfg_uncond"] = draw(rng, (SLOTS, CAPTION_DIM), 1.0)
    found["pos_start"] = draw(rng, (1, 1, width), 0.5)
    found["text_norm.weight"] = draw(rng, (CAPTION_DIM,), 0.3, mean=1.0)
    pool = "text_proj_for_sos.ca"
    found[f"{pool}.mat_q"] = draw(rng, (1, CAPTION_DIM // 128, width // (CAPTION_DIM // 128)), 1.0)
    found[f"{pool}.v_bias"] = draw(rng, (width,), 0.3)
    found[f"{pool}.zero_k_bias"] = torch.zeros(width)
    linear(f"{pool}.mat_kv", 2 * width, CAPTION_DIM, 0.1, bias=0)
    linear(f"{pool}.proj", width, width, 0.2)
    linear("text_proj_for_ca.0", width, CAPTION_DIM, 0.08)
    linear("text_proj_for_ca.2", width, width, 0.15)
    found["lvl_embed.weight"] = draw(rng, (LEVELS, width), 0.5)
    linear("word_embed", width, depth, 0.6)
    linear("shared_ada_lin.1", 6 * width, width, 0.05, bias=0.3)
    for layer in range(LAYERS):
        block = f"block_chunks.{layer // (LAYERS // CHUNKS)}.module.{layer % (LAYERS // CHUNKS)}"
        found[f"{block}.ada_gss"] = draw(rng, (1, 1, 6, width), 0.5)
        found[f"{block}.sa.scale_mul_1H11"] = draw(rng, (1, HEADS[kind], 1, 1), 2.0, mean=3.0)  # some beyond ln 100
        for name in ("q_bias", "v_bias"):
            found[f"{block}.sa.{name}"] = draw(rng, (width,), 0.3)
        found[f"{block}.sa.zero_k_bias"] = torch.zeros(width)
        linear(f"{block}.sa.mat_qkv", 3 * width, width, 0.3, bias=0)
        linear(f"{block}.sa.proj", width, width, 0.15)
        found[f"{block}.ca.v_bias"] = draw(rng, (width,), 0.3)
        found[f"{block}.ca.zero_k_bias"] = torch.zeros(width)
        linear(f"{block}.ca.mat_q", width, width, 0.3)
        linear(f"{block}.ca.mat_kv", 2 * width, width, 0.3, bias=0)
        linear(f"{block}.ca.proj", width, width, 0.15)
        linear(f"{block}.ffn.fc1", HIDDEN, width, 0.15)
        linear(f"{block}.ffn.fc2", width, HIDDEN, 0.1)
        found[f"{block}.ca_norm.weight"] = draw(rng, (width,), 0.3, mean=1.0)
        found[f"{block}.ca_norm.bias"] = draw(rng, (width,), 0.3)
    linear("head_nm.ada_lin.1", 2 * width, width, 0.05, bias=0.3)
    linear("head", 2 * depth, width, 0.3)
    return found


def vae_weights(kind: str) -> Weights:
    """A published VAE's state dict: every convolution and norm wrapped, two names for a buffer, and no attention."""
    layers, count = Layers({"upright": 3, "lying": 4}[kind]), {"upright": 5, "lying": 4}[kind]
    conv, norm, residual, z = layers.conv, layers.norm, layers.residual, CHANNELS[kind]
    for part, blocks, resample, without in (
        ("encoder.down", 1, "downsample", count - 1),
        ("decoder.up", 2, "upsample", 0),
    ):
        network = part.partition(".")[0]
        conv(f"{network}.conv_in", BASE, 3 if network == "encoder" else z, 3)
        for n in range(count):
            for i in range(blocks):
                residual(f"{part}.{n}.block.{i}", BASE, BASE)
            if n != without:
                conv(f"{part}.{n}.{resample}.conv", BASE, BASE, 3)
        for name in ("block_1", "block_2"):
            residual(f"{network}.mid.{name}", BASE, BASE)
        norm(f"{network}.norm_out", BASE)
        conv(f"{network}.conv_out", z if network == "encoder" else 3, BASE, 3)
    wrapped = {}
    for key, tensor in layers.weights.items():
        name, _, last = key.rpartition(".")
        wrapped[f"{name}.{'norm' if 'norm' in name.rpartition('.')[2] else 'conv'}.{last}"] = tensor
    mask = 2 ** torch.arange(z - 1, -1, -1)
    return {**wrapped, "quantizer.lfq.mask": mask, "quantize.lfq.mask": mask}


def features(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Text features of two texts, float32 T 256 each."""
    rng = np.random.default_rng(5 + sum(lengths))
    return [draw(rng, (length, CAPTION_DIM), 0.3) for length in lengths]


def tokens(kind: str) -> Tensor:
    """Arbitrary tokens of two pictures, all scales: int64 2 533."""
    rng = np.random.default_rng(8)
    return torch.from_numpy(rng.integers(0, 2 ** bits(kind), (len(LENGTHS), TOKENS)))


def pictures(kind: str) -> Tensor:
    """Two random pictures in -1..1."""
    rows, cols = SIDES[kind][-1]
    return draw(np.random.default_rng(9), (2, 3, 16 * rows, 16 * cols), 0.5)

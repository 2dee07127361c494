"""What the published M-VAR computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/OliverRensu/MVAR at commit 80768a1 (no licence file;
the model's card says Apache-2.0) with the weights that `mvar_weights()` and var_reference's `vae_weights()` make again
here. Upstream's files ran as they are, in eval mode, float32, on the CPU with torch 2.13 and one thread. Two of the
packages it needs run on NVIDIA GPUs only, and their plain references stood in for them: attention by softmax for
flash_attn, and for mamba_ssm (https://github.com/state-spaces/mamba at commit e9594ce, Apache-2.0) its own module
Mamba2 with its own mamba_split_conv1d_scan_ref, selective_scan_ref and rms_norm_ref, which go through the sequence
token by token. None of this code is here, only key names and shapes.

    unit    width 64, 4 heads of 16, 3 layers, var_reference's scales, codes and classes; the state of each of 2 heads
            is 64 x 64, the convolution spans 4 tokens; unit queries and keys (published for d24 and d32)
    plain   the same without unit queries and keys (published for d16 and d20)

A run is upstream's autoregressive_infer_cfg(label_B=LABELS, cfg=CFG, top_k=TOP_K, top_p=TOP_P), whose sampler was
replaced by one that hands out var_reference's `tokens()` and writes down what it was given. Upstream keeps every hidden
state and scans all of them again at each scale.

    x_digest     uint8 32         digest of the weights
    x_logits     float32 4 41 40  raw logits of every third token of all scales, conditional rows first
    x_guided     float32 2 41 40  the same after guidance
    unit_canvas  float32 2 8 6 6  f_hat at the end
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.drawn import Weights, draw
from tests.models.var_reference import CLASSES, CODE_DIM, CODES, HEADS, LAYERS, SIDES, TOKENS, WIDTH

INNER, STATE, SSM_HEADS, SPAN = 2 * WIDTH, 64, 2 * WIDTH // 64, 4
FIXTURE = Path(__file__).parents[1] / "fixtures" / "mvar.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def mvar_weights(kind: str) -> Weights:
    """All that a published file holds, its buffers included."""
    rng = np.random.default_rng({"unit": 21, "plain": 22}[kind])
    level = torch.cat([torch.full((side * side,), n) for n, side in enumerate(SIDES)])
    mask = torch.where(level[:, None] == level, 0.0, float("-inf"))
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
    for layer in range(LAYERS):
        block = f"blocks.{layer}"
        if kind == "unit":
            weights[f"{block}.attn.scale_mul_1H11"] = draw(rng, (1, HEADS, 1, 1), 2.0, mean=3.0)  # some beyond ln 100
        weights |= {
            f"{block}.attn.q_bias": draw(rng, (WIDTH,), 0.3),
            f"{block}.attn.v_bias": draw(rng, (WIDTH,), 0.3),
            f"{block}.attn.zero_k_bias": torch.zeros(WIDTH),
            f"{block}.attn.patch_nums": torch.tensor([side * side for side in SIDES], dtype=torch.int32),
            f"{block}.attn.mat_qkv.weight": draw(rng, (3 * WIDTH, WIDTH), 0.3),
            f"{block}.attn.proj.weight": draw(rng, (WIDTH, WIDTH), 0.15),
            f"{block}.attn.proj.bias": draw(rng, (WIDTH,), 0.2),
            # Steps and decays such that some heads forget within a scale, and others remember several.
            f"{block}.mamba.dt_bias": draw(rng, (SSM_HEADS,), 1.0, mean=-2.0),
            f"{block}.mamba.A_log": draw(rng, (SSM_HEADS,), 0.8, mean=-1.0),
            f"{block}.mamba.D": draw(rng, (SSM_HEADS,), 0.4, mean=1.0),
            f"{block}.mamba.in_proj.weight": draw(rng, (2 * INNER + 2 * STATE + SSM_HEADS, WIDTH), 0.15),
            f"{block}.mamba.conv1d.weight": draw(rng, (INNER + 2 * STATE, 1, SPAN), 0.5),
            f"{block}.mamba.conv1d.bias": draw(rng, (INNER + 2 * STATE,), 0.2),
            f"{block}.mamba.norm.weight": draw(rng, (INNER,), 0.2, mean=1.0),
            f"{block}.mamba.out_proj.weight": draw(rng, (WIDTH, INNER), 0.1),
            f"{block}.ffn.fc1.weight": draw(rng, (4 * WIDTH, WIDTH), 0.15),
            f"{block}.ffn.fc1.bias": draw(rng, (4 * WIDTH,), 0.2),
            f"{block}.ffn.fc2.weight": draw(rng, (WIDTH, 4 * WIDTH), 0.1),
            f"{block}.ffn.fc2.bias": draw(rng, (WIDTH,), 0.2),
            f"{block}.ada_lin.1.weight": draw(rng, (9 * WIDTH, WIDTH), 0.05),
            f"{block}.ada_lin.1.bias": draw(rng, (9 * WIDTH,), 0.5),
        }
    return weights | {
        "head_nm.ada_lin.1.weight": draw(rng, (2 * WIDTH, WIDTH), 0.05),
        "head_nm.ada_lin.1.bias": draw(rng, (2 * WIDTH,), 0.3),
        "head.weight": draw(rng, (CODES, WIDTH), 0.3),
        "head.bias": draw(rng, (CODES,), 0.3),
    }

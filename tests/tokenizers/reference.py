"""What published tokenizers compute for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from the published code of

    movq   github.com/Alpha-VLLM/Lumina-mGPT-2.0 at commit f44a4d7 (2025-08-03), lumina_mgpt/movqgan: its Encoder,
           MOVQDecoder and VectorQuantizer2, put together as its MOVQ does
    emu3   github.com/baaivision/Emu3 at commit f6ea9aa (2024-10-24), emu3/tokenizer: Emu3VisionVQModel
    ibq    github.com/baaivision/Emu3.5 at commit 8fcf1da (2025-12-30), src/vision_tokenizer: IBQ

which ran as it is, float32, on the CPU with torch 2.13 and one thread. None of it is here, only key names and shapes.

Weights. `weights(kind)` draws a state dict in the published layout and in dictionary order from
`numpy.random.default_rng(SEED)`, as llamagen_reference does. The fixture holds the digest of what was used, so that
other weights are never compared.

    ch 128, ch_mult [1, 1, 2] (two halvings), one residual block a level in the encoder and two in the decoder,
    attention at the lowest resolution and in the middle; movq and emu3: z 4, codebook 64 x 4; ibq: z 32, 64 x 24

Arrays, each with its kind in front (movq_digest, …).

    digest                  uint8 32
    codes_square, _wide     int64 1 4 4 and 1 3 5: arbitrary codes
    decoded_square, _wide   float32 1 3 16 16 and 1 3 12 20: not clamped; of emu3 the first of four frames
    picture                 float32 1 3 16 24: a random picture in -1..1
    codes                   int64 1 4 6: the codes that encoding it chose
    margin                  float32 1 4 6: by how much the second best entry was worse, in squared distance, for ibq in
                            dot product
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from tests.drawn import Layers, Weights, draw

CODES, CODE_DIM, Z = 64, {"movq": 4, "emu3": 4, "ibq": 24}, {"movq": 4, "emu3": 4, "ibq": 32}
WIDTHS = (128, 128, 256)  # of the levels, full resolution first
BLOCKS = 1  # of the encoder's levels
KINDS = tuple(CODE_DIM)
SEED = 7

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tokenizers.npz"


def reference(kind: str) -> dict[str, np.ndarray]:
    """Every recorded array of a kind, by the names above."""
    with np.load(FIXTURE) as arrays:
        return {name.removeprefix(f"{kind}_"): arrays[name] for name in arrays if name.startswith(f"{kind}_")}


@cache
def weights(kind: str, widths: tuple[int, ...] = WIDTHS) -> Weights:
    """State dict in the published layout: level 0 is the full resolution in both halves. Others than WIDTHS are not
    recorded."""
    code_dim, z = CODE_DIM[kind], Z[kind]
    layers = Layers(SEED, code_dim if kind != "ibq" else 0)
    conv, norm, residual = layers.conv, layers.norm, layers.residual
    last = len(widths) - 1

    def middle(name: str) -> None:
        residual(f"{name}.block_1", widths[-1], widths[-1])
        layers.attention(f"{name}.attn_1", widths[-1])
        residual(f"{name}.block_2", widths[-1], widths[-1])

    def level(name: str, inner: int, outer: int, count: int, lowest: bool, resample: str) -> None:
        for i in range(count):
            residual(f"{name}.block.{i}", outer if i else inner, outer)
            if lowest:
                layers.attention(f"{name}.attn.{i}", outer)
        if resample:
            conv(f"{name}.{resample}.conv", outer, outer, 3)

    def conv_in_time(name: str, time: int, side: int = 3) -> None:
        deviation = 2 * (z * time * side * side) ** -0.5
        layers.weights[f"{name}.weight"] = draw(layers.rng, (z, z, time, side, side), deviation)
        layers.weights[f"{name}.bias"] = draw(layers.rng, (z,), 0.1)

    def in_time(name: str, time: int) -> None:
        for i in range(BLOCKS):
            for n in (1, 2):
                block = f"{name}.time_res_stack.{i}"
                for kind, mean in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
                    layers.weights[f"{block}.norm{n}.{kind}"] = draw(layers.rng, (z,), 0.2, mean)
                conv_in_time(f"{block}.conv{n}.conv", 3)
        for i in range(2):
            conv_in_time(f"{name}.time_conv.{i}.conv.conv", time)

    conv("encoder.conv_in", widths[0], 3, 3)
    for i, width in enumerate(widths):
        resample = "downsample" if i < last else ""
        level(f"encoder.down.{i}", widths[max(i - 1, 0)], width, BLOCKS, i == last, resample)
    middle("encoder.mid")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", z, widths[-1], 3)

    conv("decoder.conv_in", widths[-1], z, 3)
    middle("decoder.mid")
    for i, width in enumerate(widths):
        inner = widths[min(i + 1, last)]
        level(f"decoder.up.{i}", inner, width, BLOCKS + 1, i == last, "upsample" if i else "")
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0], 3)

    layers.codebook(CODES, code_dim, 0.4 if kind != "emu3" else 0.2)
    if kind == "emu3":
        in_time("encoder", 4)
        in_time("decoder", 3)
        conv_in_time("quant_conv.conv", 3, 1)
        conv_in_time("post_quant_conv.conv", 3, 1)
    else:
        conv("quant_conv", code_dim, z)
        conv("post_quant_conv", z, code_dim)
    return layers.weights

"""What the published LlamaGen computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded once from https://github.com/FoundationVision/LlamaGen at commit ce98ec4
(2024-06-30, MIT) with the weights that `c2i_weights()`, `t2i_weights()` and `vq_weights()` make again here, so a test
compares our code with the published one without needing it. Upstream's files ran as they are, in eval mode, float32, on
the CPU with torch 2.13 and one thread. None of its code is here, only its key names and shapes.

Weights. State dicts drawn in dictionary order from `numpy.random.default_rng(seed)`: uniform numbers of a given mean
and deviation, which need nobody's sine or logarithm and so come out as the same bits everywhere. The fixture holds
the `digest` of what was used; where it differs from the digest of what is made here, the weights are not the
recorded ones and no comparison means anything.

    c2i   dim 64, 4 heads of 16, 3 layers, feed-forward 256, vocabulary 96, 10 classes and null, block_size 36
    t2i   the same body, 120 caption slots of 32 numbers (`caption_dim`; 2048 in the published files)
    vq    ch 128, ch_mult [1, 2] (so one halving), one residual block a level in the encoder and two in the decoder,
          z 32, codebook 64 x 8. The entries are not of unit length: a look-up that forgets to normalise is caught.
          Upstream's `VQModel` has no argument for the number of blocks; its own `Encoder` and `Decoder`, built with
          num_res_blocks=1, were put into it.

Neither the head count nor the grid is in a LlamaGen file: HEADS and GRID say them.

Arrays. A batch of 4 is guidance as upstream runs it: two conditional rows, then the unconditional row of each.
`x` is c2i (labels LABELS) or t2i (`captions()`).

    x_digest      uint8 32          digest of the weights (t2i: and of "captions" and "lengths", in this order)
    x_tokens      int64 2 36        arbitrary ids, each fed to both rows of its pair; the last is not fed
    x_logits      float32 4 36 96   raw, before guidance: [:, 0] from the prefill, [:, i] from the step that was fed
                                    tokens[:, i - 1], through upstream's own full cache
    x_greedy      int64 2 36        upstream's generate(cfg_scale=SCALE, sample_logits=False)
    x_margin      float32 2 36      how far the chosen logit was ahead of the second, after guidance
    x_greedy_interval, x_margin_interval    the same with cfg_interval=INTERVAL: tokens 0 .. INTERVAL + 1 are guided,
                                    the rest come from the conditional rows alone

    vq_digest                       uint8 32
    vq_codes_square, vq_codes_wide  int64 1 4 4 and 1 3 5: arbitrary codes
    vq_decoded_square, _wide        float32 1 3 8 8 and 1 3 6 10: `decode_code` of them, not clamped
    vq_picture                      float32 1 3 16 24: a random picture in -1..1
    vq_features                     float32 1 8 8 12: `quant_conv(encoder(picture))`, not yet of unit length
    vq_codes                        int64 1 8 12: the entries `encode(picture)` chose
    vq_margin                       float32 1 8 12: how much further the second nearest entry was (squared distance
                                    between unit vectors)
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tests.drawn import Layers, Weights, draw

DIM, HEADS, LAYERS, FEED_FORWARD, VOCABULARY = 64, 4, 3, 256, 96
GRID = 6  # tokens along each side
CLASSES = 10  # row CLASSES of the table is the null class
LABELS = (3, 7)
SCALE = 3.0
INTERVAL = 10

PREFIX = 120  # caption slots
CAPTION_DIM = 32
LENGTHS = (5, 17)  # how many of the slots are words

CODES, CODE_DIM, Z = 64, 8, 32
WIDTHS = (128, 256)  # of the encoder's levels, full resolution first
BLOCKS = 1

C2I_SEED, T2I_SEED, CAPTION_SEED, VQ_SEED = 4, 3, 103, 0

FIXTURE = Path(__file__).parents[1] / "fixtures" / "llamagen.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def c2i_weights(seed: int = C2I_SEED) -> Weights:
    rng = np.random.default_rng(seed)
    return {"cls_embedding.embedding_table.weight": draw(rng, (CLASSES + 1, DIM), 1.0)} | _body(rng)


def t2i_weights(seed: int = T2I_SEED) -> Weights:
    rng = np.random.default_rng(seed)
    return {
        "cls_embedding.uncond_embedding": draw(rng, (PREFIX, CAPTION_DIM), 1.0),
        "cls_embedding.cap_proj.fc1.weight": draw(rng, (DIM, CAPTION_DIM), 0.2),
        "cls_embedding.cap_proj.fc2.weight": draw(rng, (DIM, DIM), 0.2),
    } | _body(rng)


def captions(seed: int = CAPTION_SEED) -> tuple[Tensor, Tensor]:
    """Features float32 2 120 32 and lengths int64 2: what upstream's sampler hands to `generate`.

    The words stand at the end, in order, behind zeros. Upstream gets there from the text encoder's right-padded output
    by turning each row until its words are last, reversing the mask and multiplying by it; the mask given to `generate`
    is 1.0 exactly at the last `length` slots.
    """
    rng = np.random.default_rng(seed)
    features = torch.zeros(len(LENGTHS), PREFIX, CAPTION_DIM)
    for row, length in zip(features, LENGTHS, strict=True):
        row[PREFIX - length :] = draw(rng, (length, CAPTION_DIM), 1.0)
    return features, torch.tensor(LENGTHS)


def vq_weights(seed: int = VQ_SEED) -> Weights:
    layers = Layers(seed)
    conv, norm, residual, attention = layers.conv, layers.norm, layers.residual, layers.attention

    def level(name: str, inner: int, outer: int, blocks: int, resample: str) -> None:
        lowest = outer == WIDTHS[-1]
        for i in range(blocks):
            residual(f"{name}.res.{i}", outer if i else inner, outer)
            if lowest:
                attention(f"{name}.attn.{i}", outer)
        if resample:
            conv(f"{name}.{resample}.conv", outer, outer, 3)

    def middle(name: str) -> None:
        residual(f"{name}.0", WIDTHS[-1], WIDTHS[-1])
        attention(f"{name}.1", WIDTHS[-1])
        residual(f"{name}.2", WIDTHS[-1], WIDTHS[-1])

    conv("encoder.conv_in", WIDTHS[0], 3, 3)
    level("encoder.conv_blocks.0", WIDTHS[0], WIDTHS[0], BLOCKS, "downsample")
    level("encoder.conv_blocks.1", WIDTHS[0], WIDTHS[1], BLOCKS, "")
    middle("encoder.mid")
    norm("encoder.norm_out", WIDTHS[1])
    conv("encoder.conv_out", Z, WIDTHS[1], 3)

    conv("decoder.conv_in", WIDTHS[1], Z, 3)
    middle("decoder.mid")
    level("decoder.conv_blocks.0", WIDTHS[1], WIDTHS[1], BLOCKS + 1, "upsample")
    level("decoder.conv_blocks.1", WIDTHS[1], WIDTHS[0], BLOCKS + 1, "")
    norm("decoder.norm_out", WIDTHS[0])
    conv("decoder.conv_out", 3, WIDTHS[0], 3)

    layers.codebook(CODES, CODE_DIM, 1.0)
    layers.weights["quantize.codebook_used"] = torch.zeros(65536)  # a training counter; published files carry it
    conv("quant_conv", CODE_DIM, Z)
    conv("post_quant_conv", Z, CODE_DIM)
    return layers.weights


def _body(rng: np.random.Generator) -> Weights:
    weights = {"tok_embeddings.weight": draw(rng, (VOCABULARY, DIM), 1.0)}
    for i in range(LAYERS):
        weights |= {
            f"layers.{i}.attention.wqkv.weight": draw(rng, (3 * DIM, DIM), 0.15),
            f"layers.{i}.attention.wo.weight": draw(rng, (DIM, DIM), 0.15),
            f"layers.{i}.feed_forward.w1.weight": draw(rng, (FEED_FORWARD, DIM), 0.15),
            f"layers.{i}.feed_forward.w3.weight": draw(rng, (FEED_FORWARD, DIM), 0.15),
            f"layers.{i}.feed_forward.w2.weight": draw(rng, (DIM, FEED_FORWARD), 0.075),
            f"layers.{i}.attention_norm.weight": draw(rng, (DIM,), 0.1, mean=1.0),
            f"layers.{i}.ffn_norm.weight": draw(rng, (DIM,), 0.1, mean=1.0),
        }
    return weights | {
        "norm.weight": draw(rng, (DIM,), 0.1, mean=1.0),
        "output.weight": draw(rng, (VOCABULARY, DIM), 0.15),
    }

"""What Chameleon's published VQ computes for small random weights: the other half of a parity test.

`reference()` holds numbers recorded from https://github.com/Alpha-VLLM/Lumina-mGPT at commit 104abe45 (2024-08-17),
whose `lumina_mgpt/model/chameleon_vae_ori/vqgan.py` (Meta's, from taming-transformers) ran as it is, float32, on the
CPU with torch 2.13 and one thread. None of its code is here, only its key names and shapes. To record anew:

    python -m tests.lumina_reference PATH_TO/Lumina-mGPT

Weights. A state dict drawn in dictionary order from `numpy.random.default_rng(VQ_SEED)`, as llamagen_reference does.
The fixture holds the digest of what was used, so that other weights are never compared.

    ch 128, ch_mult [1, 1, 2] (two halvings), one residual block a level in the encoder and two in the decoder, no
    attention but in the middle, z 32, codebook 64 x 24. The entries are of unequal length: a look-up that normalises
    them, as LlamaGen's does, is caught. `loss.logvar` is one of the keys of training that published files carry.

Arrays.

    vq_digest                       uint8 32
    vq_codes_square, vq_codes_wide  int64 1 4 4 and 1 3 5: arbitrary codes
    vq_decoded_square, _wide        float32 1 3 16 16 and 1 3 12 20: `decode(get_codebook_entry(codes))`, not clamped
    vq_picture                      float32 1 3 16 24: a random picture in -1..1
    vq_features                     float32 1 24 4 6: `quant_conv(encoder(picture))`
    vq_codes                        int64 1 4 6: the entries `encode(picture)` chose
    vq_margin                       float32 1 4 6: how much further (squared) the second nearest entry was
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import torch

from tests.drawn import Layers, Weights, digest

CODES, CODE_DIM, Z = 64, 24, 32
WIDTHS = (128, 128, 256)  # of the levels, full resolution first
BLOCKS = 1  # of the encoder's levels
VQ_SEED, DATA_SEED = 6, 106

FIXTURE = Path(__file__).parents[1] / "fixtures" / "lumina_vq.npz"


def reference() -> dict[str, np.ndarray]:
    """Every recorded array, by the names above."""
    with np.load(FIXTURE) as arrays:
        return dict(arrays)


def vq_weights(
    widths: tuple[int, ...] = WIDTHS, blocks: int = BLOCKS, codes: int = CODES, code_dim: int = CODE_DIM, z: int = Z
) -> Weights:
    """State dict in the published layout: level 0 is the full resolution in both halves."""
    layers = Layers(VQ_SEED)
    conv, norm, residual = layers.conv, layers.norm, layers.residual
    last = len(widths) - 1

    def middle(name: str) -> None:
        residual(f"{name}.block_1", widths[-1], widths[-1])
        layers.attention(f"{name}.attn_1", widths[-1])
        residual(f"{name}.block_2", widths[-1], widths[-1])

    def level(name: str, inner: int, outer: int, count: int, resample: str) -> None:
        for i in range(count):
            residual(f"{name}.block.{i}", outer if i else inner, outer)
        if resample:
            conv(f"{name}.{resample}.conv", outer, outer, 3)

    conv("encoder.conv_in", widths[0], 3, 3)
    for i, width in enumerate(widths):
        level(f"encoder.down.{i}", widths[max(i - 1, 0)], width, blocks, "downsample" if i < last else "")
    middle("encoder.mid")
    norm("encoder.norm_out", widths[-1])
    conv("encoder.conv_out", z, widths[-1], 3)

    conv("decoder.conv_in", widths[-1], z, 3)
    middle("decoder.mid")
    for i, width in enumerate(widths):
        level(f"decoder.up.{i}", widths[min(i + 1, last)], width, blocks + 1, "upsample" if i else "")
    norm("decoder.norm_out", widths[0])
    conv("decoder.conv_out", 3, widths[0], 3)

    layers.codebook(codes, code_dim, 0.4)
    conv("quant_conv", code_dim, z)
    conv("post_quant_conv", z, code_dim)
    layers.weights["loss.logvar"] = torch.zeros(())
    return layers.weights


@torch.inference_mode()
def record(upstream: Path) -> None:
    """Run the published code on these weights and write the fixture."""
    torch.set_num_threads(1)
    path = upstream / "lumina_mgpt" / "model" / "chameleon_vae_ori" / "vqgan.py"
    spec = importlib.util.spec_from_file_location("vqgan", path)
    vqgan = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(vqgan)
    config = {
        "ch": WIDTHS[0], "ch_mult": [w // WIDTHS[0] for w in WIDTHS], "num_res_blocks": BLOCKS, "out_ch": 3,
        "in_channels": 3, "resolution": 16, "attn_resolutions": [], "z_channels": Z, "double_z": False,
    }  # fmt: skip
    model = vqgan.VQModel(config, n_embed=CODES, embed_dim=CODE_DIM).eval()
    weights = vq_weights()
    left, unknown = model.load_state_dict(weights, strict=False)
    assert not left and unknown == ["loss.logvar"]
    rng = np.random.default_rng(DATA_SEED)
    arrays = {"vq_digest": digest(weights)}
    for name, (rows, cols) in {"square": (4, 4), "wide": (3, 5)}.items():
        codes = torch.from_numpy(rng.integers(0, CODES, (1, rows, cols)))
        entries = model.quantize.get_codebook_entry(codes.flatten(), (1, rows, cols, CODE_DIM))
        arrays |= {f"vq_codes_{name}": codes.numpy(), f"vq_decoded_{name}": model.decode(entries).numpy()}
    picture = torch.from_numpy((rng.random((1, 3, 16, 24)) * 2 - 1).astype(np.float32))
    features = model.quant_conv(model.encoder(picture))
    _, _, (_, _, chosen) = model.encode(picture)
    distances = torch.cdist(features.permute(0, 2, 3, 1).flatten(0, 2), weights["quantize.embedding.weight"]) ** 2
    nearest = distances.topk(2, largest=False).values
    arrays |= {
        "vq_picture": picture.numpy(), "vq_features": features.numpy(), "vq_codes": chosen.view(1, 4, 6).numpy(),
        "vq_margin": (nearest[:, 1] - nearest[:, 0]).view(1, 4, 6).numpy(),
    }  # fmt: skip
    np.savez_compressed(FIXTURE, **arrays)


if __name__ == "__main__":
    record(Path(sys.argv[1]))

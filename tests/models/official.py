"""Small random checkpoints laid out, nested and named as LlamaGen published its own.

python -m tests.official FOLDER      writes ComfyUI's models folder: decoders for classes and for texts, their
                                     tokenizers and a text encoder

Widths of decoders are published ones, as the number of heads is read off them; there are only fewer layers. Tokenizers
have all published levels and codes, but fewer channels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linear_core.grid import Grid
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.tokenizers.tokenizer import VQConfig, VQTokenizer

CODES = 16384
CONFIG = '{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}'


def decoder(kind: str, layers: int = 2, width: int = 768, hidden: int = 2048, codes: int = CODES) -> dict[str, Tensor]:
    """State dict of a decoder with `width` / 64 heads."""
    what = {"classes": 1000} if kind == "c2i" else {"caption_dim": 2048, "caption_slots": 120}
    return _random(LlamaGen(LlamaGenConfig(layers, width, width // 64, hidden, codes, **what), Grid(1, 1)))


def tokenizer(factor: int = 16, channels: int = 32, codes: int = CODES) -> dict[str, Tensor]:
    """State dict of a VQ tokenizer of 16 or 8 pixels a token, with the counter that published files carry."""
    multiples = {16: (1, 1, 2, 2, 4), 8: (1, 2, 2, 4)}[factor]
    widths = tuple(channels * m for m in multiples)
    network = VQTokenizer(VQConfig(codes, 8, 2 * channels, widths[::-1], 3, True, widths, 2))
    return _random(network) | {"quantize.codebook_used": nn.Parameter(torch.zeros(65536))}


def training(weights: dict[str, Tensor]) -> dict[str, object]:
    """What LlamaGen's training script saves (vq_ds16_c2i_training.pt): discriminator, optimizers, arguments too."""
    return {
        "model": weights,
        "optimizer": {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.zeros(4)}}, "param_groups": []},
        "discriminator": {"main.0.weight": torch.zeros(4, 3, 4, 4)},
        "optimizer_disc": {"state": {}, "param_groups": [{"lr": 1e-4, "betas": (0.9, 0.95)}]},
        "steps": 3,
        "args": argparse.Namespace(codebook_size=CODES, data_path="train", ema=False),
        "ema": {"encoder.conv_in.weight": torch.zeros(1)},
    }


def _random(network: nn.Module) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(0)
    weights = {}
    for name, tensor in network.state_dict().items():
        noise = torch.randn(tensor.shape, generator=source)
        deviation = 1 / max(1, tensor[0].numel()) ** 0.5 if tensor.ndim > 1 else 0.1
        weights[name] = noise * deviation + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def text_encoder(width: int = 2048, vocabulary: int = 32128) -> dict[str, Tensor]:
    """State dict of a FLAN-T5 encoder of one layer and the published width, so that it fits any model for texts."""
    heads, head, hidden = 2, 8, 32
    shapes = {"shared.weight": (vocabulary, width), "encoder.final_layer_norm.weight": (width,)}
    attention, forward = "encoder.block.0.layer.0", "encoder.block.0.layer.1"
    shapes |= {f"{attention}.SelfAttention.{part}.weight": (heads * head, width) for part in "qkv"}
    shapes |= {
        f"{attention}.SelfAttention.o.weight": (width, heads * head),
        f"{attention}.SelfAttention.relative_attention_bias.weight": (32, heads),
        f"{attention}.layer_norm.weight": (width,),
        f"{forward}.DenseReluDense.wi_0.weight": (hidden, width),
        f"{forward}.DenseReluDense.wi_1.weight": (hidden, width),
        f"{forward}.DenseReluDense.wo.weight": (width, hidden),
        f"{forward}.layer_norm.weight": (width,),
    }
    source = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=source) * 0.1 for name, shape in shapes.items()}


def write(folder: Path) -> None:
    """ComfyUI's models folder with one of each, in bf16 to be smaller: about 290 MB."""

    def small(weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.detach().bfloat16() for name, tensor in weights.items()}

    models, encoder = folder / "ar_image", folder / "text_encoders" / "flan-t5-xl"
    models.mkdir(parents=True, exist_ok=True)
    encoder.mkdir(parents=True, exist_ok=True)
    for name, weights in {
        "c2i_L_384.pt": decoder("c2i", layers=1, width=1024, hidden=512),
        "t2i_XL_stage1_256.pt": decoder("t2i", layers=1),
        "vq_ds16_c2i.pt": tokenizer(channels=16),
        "vq_ds16_t2i.pt": tokenizer(channels=16),
    }.items():
        torch.save({"model": small(weights)}, models / name)
    save_file(small(text_encoder()), encoder / "model.safetensors")
    (encoder / "config.json").write_text(CONFIG)


if __name__ == "__main__":
    write(Path(sys.argv[1]))

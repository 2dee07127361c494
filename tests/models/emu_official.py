"""Small random checkpoints laid out and named as BAAI published Emu3 and Emu3.5, and transformers its Emu3.

The vocabulary has the published order: text, then special tokens, the three around a picture, and the codes. Text is
bytes alone.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.prompts.tiktoken import SPECIALS
from tests.tokenizers import reference

BYTES = 256
FIRST = BYTES + len(SPECIALS) + 3  # id of code 0
EOL = BYTES + SPECIALS.index("<|extra_200|>")
CODES = reference.CODES
WIDTHS = {"emu3": (32,) * 4, "ibq": (32,) * 5}  # of the tokenizers' levels: 8 and 16 pixels a code
AROUND = ("<|image token|>", "<|image start|>", "<|image end|>")


def names(codes: int = CODES) -> list[str]:
    """The lines of the list of visual tokens."""
    return [*AROUND, *(f"<|visual token {n:06d}|>" for n in range(codes))]


def ids(codes: int = CODES) -> dict[str, int]:
    """Ids of the named tokens."""
    return {name: BYTES + n for n, name in enumerate((*SPECIALS, *names(codes)))}


def write_words(folder: Path, stem: str = "emu3", codes: int = CODES) -> None:
    """A .tiktoken file with a token for every byte, and the list of visual tokens."""
    from base64 import b64encode

    lines = [f"{b64encode(bytes([n])).decode()} {n}\n" for n in range(BYTES)]
    (folder / f"{stem}.tiktoken").write_text("".join(lines))
    (folder / f"{stem}_vision_tokens.txt").write_text("\n".join(names(codes)) + "\n")


def decoder(
    width: int = 48, heads: int = 6, keys: int = 2, dim: int = 8, norms: bool = False, codes: int = CODES
) -> dict[str, Tensor]:
    """State dict in BAAI's layout, two layers; `norms` as in Emu3.5. Attention is peaky: every token is felt."""
    hidden, words, source = 64, FIRST + codes, torch.Generator().manual_seed(0)

    def draw(*shape: int, deviation: float, mean: float = 0) -> Tensor:
        return torch.randn(*shape, generator=source) * deviation + mean

    weights = {"model.embed_tokens.weight": draw(words, width, deviation=1.0)}
    for n in range(2):
        at = f"model.layers.{n}"
        for part, count in {"q": heads, "k": keys, "v": keys}.items():
            weights[f"{at}.self_attn.{part}_proj.weight"] = draw(count * dim, width, deviation=1.5 * width**-0.5)
        weights[f"{at}.self_attn.o_proj.weight"] = draw(width, heads * dim, deviation=(heads * dim) ** -0.5)
        for part in "qk" if norms else "":
            weights[f"{at}.self_attn.{part}_norm.weight"] = draw(dim, deviation=0.3, mean=1.5)
        for part in ("gate", "up"):
            weights[f"{at}.mlp.{part}_proj.weight"] = draw(hidden, width, deviation=width**-0.5)
        weights[f"{at}.mlp.down_proj.weight"] = draw(width, hidden, deviation=hidden**-0.5)
        for part in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{at}.{part}.weight"] = draw(width, deviation=0.1, mean=1)
    weights["model.norm.weight"] = draw(width, deviation=0.1, mean=1)
    weights["lm_head.weight"] = draw(words, width, deviation=2 * width**-0.5)
    return weights


CONFIG = {
    "model_type": "Emu3", "num_attention_heads": 6, "rms_norm_eps": 1e-5, "rope_theta": 1e6,
    "max_position_embeddings": 9216, "image_area": 518400, "img_token_id": FIRST - 3, "boi_token_id": FIRST - 2,
    "eoi_token_id": FIRST - 1, "eol_token_id": EOL,
}  # fmt: skip


def write_model(folder: Path, weights: dict[str, Tensor], config: dict[str, object], stem: str = "emu3") -> Path:
    """A model's folder: two shards with their index, config.json, and the two files of the text tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = len(weights) // 2
    where = {key: shards[n >= half] for n, key in enumerate(weights)}
    for name in shards:
        save_file({k: v.contiguous() for k, v in weights.items() if where[k] == name}, folder / name, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "config.json").write_text(json.dumps(config))
    write_words(folder, stem)
    return folder


def write_tokenizer(models: Path, kind: str) -> Path:
    """The VQ tokenizer in a folder of its own, as published."""
    folder = models / {"emu3": "Emu3-VisionTokenizer", "ibq": "Emu3.5-VisionTokenizer"}[kind]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(reference.weights(kind, WIDTHS[kind]), folder / "model.safetensors", {"family": f"{kind}-vq"})
    (folder / "config.json").write_text("{}")
    return folder


def transformers_layout(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """BAAI's keys as transformers' published files have them ("text_model.model."), or as it saves them today."""
    head = "text_model.lm_head.weight" if prefix == "text_model.model." else "lm_head.weight"
    return {head if key.startswith("lm_head") else prefix + key.removeprefix("model."): t for key, t in weights.items()}


def write(models: Path) -> None:
    """What a graph needs below ComfyUI's models folder: an Emu3, a small U0 and both VQ tokenizers, about 5 MB."""
    folder = models / "ar_image"
    write_model(folder / "Emu3-Gen", decoder(), CONFIG)
    small = decoder(heads=4, dim=16, norms=True)
    write_model(folder / "Xiaomi-Robotics-U0-4B", small, CONFIG | {"model_type": "UNIS"}, "unis")
    for kind in WIDTHS:
        write_tokenizer(folder, kind)

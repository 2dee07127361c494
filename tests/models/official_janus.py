"""Small random Janus folders laid out and named as the official ones (deepseek-ai): shards, index, configs, tokenizer.

python -m tests.official_janus FOLDER    writes one into FOLDER, with the published grid and number of codes

The weights are ours under official names, written out by hand here and not by the table that reads them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from linear_core.grid import Grid
from linear_core.models.janus import Janus, JanusConfig
from linear_core.models.understanding import Understanding, UnderstandingConfig
from linear_core.prompts.janus import BEGIN, IMAGE, PAD, ROLES
from tests.models.official import CODES, _random, tokenizer

WORDS = [PAD, BEGIN, "<|end|>", *ROLES, "<image_placeholder>", IMAGE, "<end_of_image>"]


def randomise(model: torch.nn.Module, embedding: float) -> torch.nn.Module:
    """Random weights in `model`, large enough that attention is peaky and codes differ; `embedding`: of its tables."""
    source = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=source)
        if "norm" in name:
            weight.data.copy_(0.1 * noise + (0.0 if name.endswith("bias") else 1.0))
        elif weight.ndim > 1:
            weight.data.copy_(noise * (embedding if "embed" in name else 1.5 / weight[0].numel() ** 0.5))
        else:
            weight.data.copy_(0.1 * noise)
    return model


def config(layers: int = 2, width: int = 64, heads: int = 2, codes: int = CODES, vocabulary: int = 300) -> JanusConfig:
    return JanusConfig(layers, width, heads, 2 * width, codes, vocabulary, code_dim=8, head_hidden=width)


def decoder(sizes: JanusConfig) -> dict[str, Tensor]:
    """A decoder's weights, under our names."""
    return _random(Janus(sizes, Grid(1, 1)))


def official(ours: dict[str, Tensor], vq: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under official names, among what the official files hold besides."""
    named: dict[str, Tensor] = {}
    llama = "language_model.model"
    for name, tensor in ours.items():
        if ".wqkv." in name:
            layer = name.split(".")[1]
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                named[f"{llama}.layers.{layer}.self_attn.{part}_proj.weight"] = rows
            continue
        for mine, theirs in (
            ("gen_aligner.fc1", "gen_aligner.layers.0"),
            ("gen_aligner.fc2", "gen_aligner.layers.2"),
            ("gen_head.fc1", "gen_head.output_mlp_projector"),
            ("gen_head.fc2", "gen_head.vision_head"),
            ("attention.wo", "self_attn.o_proj"),
            ("feed_forward.w1", "mlp.gate_proj"),
            ("feed_forward.w2", "mlp.down_proj"),
            ("feed_forward.w3", "mlp.up_proj"),
            ("attention_norm", "input_layernorm"),
            ("ffn_norm", "post_attention_layernorm"),
        ):
            name = name.replace(mine, theirs)
        named[name if name.startswith("gen_") else f"{llama}.{name}"] = tensor
    named |= {f"gen_vision_model.{name}": tensor for name, tensor in vq.items()}
    width = ours["norm.weight"].shape[0]
    return named | {
        "language_model.lm_head.weight": torch.zeros(ours["embed_tokens.weight"].shape),
        "aligner.layers.0.weight": torch.zeros(width, 16),
        "vision_model.vision_tower.blocks.0.attn.qkv.weight": torch.zeros(48, 16),
    }


def looking(width: int) -> dict[str, Tensor]:
    """A small part that looks at pictures, under official names, with the head that writes text."""
    sizes = UnderstandingConfig(layers=1, width=64, heads=1, hidden=32, side=2, patch=4, out=width)
    named = {}
    for name, tensor in _random(Understanding(sizes)).items():
        for mine, theirs in (
            ("vision_tower.", "vision_model.vision_tower."),
            ("aligner.fc1", "aligner.layers.0"),
            ("aligner.fc2", "aligner.layers.2"),
        ):
            name = name.replace(mine, theirs)
        named[name] = tensor
    del named["answers.weight"]
    head = torch.randn(config().vocabulary, width, generator=torch.Generator().manual_seed(5))
    return named | {"language_model.lm_head.weight": head}


def to_official(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """A conversion's weights (deepseek-community) under the names they had before."""
    named = {}
    for name, tensor in converted.items():
        for theirs, before in (
            ("model.language_model.", "language_model.model."),
            ("model.generation_embeddings.", "gen_embed."),
            ("model.generation_aligner.fc1.", "gen_aligner.layers.0."),
            ("model.generation_aligner.hidden_layers.0.", "gen_aligner.layers.2."),
            ("model.generation_head.proj_out.", "gen_head.output_mlp_projector."),
            ("model.generation_head.vision_head.", "gen_head.vision_head."),
            ("model.vision_model.embeddings.patch_embedding.", "vision_model.vision_tower.patch_embed.proj."),
            ("model.vision_model.embeddings.position_embedding.weight", "vision_model.vision_tower.pos_embed"),
            ("model.vision_model.encoder.layers.", "vision_model.vision_tower.blocks."),
            ("model.vision_model.post_layernorm.", "vision_model.vision_tower.norm."),
            (".layer_norm1.", ".norm1."),
            (".layer_norm2.", ".norm2."),
            (".self_attn.projection_layer.", ".attn.proj."),
            ("model.aligner.fc1.", "aligner.layers.0."),
            ("model.aligner.hidden_layers.0.", "aligner.layers.2."),
            ("model.vqmodel.", "gen_vision_model."),
            (".mid.block_1.", ".mid.0."),
            (".mid.attn_1.", ".mid.1."),
            (".mid.block_2.", ".mid.2."),
            ("gen_vision_model.decoder.up.", "gen_vision_model.decoder.conv_blocks."),
            ("gen_vision_model.encoder.down.", "gen_vision_model.encoder.conv_blocks."),
        ):
            name = name.replace(theirs, before)
        if ".conv_blocks." in name:
            name = name.replace(".block.", ".res.")
        named["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor
    tower = "vision_model.vision_tower."
    named[f"{tower}pos_embed"] = named[f"{tower}pos_embed"][None]
    for name in [name for name in named if name.startswith(tower) and ".self_attn.q_proj." in name]:
        parts = [named.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        named[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return named | {f"{tower}attn_pool.latent": torch.zeros(1, 1, 4)}


def text_tokenizer(path: Path, words: list[str] = WORDS, first: int = 0) -> None:
    """A tokenizer.json that knows bytes, and `words`, the special tokens, from id `first` on."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {f"<unused{i}>": i for i in range(first)}
    made = Tokenizer(models.BPE({**ids, **{letter: first + i for i, letter in enumerate(letters)}}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words])
    made.save(str(path))


def settings(sizes: JanusConfig) -> dict[str, object]:
    """The config.json, as far as anybody reads it."""
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "language_config": {
            "model_type": "llama", "hidden_size": sizes.width, "intermediate_size": sizes.hidden,
            "num_attention_heads": sizes.heads, "num_hidden_layers": sizes.layers, "vocab_size": sizes.vocabulary,
        },
    }  # fmt: skip


def write(folder: Path, sizes: JanusConfig | None = None, shards: int = 2, suffix: str = ".bin") -> None:
    """A folder as deepseek-ai's: pickled shards with an index, or (`suffix`) safetensors; in bf16, as published."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = sizes or config()
    weights = official(decoder(sizes), tokenizer(channels=16, codes=sizes.codes)) | looking(sizes.width)
    weights = {name: tensor.detach().bfloat16().contiguous() for name, tensor in weights.items()}
    stem = "pytorch_model" if suffix == ".bin" else "model"
    names = sorted(weights)
    index = {}
    for i in range(shards):
        part = {name: weights[name].clone() for name in names[i::shards]}  # q, k and v of a layer in different files
        file = f"{stem}-{i + 1:05d}-of-{shards:05d}{suffix}" if shards > 1 else stem + suffix
        if suffix == ".bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{stem}{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "config.json").write_text(json.dumps(settings(sizes)))
    text_tokenizer(folder / "tokenizer.json")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

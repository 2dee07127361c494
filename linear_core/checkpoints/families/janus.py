"""Janus checkpoints: the official ones (deepseek-ai) and transformers' conversions (deepseek-community).

Both hold everything in one folder: decoder, VQ tokenizer and text tokenizer. The parts that only look at pictures or
write text (`vision_model`, `aligner`, `lm_head`) are read when pictures are judged (checkpoints/understanding.py).
"""

from __future__ import annotations

import re

from ...grid import Grid
from ...models.janus import HEAD_DIM, Janus, JanusConfig
from ...plan import SamplePlan
from ...prompts.janus import janus_prompt
from ..families import Family, ModelInfo
from ..untrusted import number, section
from ..weights import Target, Weights
from .llama import layer_target

SIDE = 24  # tokens along each side of the only size, 384 pixels
CONTEXT = 16384  # tokens, in every published config

# Prefixes of official keys, then of converted ones. What follows is the same, or is listed in RENAMED.
LANGUAGE = re.compile(r"(?:language_model\.model|model\.language_model)\.(.+)")
VQ = re.compile(r"(?:gen_vision_model|model\.vqmodel)\.(.+)")
RENAMED = {
    "gen_embed": "gen_embed",
    "gen_aligner.layers.0": "gen_aligner.fc1",
    "gen_aligner.layers.2": "gen_aligner.fc2",
    "gen_head.output_mlp_projector": "gen_head.fc1",
    "gen_head.vision_head": "gen_head.fc2",
    "model.generation_embeddings": "gen_embed",
    "model.generation_aligner.fc1": "gen_aligner.fc1",
    "model.generation_aligner.hidden_layers.0": "gen_aligner.fc2",
    "model.generation_head.proj_out": "gen_head.fc1",
    "model.generation_head.vision_head": "gen_head.fc2",
}
VQ_NOT_WEIGHTS = ("quantize.codebook_used", "loss.")

# Of the part that looks at pictures. Official names are timm's, and ours; converted ones are transformers'.
LOOKS = re.compile(r"(?:vision_model\.vision_tower|model\.vision_model)\.(.+)")
POOLING = "attn_pool."  # SigLIP's own, which Janus does not use
CONVERTED = {
    "embeddings.patch_embedding.": "patch_embed.proj.",
    "embeddings.position_embedding.weight": "pos_embed",
    "encoder.layers.": "blocks.",
    "self_attn.projection_layer.": "attn.proj.",
    "self_attn.": "attn.",
    "layer_norm1.": "norm1.",
    "layer_norm2.": "norm2.",
    "post_layernorm.": "norm.",
}
ALIGNER = {
    "aligner.layers.0": "aligner.fc1",
    "aligner.layers.2": "aligner.fc2",
    "model.aligner.fc1": "aligner.fc1",
    "model.aligner.hidden_layers.0": "aligner.fc2",
}
HEADS = (  # that write text; where a conversion has none, it is the table of tokens
    "language_model.lm_head.weight", "lm_head.weight", "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)  # fmt: skip


def target(key: str, config: JanusConfig | None) -> Target | None:
    """Target of a decoder weight. Queries, keys and values share one matrix here."""
    if key.endswith("rotary_emb.inv_freq"):
        return None  # a table in old files
    if (found := LANGUAGE.fullmatch(key)) is None:
        name, _, kind = key.rpartition(".")
        return Target(f"{RENAMED[name]}.{kind}") if name in RENAMED else None
    layer = re.fullmatch(r"(layers\.\d+)\.(.+)\.weight", found[1])
    if layer is None:
        return Target(found[1])
    return layer_target(layer[1], layer[2], "weight")


def vq(key: str) -> str | None:
    """The key's name in the tokenizer's own layout, if it is one of the tokenizer's."""
    found = VQ.fullmatch(key)
    if found is None or found[1].startswith(VQ_NOT_WEIGHTS):
        return None
    return found[1]


def understanding(key: str) -> Target | None:
    """Target of a weight of the part that looks at pictures (models/understanding.py), without its head."""
    name, _, kind = key.rpartition(".")
    if name in ALIGNER:
        return Target(f"{ALIGNER[name]}.{kind}")
    if (found := LOOKS.fullmatch(key)) is None or found[1].startswith(POOLING):
        return None
    inner = found[1]
    for theirs, ours in CONVERTED.items():
        inner = inner.replace(theirs, ours)
    if part := re.fullmatch(r"(blocks\.\d+\.attn)\.([qkv])_proj\.(weight|bias)", inner):
        return Target(f"vision_tower.{part[1]}.qkv.{part[3]}", "qkv".index(part[2]), (1, 1, 1))
    if inner == "pos_embed":  # one row for each patch; official files have one more dimension in front
        return Target("vision_tower.pos_embed", transform=lambda table: table.view(1, *table.shape[-2:]))
    return Target(f"vision_tower.{inner}")


def recognises(weights: Weights) -> bool:
    names = weights.tensors
    return "gen_embed.weight" in names or "model.generation_embeddings.weight" in names


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of a Janus from its shapes, and from the config.json next to it what shapes do not tell."""
    if grid not in (None, (SIDE, SIDE)):
        raise weights.problem(
            f"was made for a grid of {SIDE} x {SIDE} tokens, not {grid[0]} x {grid[1]}; leave the grid to the model."
        )
    try:
        settings, shapes = section(weights.config, "language_config", "text_config"), {}
        for key, shape in weights.shapes.items():
            if (found := target(key, None)) is not None:
                shapes[found.name] = (shape[0] * found.parts, *shape[1:])
        vocabulary, width = shapes["embed_tokens.weight"]
        codes, code_dim = shapes["gen_embed.weight"]
        config = JanusConfig(
            layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
            width=width,
            heads=number(settings, "num_attention_heads", width // HEAD_DIM),
            hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            codes=codes,
            vocabulary=vocabulary,
            eps=number(settings, "rms_norm_eps", 1e-6),
            rope_base=number(section(settings, "rope_parameters") or settings, "rope_theta", 10000.0),
            code_dim=code_dim,
            head_hidden=shapes["gen_head.fc1.weight"][0],
        )
        context = number(settings, "max_position_embeddings", CONTEXT)
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not describe a Janus ({error}); download it again.") from error
    return ModelInfo(
        weights.name, FAMILY, config, Grid(SIDE, SIDE), (), SamplePlan(guidance=5.0), weights.nbytes, context=context
    )


FAMILY = Family(
    "Janus",
    recognises,
    describe,
    Janus,
    target,
    vq,
    lambda tokenizer, texts, negative, info: janus_prompt(tokenizer, texts, negative),
)

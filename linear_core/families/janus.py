"""Janus' checkpoints: the official ones (deepseek-ai) and transformers' conversions (deepseek-community).

Both hold everything in one folder: decoder, VQ tokenizer and text tokenizer, and what only reads pictures or writes
text, which is not read (`vision_model`, `aligner`, `lm_head`).
"""

from __future__ import annotations

import re

from ..grid import Grid
from ..models.janus import DIM, Janus, JanusConfig
from ..plan import SamplePlan
from ..prompts.janus import janus_prompt
from ..weights import Place, Weights
from . import Family, ModelInfo

SIDE = 24  # tokens along each side of the only size there is: 384 pixels
QKV = ("q", "k", "v")

# What official names, then converted ones, begin with; what follows is the same, or is told below.
LANGUAGE = re.compile(r"(?:language_model\.model|model\.language_model)\.(.+)")
VQ = re.compile(r"(?:gen_vision_model|model\.vqmodel)\.(.+)")
RENAMED = {
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.o_proj": "attention.wo",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.up_proj": "feed_forward.w3",
    "mlp.down_proj": "feed_forward.w2",
}
OURS = {
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
VQ_RENAMED = (
    (r"\bmid\.block_1\b", "mid.0"),
    (r"\bmid\.attn_1\b", "mid.1"),
    (r"\bmid\.block_2\b", "mid.2"),
    (r"\.(?:up|down)\.(\d+)\.block\.", r".conv_blocks.\1.res."),
    (r"\.(?:up|down)\.(\d+)\.", r".conv_blocks.\1."),
)
VQ_NOT_WEIGHTS = ("quantize.codebook_used", "loss.")


def place(key: str, config: JanusConfig) -> Place | None:
    """Where a weight of the decoder goes; queries, keys and values lie in one matrix here."""
    if key.endswith("rotary_emb.inv_freq"):
        return None  # a table that old files carry
    if (found := LANGUAGE.fullmatch(key)) is None:
        name, _, kind = key.rpartition(".")
        return Place(f"{OURS[name]}.{kind}") if name in OURS else None
    layer = re.fullmatch(r"(layers\.\d+)\.(.+)\.weight", found[1])
    if layer is None:
        return Place(found[1])
    if part := re.fullmatch(r"self_attn\.([qkv])_proj", layer[2]):
        return Place(f"{layer[1]}.attention.wqkv.weight", QKV.index(part[1]), len(QKV))
    return Place(f"{layer[1]}.{RENAMED.get(layer[2], layer[2])}.weight")


def vq(key: str) -> str | None:
    """A key's name in VQTokenizer, where it is of the tokenizer."""
    found = VQ.fullmatch(key)
    if found is None or found[1].startswith(VQ_NOT_WEIGHTS):
        return None
    name = found[1]
    for pattern, ours in VQ_RENAMED:
        name = re.sub(pattern, ours, name)
    return name


def knows(weights: Weights) -> bool:
    names = weights.tensors
    return "gen_embed.weight" in names or "model.generation_embeddings.weight" in names


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of a Janus from its shapes; what no shape tells from the config.json beside it."""
    if grid not in (None, (SIDE, SIDE)):
        raise weights.problem(
            f"was made for a grid of {SIDE} x {SIDE} tokens, not {grid[0]} x {grid[1]}; leave the grid to the model."
        )
    told = weights.config.get("language_config") or weights.config.get("text_config") or {}
    shapes = {}
    for key, shape in weights.shapes.items():
        if (goes := place(key, None)) is not None:
            shapes[goes.name] = (shape[0] * goes.parts, *shape[1:])
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        codes, code_dim = shapes["gen_embed.weight"]
        config = JanusConfig(
            layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
            width=width,
            heads=told.get("num_attention_heads") or width // DIM,
            hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            codes=codes,
            vocabulary=vocabulary,
            eps=told.get("rms_norm_eps", 1e-6),
            rope_base=(told.get("rope_parameters") or told).get("rope_theta", 10000.0),
            code_dim=code_dim,
            head_hidden=shapes["gen_head.fc1.weight"][0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its weights do not describe a Janus ({error}); download it again.") from error
    if config.heads < 1 or width % config.heads:
        raise weights.problem(f"a width of {width} does not divide into {config.heads} heads; download it again.")
    return ModelInfo(weights.name, FAMILY, config, Grid(SIDE, SIDE), (), SamplePlan(guidance=5.0), weights.nbytes)


FAMILY = Family(
    "Janus",
    knows,
    describe,
    Janus,
    place,
    vq,
    lambda words, texts, negative, info: janus_prompt(words, texts, negative),
)

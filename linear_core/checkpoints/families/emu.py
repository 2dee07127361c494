"""Checkpoints of Emu3 and of Emu3.5's kind (Emu3.5, Xiaomi-Robotics-U0): Llamas whose key heads serve several queries.

The second kind has norms of queries and keys. Emu3 comes in three layouts: BAAI's, whose VQ tokenizer is a file of its
own, and two of transformers, which contain it. A config.json must lie beside the weights, because their names are those
of any Llama.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...grid import Grid
from ...models.lumina import Lumina, LuminaConfig
from ...plan import SamplePlan
from ...prompts import Prompt
from ...prompts.emu import END_OF_LINE, check_ids, code_name, emu3_prompt, emu35_prompt
from ...prompts.tiktoken import QwenTokenizer, TiktokenTokenizer
from ...prompts.tokenizer import TextTokenizer
from ...sizes import EMU3_AREAS, EMU35_SIZES, Size, emu3_sizes
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import number, section
from ..weights import Target, Weights
from .llama import layer_target, rows_of_codes

HEAD_DIM = 128
FIRST_CODE, EOL = 151854, 151846  # as published, for configs that do not say; prompts check the ids
VOCABULARIES = (184622, 282926)  # of Emu3, of Emu3.5's kind: enough to ask for a config.json where there is none
CHAT_LENGTH = 131072  # tokens that Emu3-Chat was made for, and Emu3-Gen was not
PIXELS = {"emu3": 8, "emu35": 16}  # per token, along each side

# BAAI's keys, transformers' as published, and what transformers saves today.
LANGUAGE = re.compile(r"(?:model\.text_model\.|text_model\.model\.|model\.)(embed_tokens|norm|layers\.\d+)\.(.+)")
HEAD = re.compile(r"(?:text_model\.)?lm_head\.weight")
VQ = re.compile(r"(?:model\.)?vqmodel\.(.+)")
EMBEDDING = re.compile(r"(?:model\.text_model\.|text_model\.model\.|model\.)embed_tokens\.weight")


def vq(key: str) -> str | None:
    found = VQ.fullmatch(key)
    return found[1] if found else None


def target(key: str, config: Any) -> Target | None:
    """Target of a weight. `config`: a LuminaConfig; None: only the target's name is needed."""
    if HEAD.fullmatch(key):
        return Target("lm_head.weight", transform=partial(rows_of_codes, config=config))
    if (found := LANGUAGE.fullmatch(key)) is None:
        return None if VQ.fullmatch(key) else Target(key)
    part, rest = found.groups()
    if not part.startswith("layers."):
        return Target(f"{part}.{rest}")
    name, _, kind = rest.rpartition(".")
    if norm := re.fullmatch(r"self_attn\.([qk]_norm)", name):
        return Target(f"{part}.attention.{norm[1]}.{kind}")
    return layer_target(part, name, kind, config.group if config else 1)


def _is_emu(weights: Weights) -> bool:
    shapes = [tensor.shape for key, tensor in weights.tensors.items() if EMBEDDING.fullmatch(key)]
    if len(shapes) != 1 or any(key.endswith("self_attn.q_norm.bias") for key in weights.tensors):
        return False
    kind = str(weights.config.get("model_type"))
    return kind.lower() in ("emu3", "unis") or "boi_token_id" in weights.config or shapes[0][0] in VOCABULARIES


def _has_head_norms(weights: Weights) -> bool:
    return any(key.endswith("layers.0.self_attn.q_norm.weight") for key in weights.tensors)


def recognises_emu3(weights: Weights) -> bool:
    return _is_emu(weights) and not _has_head_norms(weights) and not _has_tokenizer(weights)


def recognises_whole(weights: Weights) -> bool:
    return _is_emu(weights) and not _has_head_norms(weights) and _has_tokenizer(weights)


def recognises_emu35(weights: Weights) -> bool:
    return _is_emu(weights) and _has_head_norms(weights)


def _has_tokenizer(weights: Weights) -> bool:
    return any(VQ.fullmatch(key) for key in weights.tensors)


def describe_emu3(weights: Weights, grid: tuple[int, int] | None = None, whole: bool = False) -> ModelInfo:
    """Sizes of an Emu3 from its shapes, the rest from its config, and which pictures it draws also from its name."""
    config, eol = _sizes_of(weights)
    settings, text = weights.config, section(weights.config, "text_config")
    if "chat" in weights.name.lower() or CHAT_LENGTH in (
        settings.get("max_position_embeddings"), text.get("max_position_embeddings")
    ):  # fmt: skip
        raise weights.problem("is Emu3-Chat, which reads pictures and does not draw them; choose Emu3-Gen.")
    stage1 = "stage1" in weights.name.lower() or settings.get("image_area") == EMU3_AREAS["Emu3-Stage1"]
    sizes = emu3_sizes(EMU3_AREAS["Emu3-Stage1" if stage1 else "Emu3-Gen"])
    return _info(
        weights, EMU3_WHOLE if whole else EMU3, config, eol, sizes, grid, SamplePlan(guidance=3.0, top_k=2048),
        "" if whole else published.EMU3_VQ,
    )  # fmt: skip


def describe_emu35(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of an Emu3.5 or Xiaomi-Robotics-U0 likewise."""
    config, eol = _sizes_of(weights)
    name = weights.name.lower()
    if "flashar" in name:
        raise weights.problem("is U0-FlashAR, which does not draw line by line; choose Xiaomi-Robotics-U0-4B.")
    is_u0 = str(weights.config.get("model_type")).lower() == "unis" or "-u0" in name
    guidance = 3.0 if is_u0 else 5.0 if "image" in name else 2.0
    return _info(
        weights, U0 if is_u0 else EMU35, config, eol, ((1024, 1024),) if is_u0 else EMU35_SIZES, grid,
        SamplePlan(guidance=guidance, top_k=5120), published.EMU35_VQ,
    )  # fmt: skip


def _info(
    weights: Weights,
    family: Family,
    config: LuminaConfig,
    eol: int,
    sizes: tuple[Size, ...],
    requested: tuple[int, int] | None,
    defaults: SamplePlan,
    tokenizer: str,
) -> ModelInfo:
    pixels = PIXELS["emu35" if config.qk_norm else "emu3"]
    square = next(width for width, height in sizes if width == height) // pixels
    info = ModelInfo(
        weights.name, family, config, Grid(square, square, eol=eol - config.first_code), (), defaults, weights.nbytes,
        tokenizer, sizes, pixels,
    )  # fmt: skip
    return info.with_size((requested[1] * pixels, requested[0] * pixels)) if requested else info


def _sizes_of(weights: Weights) -> tuple[LuminaConfig, int]:
    """Sizes and the id of the end-of-line token."""
    if not weights.config:
        raise weights.problem("lacks the config.json that was published with it; put it into the model's folder.")
    settings, shapes = weights.config, {}
    for key, shape in weights.shapes.items():
        if (found := target(key, None)) is not None:
            shapes[found.name] = shape
    try:
        text = section(settings, "text_config") or settings
        vocabulary, width = shapes["embed_tokens.weight"]
        first_code, codes, eol = _ids(settings, vocabulary)
        norm = shapes.get("layers.0.attention.q_norm.weight")
        queries, keys = (
            next(s[0] for k, s in weights.shapes.items() if k.endswith(f"layers.0.self_attn.{part}_proj.weight"))
            for part in "qk"
        )
        dim = norm[0] if norm else number(text, "head_dim", width // number(text, "num_attention_heads", 32))
        if queries % dim or keys % dim:
            raise ValueError(f"{queries} and {keys} rows of queries and keys cannot be divided into heads of {dim}")
        config = LuminaConfig(
            layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
            width=width,
            heads=queries // dim,
            hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            codes=codes,
            vocabulary=vocabulary,
            eps=number(text, "rms_norm_eps", 1e-5),
            rope_base=number(section(text, "rope_parameters") or text, "rope_theta", 1e6),
            qk_norm="rms" if norm else "",
            key_heads=keys // dim,
            head_dim=dim,
            first_code=first_code,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError, StopIteration) as error:
        raise weights.problem(f"its weights do not describe an Emu3 ({error}); download it again.") from error
    return config, eol


def _ids(settings: Mapping[str, Any], vocabulary: int) -> tuple[int, int, int]:
    """Id of code 0, number of codes, id of the end-of-line token. Raises ValueError if codes are not in order."""
    names = section(settings, "vocabulary_map")
    if names:
        first_code, codes = names[code_name(0)], sum(name.startswith("<|visual token ") for name in names)
        if type(first_code) is not int or any(names.get(code_name(n)) != first_code + n for n in range(codes)):
            raise ValueError("its vocabulary_map does not list image codes in order")
        eol = names[END_OF_LINE]
        if type(eol) is not int:
            raise ValueError("its vocabulary_map has values that are not ids")
    else:  # codes come last in the vocabulary, behind three tokens around a picture
        first_code = 1 + max(number(settings, f"{name}_token_id", FIRST_CODE - 1) for name in ("img", "boi", "eoi"))
        codes, eol = vocabulary - first_code, number(settings, "eol_token_id", EOL)
    if not 0 < first_code <= vocabulary - codes or not 0 <= eol < vocabulary or codes < 1:
        raise ValueError(f"its {vocabulary} tokens are too few for {codes} codes from {first_code} on")
    return first_code, codes, eol


def open_tokenizer(path: Path) -> TextTokenizer:
    """The .tiktoken file as published, or transformers' tokenizer.json."""
    return TiktokenTokenizer(path) if path.suffix == ".tiktoken" else QwenTokenizer(path)


def prompt(tokenizer: TextTokenizer, texts: Sequence[str], negative: str, info: ModelInfo) -> Prompt:
    """One image per text, guided away from `negative`. Raises UserError if the tokenizer is not the model's."""
    config, grid = info.config, info.grid
    if grid.eol is None:
        raise UserError(f"model: {info.name} ends each line with a token, but its grid has none.")
    check_ids(tokenizer, config.first_code, config.codes, config.first_code + grid.eol)
    if info.family.name == EMU3.name:
        return emu3_prompt(tokenizer, texts, grid, negative)
    return emu35_prompt(tokenizer, texts, grid, negative, always_task=info.family.name == U0.name)


EMU3 = Family(
    "Emu3",
    recognises_emu3,
    describe_emu3,
    Lumina,
    target,
    prompt=prompt,
    tokenizer_files=("emu3.tiktoken", "tokenizer.json", "../Emu3-Gen/emu3.tiktoken", "../Emu3-Stage1/emu3.tiktoken"),
    open_tokenizer=open_tokenizer,
    prompt_slots=128,
)
EMU3_WHOLE = replace(EMU3, recognises=recognises_whole, describe=partial(describe_emu3, whole=True), vq=vq)
EMU35 = replace(
    EMU3,
    name="Emu3.5",
    recognises=recognises_emu35,
    describe=describe_emu35,
    tokenizer_files=("emu3.tiktoken", "tokenizer.json", "../Emu3.5-Image/emu3.tiktoken", "../Emu3.5/emu3.tiktoken"),
    prompt_slots=64,
)
U0 = replace(EMU35, name="Xiaomi-Robotics-U0", tokenizer_files=("unis.tiktoken", "emu3.tiktoken", "tokenizer.json"))
FAMILIES = (EMU3, EMU3_WHOLE, EMU35)  # U0 is told from Emu3.5 by its config

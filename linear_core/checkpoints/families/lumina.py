"""Checkpoints of Lumina-mGPT and Anole: Chameleons, in transformers' layout or, for Anole's own, in Meta's.

They contain only the language model. The VQ tokenizer is a separate file, and of Lumina-mGPT 1.0 only one repository
has the text tokenizer. Which sizes a model of 1.0 draws is stated only in its name.

Lumina-mGPT 2.0 is the same network, trained from scratch with another vocabulary (Qwen's) and another VQ tokenizer
(MoVQGAN's, 8 pixels per token).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...grid import Grid
from ...models.lumina import Lumina, LuminaConfig
from ...plan import SamplePlan
from ...prompts import Prompt
from ...prompts.lumina import BEGIN, END_OF_LINE, anole_prompt, check_codes, code_name, lumina_prompt
from ...prompts.tokenizer import TextTokenizer
from ...sizes import PIXELS, sizes
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import number, read_json, section
from ..weights import Target, Weights
from .llama import QKV, layer_target, rows_of_codes

SIDES = (512, 768, 1024)  # pixels of Lumina-mGPT's square pictures
PROMPT_SLOTS = 64
ANOLE_GRID = Grid(32, 32)  # the only one it draws
CONTEXT = 16384  # tokens, where the config does not say, or fewer than the image has
FIRST_CODE, CODES, EOL = 4, 8192, 8803  # as published, for files without a vocabulary_map; prompts check the ids

# Lumina-mGPT 2.0: its code names these ids itself, as its codes have no names (inference_solver.py, item_processor.py).
FIRST_CODE_2, CODES_2, EOL_2 = 155000, 16384, 151670
SIDES_2, PIXELS_2 = (768, 512), 8  # the usual side first


def recognises(weights: Weights) -> bool:
    """By the LayerNorms of queries and keys; other models have RMSNorms there, which have no bias."""
    names = weights.tensors
    return "model.layers.0.self_attn.q_norm.bias" in names or "layers.0.attention.q_normalization.weight" in names


def _unchanged(tensor: Tensor, config: LuminaConfig) -> Tensor:
    return tensor


def _every_head(norm: Tensor, config: LuminaConfig) -> Tensor:
    """A norm that is stored once for all heads of a training device, D or N D, repeated for each head: H D."""
    norm = norm.reshape(-1, config.head_dim)
    return norm.repeat_interleave(config.heads // norm.shape[0], 0)


def _halves(tensor: Tensor, config: LuminaConfig) -> Tensor:
    """From RoPE pairs to halves: each head's elements 0 2 4 …, then 1 3 5 …, along the first dimension, H*D … or D."""
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _halves_for_every_head(norm: Tensor, config: LuminaConfig) -> Tensor:
    return _every_head(_halves(norm, config), config)


# Key in the file, name here, transform: transformers' keys, then Meta's, whose RoPE rotates neighbouring elements of a
# head where transformers rotates halves. The rest of a layer is as in every Llama.
KEYS = (
    (r"model\.(embed_tokens|norm)\.weight", r"\1.weight", _unchanged),
    (r"lm_head\.weight", "lm_head.weight", rows_of_codes),
    (r"model\.(layers\.\d+)\.self_attn\.([qk]_norm\.\w+)", r"\1.attention.\2", _every_head),
    (r"tok_embeddings\.weight", "embed_tokens.weight", _unchanged),
    (r"norm\.weight", "norm.weight", _unchanged),
    (r"output\.weight", "lm_head.weight", rows_of_codes),
    (r"(layers\.\d+\.attention\.[qk]_norm)alization\.(\w+)", r"\1.\2", _halves_for_every_head),
    (r"(layers\.\d+\.(?:attention\.wo|feed_forward\.w\d|attention_norm|ffn_norm)\.weight)", r"\1", _unchanged),
)


def target(key: str, config: Any) -> Target | None:
    """Target of a weight. `config`: a LuminaConfig; None: only the target's name is needed, not its transform."""
    for pattern, name, transform in KEYS:
        if found := re.fullmatch(pattern, key):
            return Target(found.expand(name), transform=partial(transform, config=config))
    if found := re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.(weight|bias)", key):
        return layer_target(found[1], found[2], found[3])
    if found := re.fullmatch(r"(layers\.\d+\.attention)\.w([qkv])\.weight", key):
        transform = _unchanged if found[2] == "v" else _halves
        return Target(f"{found[1]}.wqkv.weight", QKV.index(found[2]), (1, 1, 1), partial(transform, config=config))
    return None


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of a Chameleon from its shapes, ids of its codes from its config, sizes of its pictures from its name."""
    settings = weights.config
    if settings.get("swin_norm"):
        raise weights.problem("is Lumina-mGPT's 34B, whose architecture is not supported; choose a 7B.")
    shapes = {}
    for key, shape in weights.shapes.items():
        if (found := target(key, None)) is not None:
            shapes[found.name] = shape
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        second = vocabulary >= FIRST_CODE_2 + CODES_2  # its config may still list the codes of Chameleon
        names = section(settings, "vocabulary_map")
        first_code, codes, eol = (FIRST_CODE_2, CODES_2, EOL_2) if second else _ids(names)
        if (last := max(first_code + codes - 1, eol)) >= vocabulary:
            raise ValueError(f"its vocabulary_map, or the usual one, ends with {last} but it has {vocabulary} tokens")
        config = LuminaConfig(
            layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
            width=width,
            heads=width // shapes["layers.0.attention.q_norm.weight"][-1],
            hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            codes=codes,
            vocabulary=vocabulary,
            eps=number(settings, "rms_norm_eps", 1e-5),
            rope_base=number(section(settings, "rope_parameters") or settings, "rope_theta", 10000.0),
            qk_norm="layer",
            first_code=first_code,
        )
        context = number(settings, "max_position_embeddings", CONTEXT)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise weights.problem(f"its weights do not describe a Chameleon ({error}); download it again.") from error
    if second:
        return _lumina_2(weights, config, grid)
    meta = "tok_embeddings.weight" in weights.tensors
    if meta or "anole" in weights.name.lower():
        info = _anole(weights, config, grid)
    else:
        info = _lumina(weights, config, grid, eol - first_code)
    return replace(info, context=context if context > info.grid.tokens + PROMPT_SLOTS else CONTEXT)


def _ids(names: Mapping[str, Any]) -> tuple[int, int, int]:
    """Id of code 0, number of codes, id of the end-of-line token. Raises ValueError if codes are not in order."""
    if not names:
        return FIRST_CODE, CODES, EOL
    if any(type(number) is not int or number < 0 for number in names.values()):
        raise ValueError("its vocabulary_map has values that are not ids")
    first_code, codes = names[code_name(0)], sum(name.startswith("IMGIMG") for name in names)
    if any(names.get(code_name(code)) != first_code + code for code in range(codes)):
        raise ValueError("its vocabulary_map does not list image codes in order")
    return first_code, codes, names[END_OF_LINE]


def _anole(weights: Weights, config: LuminaConfig, requested: tuple[int, int] | None) -> ModelInfo:
    if requested not in (None, (ANOLE_GRID.rows, ANOLE_GRID.cols)):
        raise weights.problem("is Anole, which draws only 32 x 32 tokens; leave the grid to the model.")
    defaults = SamplePlan(guidance=3.0, temperature=0.7, top_p=0.9)
    name = "Anole-7B" if weights.name == "consolidated" else weights.name
    return ModelInfo(name, FAMILY, config, ANOLE_GRID, (), defaults, weights.nbytes, tokenizer=published.CHAMELEON_VQ)


def _lumina(weights: Weights, config: LuminaConfig, requested: tuple[int, int] | None, eol: int) -> ModelInfo:
    published_name = re.search(r"7B-(\d{3,4})(?!\d)", weights.name)  # other numbers of a name may mean anything
    numbers = [published_name[1]] if published_name else re.findall(r"(?<!\d)(\d{3,4})(?!\d)", weights.name)
    found = {int(n) for n in numbers} & set(SIDES)
    if requested and not published_name:
        size = requested[1] * PIXELS, requested[0] * PIXELS
        found = {side for side in SIDES if size in sizes(side)} or found
    if len(found) != 1:
        names = " or ".join(str(side) for side in SIDES)
        raise weights.problem(
            f"does not say how large its pictures are; give the grid, or put their pixels into the folder's name "
            f"({names}, as in Lumina-mGPT-7B-768), as published."
        )
    side = found.pop()
    grid = Grid(side // PIXELS, side // PIXELS, eol=eol)
    info = ModelInfo(
        weights.name, FAMILY, config, grid, (), SamplePlan(guidance=4.0, top_k=2000), weights.nbytes,
        tokenizer=published.CHAMELEON_VQ, sizes=sizes(side),
    )  # fmt: skip
    return info.with_size((requested[1] * PIXELS, requested[0] * PIXELS)) if requested else info


def _lumina_2(weights: Weights, config: LuminaConfig, requested: tuple[int, int] | None) -> ModelInfo:
    side = SIDES_2[0] // PIXELS_2
    info = ModelInfo(
        weights.name, FAMILY_2, config, Grid(side, side, eol=EOL_2 - FIRST_CODE_2), (),
        SamplePlan(guidance=4.0, top_k=4096), weights.nbytes, tokenizer=published.MOVQ,
        sizes=tuple(size for side in SIDES_2 for size in sizes(side)), pixels=PIXELS_2,
    )  # fmt: skip
    return info.with_size((requested[1] * PIXELS_2, requested[0] * PIXELS_2)) if requested else info


def prompt(tokenizer: TextTokenizer, texts: Sequence[str], negative: str, info: ModelInfo) -> Prompt:
    """One image per text, guided away from `negative`. Raises UserError if the tokenizer is not the model's."""
    first_code, grid = info.config.first_code, info.grid
    if info.family is not FAMILY_2:
        check_codes(tokenizer, first_code, info.config.codes)
    if grid.eol is None:
        return anole_prompt(tokenizer, texts, negative)
    if tokenizer.id(END_OF_LINE) != first_code + grid.eol:
        raise UserError(f"{tokenizer.path}: its end-of-line token is not the model's; use the model's own file.")
    begin = _begin(tokenizer.path.parent) if info.family is FAMILY_2 else BEGIN
    size = grid.cols * info.pixels, grid.rows * info.pixels
    return lumina_prompt(tokenizer, texts, size, grid, negative, begin)


def _begin(folder: Path) -> str:
    """The name of the token that begins a text: the tokenizer's "bos" or, as Qwen's has none, its "eos".

    tokenizer.json does not say which they are; the other two files of a tokenizer do.
    """
    files = [folder / name for name in ("tokenizer_config.json", "special_tokens_map.json")]
    found = [read_json(file, "is not a tokenizer's config") for file in files if file.is_file()]
    if not found:
        raise UserError(f"{files[0]}: there is no such file, but the model needs it to read texts; download it again.")
    for name in ("bos_token", "eos_token"):
        for settings in found:
            token = settings.get(name)
            if isinstance(token, dict):
                token = token.get("content")
            if isinstance(token, str) and token:
                return token
    raise UserError(f"{files[0]}: names no token that begins a text; download it again.")


TOKENIZER_FILES = (  # next to the model, in the one Lumina-mGPT repository that has it, in Chameleon's and Anole's
    "tokenizer.json",
    "../Lumina-mGPT-7B-768/tokenizer.json",
    "../chameleon/tokenizer.json",
    "../chameleon/tokenizer/text_tokenizer.json",
    "../../tokenizer/text_tokenizer.json",
)
FAMILY = Family(
    "Lumina-mGPT",
    recognises,
    describe,
    Lumina,
    target,
    prompt=prompt,
    tokenizer_files=TOKENIZER_FILES,
    tokenizer_release=published.LUMINA_TOKENIZER,
    prompt_slots=PROMPT_SLOTS,
)
FAMILY_2 = replace(
    FAMILY, name="Lumina-mGPT 2.0", tokenizer_files=("tokenizer.json",), tokenizer_release=published.LUMINA_2
)

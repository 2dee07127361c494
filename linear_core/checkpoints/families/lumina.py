"""Checkpoints of Lumina-mGPT and Anole: Chameleons, laid out as transformers does it or, Anole's own, as Meta does.

They hold the language model alone. Chameleon's VQ tokenizer is a file of its own, and only one of Lumina-mGPT's
repositories has the text tokenizer. Which sizes a model draws stands in no file but in its name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...grid import Grid
from ...models.lumina import Lumina, LuminaConfig
from ...plan import SamplePlan
from ...prompts import Prompt
from ...prompts.lumina import END_OF_LINE, anole_prompt, check_codes, code_name, lumina_prompt
from ...prompts.tokenizer import TextTokenizer
from ...sizes import PIXELS, sizes
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import number, section
from ..weights import Target, Weights
from .llama import QKV, in_layer

SIDES = (512, 768, 1024)  # pixels of Lumina-mGPT's square pictures
ANOLE_GRID = Grid(32, 32)  # the only size it draws
FIRST, CODES, EOL = 4, 8192, 8803  # ids as published, where no vocabulary_map says them; prompts hold them to names


def recognises(weights: Weights) -> bool:
    names = weights.tensors
    return "model.layers.0.self_attn.q_norm.weight" in names or "layers.0.attention.q_normalization.weight" in names


def _all(tensor: Tensor, config: LuminaConfig) -> Tensor:
    return tensor


def _rows_of_codes(head: Tensor, config: LuminaConfig) -> Tensor:
    """Nothing but a code is drawn, so the head's other rows, nine tenths of them, are left where they are."""
    return head[config.first_code : config.first_code + config.codes]


def _every_head(norm: Tensor, config: LuminaConfig) -> Tensor:
    """A norm stored once for all heads of a training device, D or N D, for each of them: H D."""
    norm = norm.reshape(-1, config.head_dim)
    return norm.repeat_interleave(config.heads // norm.shape[0], 0)


def _halves(tensor: Tensor, config: LuminaConfig) -> Tensor:
    """Each head's numbers 0 2 4 …, then 1 3 5 …, along the first dimension: H*D … or D."""
    pairs = tensor.reshape(-1, config.head_dim // 2, 2, *tensor.shape[1:])
    return pairs.transpose(1, 2).reshape(tensor.shape)


def _halves_for_every_head(norm: Tensor, config: LuminaConfig) -> Tensor:
    return _every_head(_halves(norm, config), config)


# A weight's name in the file, its name here, and what of it goes there: transformers' names, then Meta's, which turns
# neighbouring numbers of a head by RoPE where transformers turns halves. The rest of a layer is as in every Llama.
NAMES = (
    (r"model\.(embed_tokens|norm)\.weight", r"\1.weight", _all),
    (r"lm_head\.weight", "lm_head.weight", _rows_of_codes),
    (r"model\.(layers\.\d+)\.self_attn\.([qk]_norm\.\w+)", r"\1.attention.\2", _every_head),
    (r"tok_embeddings\.weight", "embed_tokens.weight", _all),
    (r"norm\.weight", "norm.weight", _all),
    (r"output\.weight", "lm_head.weight", _rows_of_codes),
    (r"(layers\.\d+\.attention\.[qk]_norm)alization\.(\w+)", r"\1.\2", _halves_for_every_head),
    (r"(layers\.\d+\.(?:attention\.wo|feed_forward\.w\d|attention_norm|ffn_norm)\.weight)", r"\1", _all),
)


def place(key: str, config: Any) -> Target | None:
    """Where a weight goes. `config`: a LuminaConfig; None: only the name counts, not what of the weight goes there."""
    for pattern, ours, take in NAMES:
        if found := re.fullmatch(pattern, key):
            return Target(found.expand(ours), take=partial(take, config=config))
    if found := re.fullmatch(r"model\.(layers\.\d+)\.(.+)\.(weight|bias)", key):
        return in_layer(*found.groups())
    if found := re.fullmatch(r"(layers\.\d+\.attention)\.w([qkv])\.weight", key):
        take = _all if found[2] == "v" else _halves
        return Target(f"{found[1]}.wqkv.weight", QKV.index(found[2]), len(QKV), partial(take, config=config))
    return None


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of a Chameleon from its shapes, ids of its codes from its config, sizes of its pictures from its name."""
    told = weights.config
    if told.get("swin_norm"):
        raise weights.problem("is Lumina-mGPT's 34B, which is built otherwise and not drawn here; choose a 7B.")
    shapes = {}
    for key, shape in weights.shapes.items():
        if (goes := place(key, None)) is not None:
            shapes[goes.name] = shape
    try:
        vocabulary, width = shapes["embed_tokens.weight"]
        first, codes, eol = _ids(section(told, "vocabulary_map"))
        if (last := max(first + codes - 1, eol)) >= vocabulary:
            raise ValueError(f"its vocabulary_map, or the usual one, ends with {last} and it has {vocabulary} words")
        config = LuminaConfig(
            layers=1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("layers.")),
            width=width,
            heads=width // shapes["layers.0.attention.q_norm.weight"][-1],
            hidden=shapes["layers.0.feed_forward.w1.weight"][0],
            codes=codes,
            vocabulary=vocabulary,
            eps=number(told, "rms_norm_eps", 1e-5),
            rope_base=number(section(told, "rope_parameters") or told, "rope_theta", 10000.0),
            qk_norm=True,
            first_code=first,
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise weights.problem(f"its weights do not describe a Chameleon ({error}); download it again.") from error
    meta = "tok_embeddings.weight" in weights.tensors
    if meta or "anole" in weights.name.lower():
        return _anole(weights, config, grid)
    return _lumina(weights, config, grid, eol - first)


def _ids(names: Mapping[str, Any]) -> tuple[int, int, int]:
    """Id of code 0, number of codes, id of a line's end. Raises ValueError where codes are not in order."""
    if not names:
        return FIRST, CODES, EOL
    if any(type(number) is not int or number < 0 for number in names.values()):
        raise ValueError("its vocabulary_map gives names to what are no ids")
    first, codes = names[code_name(0)], sum(name.startswith("IMGIMG") for name in names)
    if any(names.get(code_name(code)) != first + code for code in range(codes)):
        raise ValueError("its vocabulary_map does not list image codes in order")
    return first, codes, names[END_OF_LINE]


def _anole(weights: Weights, config: LuminaConfig, asked: tuple[int, int] | None) -> ModelInfo:
    if asked not in (None, (ANOLE_GRID.rows, ANOLE_GRID.cols)):
        raise weights.problem("is Anole, which draws 32 x 32 tokens only; leave the grid to the model.")
    defaults = SamplePlan(guidance=3.0, temperature=0.7, top_p=0.9)
    name = "Anole-7B" if weights.name == "consolidated" else weights.name
    return ModelInfo(name, FAMILY, config, ANOLE_GRID, (), defaults, weights.nbytes, tokenizer=published.CHAMELEON_VQ)


def _lumina(weights: Weights, config: LuminaConfig, asked: tuple[int, int] | None, eol: int) -> ModelInfo:
    found = {int(n) for n in re.findall(r"(?<!\d)(\d{3,4})(?!\d)", weights.name)} & set(SIDES)
    if not found and asked:
        found = {side for side in SIDES if (asked[1] * PIXELS, asked[0] * PIXELS) in sizes(side)}
    if len(found) != 1:
        names = " or ".join(str(side) for side in SIDES)
        raise weights.problem(
            f"does not say how large its pictures are; name the folder after their pixels ({names}, as in "
            "Lumina-mGPT-7B-768), as published."
        )
    side = found.pop()
    grid = Grid(side // PIXELS, side // PIXELS, eol=eol)
    info = ModelInfo(
        weights.name, FAMILY, config, grid, (), SamplePlan(guidance=4.0, top_k=2000), weights.nbytes,
        tokenizer=published.CHAMELEON_VQ, sizes=sizes(side),
    )  # fmt: skip
    return info.with_size((asked[1] * PIXELS, asked[0] * PIXELS)) if asked else info


def prompt(words: TextTokenizer, texts: Sequence[str], negative: str, info: ModelInfo) -> Prompt:
    first, grid = info.config.first_code, info.grid
    check_codes(words, first, info.config.codes)
    if grid.eol is None:
        return anole_prompt(words, texts, negative)
    if words.id(END_OF_LINE) != first + grid.eol:
        raise UserError(f"{words.path}: ends lines otherwise than the model does; take the model's own file.")
    return lumina_prompt(words, texts, (grid.cols * PIXELS, grid.rows * PIXELS), grid, negative)


WORDS = (  # beside the model, in the one repository of Lumina-mGPT that has it, in Chameleon's and Anole's folders
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
    place,
    prompt=prompt,
    tokenizer_files=WORDS,
    tokenizer_release=published.LUMINA_WORDS,
    prompt_slots=64,
)

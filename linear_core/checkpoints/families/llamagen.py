"""LlamaGen checkpoints: how they are recognised, and what a published file does not state, above all its grid."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from math import isqrt
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...grid import Grid
from ...models.llamagen import LlamaGen, LlamaGenConfig, read_config
from ...plan import SamplePlan
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import inside, number, parse_json, section
from ..weights import Weights, all_except

SIDES = {pixels: pixels // published.FACTOR for sides in published.PIXELS.values() for pixels in sides}
CLASS_NAMES = Path(__file__).parents[2] / "assets" / "imagenet_classes.json"
NUMBER = (int, float)
ROPES = ("1d", "2d")
SAMPLING: dict[str, Any] = {  # types of the settings in our metadata
    "guidance": NUMBER,
    "guidance_interval": int,
    "temperature": NUMBER,
    "top_k": int,
    "top_p": NUMBER,
}
key_map = all_except("freqs_cis")  # the RoPE table, which some files contain


def recognises(weights: Weights) -> bool:
    return "tok_embeddings.weight" in weights.tensors and any(k.startswith("cls_embedding.") for k in weights.tensors)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """Names of ImageNet's 1000 classes by id: the classes of published class-conditional files."""
    return tuple(json.loads(CLASS_NAMES.read_text(encoding="utf-8"))["names"])


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, grid and classes of a LlamaGen checkpoint.

    A published file does not contain the grid. It comes from the metadata of our own files, else from the config.json
    of a folder pushed to the hub, else from the file's name (c2i_B_256, …), else from `grid` (rows, cols). Two that
    differ are an error.
    """
    metadata = weights.metadata
    try:
        settings = section(weights.config, "config") or weights.config
        heads = int(metadata["heads"]) if "heads" in metadata else number(settings, "n_head", 0) or None
        tokens = number(settings, "block_size", 0)
        config = replace(read_config(weights.shapes, heads), rope=read_rope(metadata.get("rope", "2d")))
        classes = read_classes(metadata["classes"], config.classes) if "classes" in metadata else _class_names(config)
        defaults = read_sampling(metadata["sampling"]) if "sampling" in metadata else _defaults(config)
        kind = "c2i" if config.classes else "t2i"
        tokenizer = Path(
            inside(Path(), metadata.get("tokenizer", published.TOKENIZERS[kind])).name.replace("\\", "/")
        ).stem
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise weights.problem(f"its header does not describe a LlamaGen ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    return ModelInfo(
        weights.name, FAMILY, config, _grid(weights, kind, tokens, grid), classes, defaults, weights.nbytes, tokenizer
    )


def read_classes(text: str, count: int) -> tuple[str, ...]:
    """The names of `count` classes from our metadata. Raises ValueError for anything else."""
    names = parse_json(text)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != count:
        raise ValueError(f"its metadata 'classes' is not a list of {count} names")
    return tuple(names)


def read_rope(text: str) -> str:
    """The kind of RoPE from our metadata; published files have none. Raises ValueError for any other text."""
    if text not in ROPES:
        raise ValueError(f"its metadata 'rope' is not {' or '.join(ROPES)}")
    return text


def read_sampling(text: str) -> SamplePlan:
    """Sampling settings from our metadata. Raises ValueError or UserError for anything else."""
    settings = parse_json(text)
    if not isinstance(settings, dict) or any(not isinstance(settings[n], SAMPLING.get(n, ())) for n in settings):
        raise ValueError(f"its metadata 'sampling' does not give numbers for {', '.join(SAMPLING)}")
    return SamplePlan(**settings)


def _class_names(config: LlamaGenConfig) -> tuple[str, ...]:
    names = imagenet_classes()
    return names if config.classes == len(names) else ()


def _defaults(config: LlamaGenConfig) -> SamplePlan:
    """LlamaGen's published sampling settings."""
    return SamplePlan(guidance=4.0, top_k=2000) if config.classes else SamplePlan(guidance=7.5, top_k=1000)


def _grid(weights: Weights, kind: str, tokens: int, requested: tuple[int, int] | None) -> Grid:
    """From our own metadata, else from the config's number of tokens, else from the file's name, else as requested.

    Two that differ are an error.
    """
    text, pixels = weights.metadata.get("grid"), published.pixels_from_name(weights.name, kind)
    if text is not None:
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text)
        if match is None:
            raise weights.problem(f"its metadata 'grid' is '{text}', not a grid such as 24x24; convert the file again.")
        found, source = (int(match[1]), int(match[2])), "was made for"
    elif tokens and isqrt(tokens) ** 2 == tokens:
        found, source = (isqrt(tokens),) * 2, f"says {tokens} tokens in its config.json, which is"
    elif pixels is not None:
        found, source = (SIDES[pixels],) * 2, f"says {pixels} pixels in its name, which is"
    elif requested is not None:
        return Grid(*requested)
    else:
        sizes = " or ".join(str(side) for side in published.PIXELS[kind])
        raise weights.problem(
            f"does not say which grid it was made for; put the pixels into the file's name ({sizes}, as in "
            f"{kind}_XL_{published.PIXELS[kind][-1]}) or give the grid."
        )
    if requested and requested != found:
        raise weights.problem(
            f"{source} a grid of {found[0]} x {found[1]} tokens, not {requested[0]} x {requested[1]}; leave the grid "
            "to the file" + ("." if text else ", or rename it.")
        )
    return Grid(*found)


FAMILY = Family("LlamaGen", recognises, describe, LlamaGen, lambda key, config: key_map(key))

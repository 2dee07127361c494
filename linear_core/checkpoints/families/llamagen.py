"""LlamaGen's checkpoints: which they are, and what a published file does not tell, its grid above all."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...grid import Grid
from ...models.llamagen import LlamaGen, LlamaGenConfig, read_config
from ...plan import SamplePlan
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import inside, parse_json
from ..weights import Weights, all_except

SIDES = {pixels: pixels // published.FACTOR for sides in published.PIXELS.values() for pixels in sides}
NAMES = Path(__file__).parents[2] / "assets" / "imagenet_classes.json"
REAL = (int, float)
SAMPLING: dict[str, Any] = {
    "guidance": REAL,
    "guidance_interval": int,
    "temperature": REAL,
    "top_k": int,
    "top_p": REAL,
}
place = all_except("freqs_cis")  # the rotary table, which some files carry


def recognises(weights: Weights) -> bool:
    return "tok_embeddings.weight" in weights.tensors and any(k.startswith("cls_embedding.") for k in weights.tensors)


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet's 1000 classes, by id: what published class-conditional files draw."""
    return tuple(json.loads(NAMES.read_text(encoding="utf-8"))["names"])


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, grid and classes of a LlamaGen checkpoint.

    The grid is not among a published file's weights: it comes from our own files' metadata, else from the file's name
    (c2i_B_256, …), else from `grid` (rows, cols). Two that disagree are an error.
    """
    notes = weights.metadata
    try:
        config = read_config(weights.shapes, int(notes["heads"]) if "heads" in notes else None)
        classes = _noted_classes(notes["classes"], config) if "classes" in notes else _class_names(config)
        defaults = _noted_sampling(notes["sampling"]) if "sampling" in notes else _defaults(config)
        kind = "c2i" if config.classes else "t2i"
        tokenizer = inside(Path(), notes.get("tokenizer", published.TOKENIZERS[kind])).stem
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise weights.problem(f"its header does not describe a LlamaGen ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    return ModelInfo(
        weights.name, FAMILY, config, _grid(weights, kind, grid), classes, defaults, weights.nbytes, tokenizer
    )


def _noted_classes(note: str, config: LlamaGenConfig) -> tuple[str, ...]:
    names = parse_json(note)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) != config.classes:
        raise ValueError(f"its note of the classes is not a list of {config.classes} names")
    return tuple(names)


def _noted_sampling(note: str) -> SamplePlan:
    told = parse_json(note)
    if not isinstance(told, dict) or any(not isinstance(told[name], SAMPLING.get(name, ())) for name in told):
        raise ValueError(f"its note of the sampling does not give numbers for {', '.join(SAMPLING)}")
    return SamplePlan(**told)


def _class_names(config: LlamaGenConfig) -> tuple[str, ...]:
    names = imagenet_classes()
    return names if config.classes == len(names) else ()


def _defaults(config: LlamaGenConfig) -> SamplePlan:
    """LlamaGen's published sampling settings."""
    return SamplePlan(guidance=4.0, top_k=2000) if config.classes else SamplePlan(guidance=7.5, top_k=1000)


def _grid(weights: Weights, kind: str, asked: tuple[int, int] | None) -> Grid:
    """From our own metadata, else from the file's name, else as asked; two answers that differ are an error."""
    noted, pixels = weights.metadata.get("grid"), published.pixels_in(weights.path.stem, kind)
    if noted is not None:
        match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", noted)
        if match is None:
            raise weights.problem(f"its note of the grid, '{noted}', is not one such as 24x24; convert the file again.")
        found, source = (int(match[1]), int(match[2])), "was made for"
    elif pixels is not None:
        found, source = (SIDES[pixels],) * 2, f"says {pixels} pixels in its name, which is"
    elif asked is not None:
        return Grid(*asked)
    else:
        sizes = " or ".join(str(side) for side in published.PIXELS[kind])
        raise weights.problem(
            f"does not say which grid it was made for; name the file after its pixels ({sizes}, as in "
            f"{kind}_XL_{published.PIXELS[kind][-1]}) or give the grid."
        )
    if asked and asked != found:
        raise weights.problem(
            f"{source} a grid of {found[0]} x {found[1]} tokens, not {asked[0]} x {asked[1]}; leave the grid "
            "to the file" + ("." if noted else ", or rename it.")
        )
    return Grid(*found)


FAMILY = Family("LlamaGen", recognises, describe, LlamaGen, lambda key, config: place(key))

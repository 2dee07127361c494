"""VAR checkpoints: all sizes from their shapes, the pyramid from the number of tokens, 1000 classes of ImageNet."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...grid import Grid
from ...models.var import VAR, VARConfig, read_config
from ...plan import SamplePlan
from ...pyramid import Pyramid
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import inside
from ..weights import Target, Weights
from .llamagen import imagenet_classes, read_classes, read_sampling

# The published demo's: cfg 4 at the last scale, which is 5 where 1 means none.
DEFAULTS = SamplePlan(guidance=5.0, top_k=900, top_p=0.95)
BUFFERS = ("lvl_1L", "attn_bias_for_masking")  # computed from the sizes, and up to 20 MB


def recognises(weights: Weights) -> bool:
    tensors = weights.tensors
    return {"pos_1LC", "lvl_embed.weight", "word_embed.weight"} <= tensors.keys() and not any(
        ".mamba." in key for key in tensors
    )


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, pyramid and classes of a VAR checkpoint, official or ours, which says its sides in its metadata."""
    return describe_as(FAMILY, read_config, weights, grid)


def describe_as(
    family: Family, read_config: Callable[..., VARConfig], weights: Weights, grid: tuple[int, int] | None
) -> ModelInfo:
    """`describe` for a family with VAR's frame, whose sizes `read_config` reads."""
    metadata = weights.metadata
    try:
        sides = _read_sides(metadata["sides"]) if "sides" in metadata else None
        config = read_config(weights.shapes, sides)
        if "classes" in metadata:
            classes = read_classes(metadata["classes"], config.classes)
        else:
            classes = imagenet_classes() if config.classes == len(imagenet_classes()) else ()
        defaults = read_sampling(metadata["sampling"]) if "sampling" in metadata else DEFAULTS
        tokenizer = inside(Path(), metadata.get("tokenizer", published.VAR_TOKENIZER)).stem
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise weights.problem(f"its header does not describe {family.name} ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    _check_name(weights, family, config)
    last = Grid(*config.pyramid.sides[-1])
    if grid and grid != (last.rows, last.cols):
        raise weights.problem(
            f"was made for {last.rows} x {last.cols} tokens, not {grid[0]} x {grid[1]}; leave the grid to the file."
        )
    return ModelInfo(
        weights.name, family, config, last, classes, defaults, weights.nbytes, tokenizer, pyramid=config.pyramid
    )


def _read_sides(text: str) -> Pyramid:
    """The pyramid from our metadata, "1 2 3 4". Raises ValueError for anything else."""
    if not re.fullmatch(r"[1-9]\d{0,2}( [1-9]\d{0,2}){0,31}", text):
        raise ValueError(f"its metadata 'sides' is '{text[:40]}', not sides such as 1 2 3 4")
    return Pyramid.square(*map(int, text.split()))


def _check_name(weights: Weights, family: Family, config: VARConfig) -> None:
    """Refuse a published name that does not say what is inside: one of the two is wrong, and nobody can tell which."""
    found = re.search(r"(?:(?<![a-z0-9])(m-?var|var)[-_]?|^)d(\d\d)(?!\d)", weights.name.lower())
    if not found:
        return
    said = ("M-VAR" if found[1].startswith("m") else "VAR") if found[1] else family.name
    if said != family.name:
        raise weights.problem(
            f"says {said} in its name, but its layers are {family.name}'s; rename it or download it again."
        )
    if int(found[2]) != config.layers:
        raise weights.problem(
            f"says depth {found[2]} in its name, but has {config.layers} layers; rename it or download it again."
        )


def target(key: str, config: Any) -> Target | None:
    return None if key in BUFFERS or key.endswith(".zero_k_bias") else Target(key)


FAMILY = Family(
    "VAR", recognises, describe, lambda config, grid, ops: VAR(config, ops), target, tokenizer_kind="pyramid"
)

"""Infinity checkpoints: all sizes from their shapes; the largest picture, and the tokenizer, from names and bits."""

from __future__ import annotations

import re
from typing import Any

from ...errors import UserError
from ...grid import Grid
from ...models.infinity import PYRAMIDS, STAGES, Infinity, InfinityConfig, block_name, pyramid_of, read_config
from ...plan import SamplePlan
from ...pyramid import Pyramid
from ...sizes import PIXELS, Size
from .. import published
from ..families import Family, ModelInfo
from ..weights import Target, Weights

MARK = "text_proj_for_sos.ca.mat_q"
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen")


def _defaults(config: InfinityConfig) -> SamplePlan:
    """The published demos': README for the 2B, the notebooks for the 8B, whose tokens are 56 bits."""
    if config.bits == 56:
        return SamplePlan(guidance=3.0, temperature=1.0, top_p=0.97)
    return SamplePlan(guidance=4.0, temperature=0.5, top_p=0.97)


def size_of(pyramid: Pyramid) -> Size:
    """Width and height of a pyramid's picture, in pixels."""
    rows, cols = pyramid.sides[-1]
    return cols * PIXELS, rows * PIXELS


SIZES = {name: tuple(map(size_of, pyramids)) for name, pyramids in PYRAMIDS.items()}  # the widest first


def recognises(weights: Weights) -> bool:
    return MARK in weights.tensors


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of an Infinity checkpoint, and the pictures it draws: up to those that it was trained on."""
    try:
        config = read_config(weights.shapes)
        if config.levels < max(STAGES.values()):
            raise ValueError(f"it knows {config.levels} scales")
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its header does not describe an Infinity ({error}).") from error
    names = list(STAGES)
    drawn = names[: names.index(_largest(weights.name)) + 1]
    pyramids = tuple(pyramid for name in drawn for pyramid in PYRAMIDS[name])
    square = next(pyramid for pyramid in PYRAMIDS[drawn[-1]] if pyramid.sides[-1][0] == pyramid.sides[-1][1])
    info = ModelInfo(
        weights.name, FAMILY, config, Grid(*square.sides[-1]), (), _defaults(config), weights.nbytes,
        published.INFINITY_TOKENIZERS.get(config.bits, f"infinity_vae_d{config.bits}"),
        sizes=tuple(map(size_of, pyramids)), pyramid=square, pyramids=pyramids,
    )  # fmt: skip
    if grid is None:
        return info
    try:
        return info.with_size((grid[1] * PIXELS, grid[0] * PIXELS))
    except UserError as error:
        raise weights.problem(f"{error}") from error


def _largest(name: str) -> str:
    """The largest published size that a file was trained for: 256 or 512 pixels are in its name, else 1M."""
    found = set(re.findall(r"(?<!\d)(256|512)x\1(?!\d)", name))
    return {"256": "0.06M", "512": "0.25M"}[found.pop()] if len(found) == 1 else "1M"


def target(key: str, config: InfinityConfig) -> Target | None:
    return None if key in BUFFERS or key.endswith(".zero_k_bias") else Target(block_name(key, config))


def precise(name: str) -> bool:
    """All but the matrices of the blocks and their biases, as published; and what scales there."""
    return not name.startswith("blocks.") or any(part in name for part in (".ada_gss", ".ca_norm.", ".scale_mul"))


def build(config: InfinityConfig, grid: Grid, ops: Any) -> Infinity:
    return Infinity(config, pyramid_of(grid), ops)


FAMILY = Family("Infinity", recognises, describe, build, target, cleaned=False, tokenizer_kind="bits", precise=precise)

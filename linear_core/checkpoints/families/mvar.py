"""M-VAR checkpoints: VAR's frame, read as VAR's; a Mamba-2 layer in every block tells them apart."""

from __future__ import annotations

from typing import Any

from ...models.mvar import MVAR, read_config
from ..families import Family, ModelInfo
from ..weights import Target, Weights
from . import var

IN_FLOAT32 = (".A_log", ".D", ".dt_bias")  # a few numbers, and exponents of long decays


def recognises(weights: Weights) -> bool:
    tensors = weights.tensors
    return {"pos_1LC", "lvl_embed.weight"} <= tensors.keys() and any(".mamba." in key for key in tensors)


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes, pyramid and classes of an M-VAR checkpoint, official or ours."""
    return var.describe_as(FAMILY, read_config, weights, grid)


def target(key: str, config: Any) -> Target | None:
    return None if key.endswith(".attn.patch_nums") else var.target(key, config)


FAMILY = Family(
    "M-VAR", recognises, describe, lambda config, grid, ops: MVAR(config, ops), target, tokenizer_kind="pyramid",
    precise=lambda name: name.endswith(IN_FLOAT32),
)  # fmt: skip

"""MAR checkpoints: all sizes but the number of heads from their shapes, 1000 classes of ImageNet.

The published .pth hold the weights twice, as `model` and, averaged over training, as `model_ema`. The published results
are those of the averaged ones, and so are ours. All three sizes have one file name, so names say nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import UserError
from ...models.mar import MAR, MARConfig, read_config
from ...plan import SamplePlan
from ...steps import MaskedPlan
from .. import published
from ..families import Family, ModelInfo
from ..untrusted import inside
from ..weights import NESTED, Target, Weights
from .llamagen import imagenet_classes, read_classes, read_sampling

# Of the published evaluation, by width: it grows with the model.
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}
MASKED = MaskedPlan()


def recognises(weights: Weights) -> bool:
    return {"encoder_pos_embed_learned", "diffloss.net.input_proj.weight"} <= weights.tensors.keys()


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes and classes of a MAR checkpoint, official or ours, which says its heads in its metadata."""
    metadata = weights.metadata
    _check_averaged(weights)
    try:
        config = read_config(weights.shapes, int(metadata.get("heads", "0")), int(metadata.get("channels", "16")))
        if "classes" in metadata:
            classes = read_classes(metadata["classes"], config.classes)
        else:
            classes = imagenet_classes() if config.classes == len(imagenet_classes()) else ()
        defaults = SamplePlan(guidance=GUIDANCE.get(config.width, 3.0))
        if "sampling" in metadata:
            defaults = read_sampling(metadata["sampling"])
        pixels = int(metadata.get("factor", str(published.FACTOR))) * config.patch
        tokenizer = inside(Path(), metadata.get("tokenizer", published.KL16)).stem
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise weights.problem(f"its header does not describe a MAR ({error}).") from error
    except UserError as error:
        raise weights.problem(str(error)) from error
    if grid and grid != (config.grid.rows, config.grid.cols):
        raise weights.problem(
            f"was made for {config.grid.rows} x {config.grid.cols} tokens, not {grid[0]} x {grid[1]}; leave the grid "
            "to the file."
        )
    return ModelInfo(
        weights.name, FAMILY, config, config.grid, classes, defaults, weights.nbytes, tokenizer, pixels=pixels,
        masked=MASKED,
    )  # fmt: skip


def _check_averaged(weights: Weights) -> None:
    """Refuse a training checkpoint without averaged weights: it would draw, and worse than anything published."""
    inside_file = {weights.keys.get(name, name).partition(NESTED)[0] for name in weights.tensors}
    if inside_file == {"model"}:
        raise weights.problem(
            "holds only the weights of the last training step ('model'), which draw worse; use the file that also has "
            "the averaged ones ('model_ema')."
        )


def precise(name: str) -> bool:
    """The diffusion head, and what is added to or normalises the residual stream."""
    return name.startswith("diffloss.") or "norm" in name or "_ln." in name or "pos_embed" in name


def target(key: str, config: MARConfig) -> Target | None:
    return Target(key)


def build(config: MARConfig, grid: Any, ops: Any) -> MAR:
    return MAR(config, ops)


FAMILY = Family(
    "MAR", recognises, describe, build, target, tokenizer_kind="latents", precise=precise, averaged=True
)  # fmt: skip

"""NOVA checkpoints: the hub's folder, in which diffusers keeps every part in a folder of its own.

The shapes tell all sizes but those of texts and pictures, which transformer/config.json tells, and how tokens are
denoised, which scheduler/scheduler_config.json tells. Both are part of what was trained, so a file without them is
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import UserError
from ...models.nova import Nova, NovaConfig, read_config
from ...plan import SamplePlan
from ...prompts import Prompt
from ...prompts.phi import DTYPE, build, text_features
from ...prompts.t5 import text_prompt
from ...prompts.tokenizer import TextTokenizer
from ...steps import SPACINGS, MaskedPlan
from ..families import Family, ModelInfo
from ..untrusted import number, read_json
from ..weights import TRANSFORMER, Target, Weights, read_weights

GUIDANCE, STEPS, DENOISING = 5.0, 64, 25  # defaults of the published pipeline
MARK = {"image_encoder.patch_embed.proj.weight", "image_decoder.time_cond_embed.timestep_proj.fc1.weight"}
STILL = "video_pos_embed.time_proj.0.weight"
# What a scheduler has to say for tokens to be denoised as in models/denoise.py, and what it means if it says nothing.
SCHEDULER = {
    "_class_name": ("DDPMScheduler", ""), "num_train_timesteps": (1000, 1000), "trained_betas": (None, None),
    "prediction_type": ("epsilon", "epsilon"), "beta_schedule": ("squaredcos_cap_v2", "linear"), "steps_offset": (0, 0),
    "variance_type": ("fixed_small", "fixed_small"), "rescale_betas_zero_snr": (False, False),
}  # fmt: skip


def recognises(weights: Weights) -> bool:
    return weights.tensors.keys() >= MARK


def describe(weights: Weights, grid: tuple[int, int] | None = None) -> ModelInfo:
    """Sizes of a NOVA that draws still images, from its folder as published."""
    if not weights.path.is_dir() or not (weights.path / TRANSFORMER / "config.json").is_file():
        raise weights.problem(
            "is the transformer of a NOVA without its folder; use the whole folder as published, with transformer, "
            "scheduler, vae, text_encoder and tokenizer in it."
        )
    if STILL not in weights.tensors or "motion_embed.flow_proj.0.weight" in weights.tensors:
        raise weights.problem("is a NOVA that draws videos, which is not supported; use one that draws images.")
    said = read_json(weights.path / TRANSFORMER / "config.json", "is not a model's config")
    try:
        rows, cols = said["image_base_size"]
        if type(rows) is not int or rows != cols or not 0 < rows <= 512:
            raise ValueError(f"its config.json says image_base_size: {said['image_base_size']!r:.60}")
        texts = number(said, "text_token_len", 256)
        config = read_config(weights.shapes, rows, text_tokens=texts)
        if texts > (most := weights.shapes["text_embed.weight"][0]):
            raise ValueError(f"its config.json says text_token_len: {texts}, more than its {most}")
        pixels = number(said, "image_stride", 8) * config.patch
    except (KeyError, ValueError, IndexError, TypeError, ZeroDivisionError) as error:
        raise weights.problem(f"its weights and its config.json do not describe a NOVA ({error}).") from error
    if grid and grid != (rows, cols):
        raise weights.problem(
            f"was made for {rows} x {cols} tokens, not {grid[0]} x {grid[1]}; leave the grid to the file."
        )
    masked = MaskedPlan(STEPS, DENOISING, schedule="constant", spacing=_spacing(weights), rounded=True)
    return ModelInfo(
        weights.name, FAMILY, config, config.grid, (), SamplePlan(guidance=GUIDANCE), weights.nbytes, "vae",
        pixels=pixels, masked=masked,
    )  # fmt: skip


def _spacing(weights: Weights) -> str:
    """The spacing of denoising steps. Raises UserError if tokens are denoised in another way than ours."""
    file = weights.path / "scheduler" / "scheduler_config.json"
    if not file.is_file():
        raise UserError(f"{file}: there is no such file, but it says how tokens are denoised; download it again.")
    said = read_json(file, "does not say how tokens are denoised")
    for name, (needed, default) in SCHEDULER.items():
        if (found := said.get(name, default)) != needed:
            raise UserError(f"{file}: says {name}: {found!r:.60}, but only {needed!r} is supported.")
    if (spacing := said.get("timestep_spacing", "leading")) not in SPACINGS[1:]:
        raise UserError(
            f"{file}: says timestep_spacing: {spacing!r:.60}, but only {' and '.join(SPACINGS[1:])} are supported."
        )
    return str(spacing)


def precise(name: str) -> bool:
    """The diffusion head, what normalises, and where and when tokens are."""
    return name.startswith(("image_decoder.", "video_pos_embed.")) or "norm" in name


def target(key: str, config: NovaConfig) -> Target | None:
    if key.startswith("video_encoder.patch_embed."):  # reads earlier frames
        return None
    if key.endswith("patch_embed.proj.weight"):
        return Target(key, transform=_as_matrix)
    if key.startswith("image_decoder.head."):
        return Target(key, transform=partial(_channels_first, config.channels))
    return Target(key)


def _as_matrix(convolution: Tensor) -> Tensor:
    return convolution.flatten(1)


def _channels_first(channels: int, rows: Tensor) -> Tensor:
    """Rows of what the head draws: upstream's are row, column and channel of a patch, ours channel, row and column."""
    return rows.unflatten(0, (-1, channels)).transpose(0, 1).flatten(0, 1)


def build_model(config: NovaConfig, grid: Any, ops: Any) -> Nova:
    return Nova(config, ops)


def prompt(tokenizer: TextTokenizer, texts: Sequence[str], negative: str, info: ModelInfo) -> Prompt:
    """One image per text, guided away from `negative`, or from what the model has learned for no text.

    The text encoder, in the same folder, is loaded for this and not kept.
    """
    length, path = info.config.text_tokens, tokenizer.path.parents[1] / "text_encoder"
    wanted = [*texts, *([negative] if negative else [])]
    encoder = _encoder(path, info.config.caption_dim)
    features = [text_features(tokenizer, encoder, text, length) for text in wanted]
    negatives = text_prompt(features[len(texts) :] * len(texts), length=length) if negative else None
    made = text_prompt(features[: len(texts)], tuple(texts), length)
    return Prompt(made.tokens, made.pad, made.names, negatives)


def _encoder(folder: Path, width: int) -> Any:
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder, but it has to hold the text encoder; download it again.")
    weights = read_weights(folder)
    config: Mapping[str, Any] = weights.config
    tensors = {key.removeprefix("model."): tensor for key, tensor in weights.tensors.items()}
    try:
        encoder = build(tensors, number(config, "num_attention_heads", 32), _share(config))
        if encoder.config.hidden_size != width:
            raise ValueError(f"gives {encoder.config.hidden_size} features per token, but the model takes {width}")
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{folder}: {error}; download the text encoder again.") from error
    return encoder.to(DTYPE)


def _share(config: Mapping[str, Any]) -> float:
    """Of each head, what is rotated."""
    found = config.get("partial_rotary_factor") or (config.get("rope_parameters") or {}).get("partial_rotary_factor")
    return float(found) if isinstance(found, int | float) and 0 < found <= 1 else 0.4


FAMILY = Family(
    "NOVA", recognises, describe, build_model, target, prompt=prompt, cleaned=False,
    tokenizer_files=("tokenizer/tokenizer.json",), tokenizer_kind="latents", precise=precise,
)  # fmt: skip

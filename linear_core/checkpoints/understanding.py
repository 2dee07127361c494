"""The part of a Janus that looks at pictures: found in the model's own files, and loaded when it is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import isqrt

import torch
from torch import nn

from ..errors import UserError
from ..models.blocks import Ops
from ..models.understanding import HEAD_DIM, Understanding, UnderstandingConfig
from ..prompts.janus import Question, question
from .families import ModelInfo, janus
from .library import ImageModel, ModelFiles, read_checkpoint
from .untrusted import number, section
from .weights import KeyMap, Target, Weights, load_into


def check_looks(info: ModelInfo, files: ModelFiles) -> None:
    """Raise UserError for a model that cannot look at pictures, from its header alone."""
    if info.family is not janus.FAMILY:
        raise UserError(f"model: {info.name} cannot look at pictures, so it cannot be asked about them; Janus can.")
    describe(read_checkpoint(files.decoder))


def questions(model: ImageModel, texts: Sequence[str]) -> list[Question]:
    """What is asked of a picture for each text."""
    return [question(model.text_tokenizer, text) for text in texts]


def describe(weights: Weights) -> UnderstandingConfig:
    """Sizes of the part that looks at pictures, from a checkpoint's shapes. Raises UserError if it is not there."""
    targets = {key: found for key in weights.tensors if (found := janus.understanding(key)) is not None}
    if not targets:
        raise weights.problem(
            "has no part that looks at pictures; choose the model's published folder, or another score."
        )
    try:
        shapes = {found.name: tuple(found.transform(weights.tensors[key]).shape) for key, found in targets.items()}
        width, _, patch, _ = shapes["vision_tower.patch_embed.proj.weight"]
        blocks = [int(block[1]) for name in shapes if (block := re.match(r"vision_tower\.blocks\.(\d+)\.", name))]
        config = UnderstandingConfig(
            layers=1 + max(blocks),
            width=width,
            heads=number(section(weights.config, "vision_config"), "num_attention_heads", max(1, width // HEAD_DIM)),
            hidden=shapes["vision_tower.blocks.0.mlp.fc1.weight"][0],
            side=isqrt(shapes["vision_tower.pos_embed"][1]),
            patch=patch,
            out=shapes["aligner.fc1.weight"][0],
        )
    except (KeyError, ValueError, IndexError) as error:
        raise weights.problem(f"its part that looks at pictures is not Janus' ({error}); download it again.") from error
    if config.layers > len(targets) or min(vars(config).values()) < 1 or config.width % config.heads:
        raise weights.problem(f"its part that looks at pictures has impossible sizes ({config}); download it again.")
    return config


def load_understanding(
    model: ImageModel, *, dtype: torch.dtype, device: torch.device | str = "cpu", ops: Ops = nn
) -> Understanding:
    """The part of a Janus that looks at pictures, from the model's own files, in eval mode.

    dtype   what it computes in
    ops     namespace of its layers, as for `load_model`
    Raises UserError naming the file.
    """
    check_looks(model.info, model.files)
    weights = read_checkpoint(model.files.decoder)
    (asked,) = questions(model, [""])
    with torch.device("meta"):
        module = Understanding(describe(weights), ops)
    load_into(module, weights, dtype, _key_map(weights, asked.answers))
    return module.eval().requires_grad_(False).to(device)


def _key_map(weights: Weights, answers: tuple[int, int]) -> KeyMap:
    """Where the file's weights go. Of the head that writes text, the rows of two tokens are read."""
    head = next((key for key in janus.HEADS if key in weights.tensors), "")
    rows = Target("answers.weight", transform=lambda matrix: torch.stack([matrix[token] for token in answers]))
    return lambda key: rows if key == head else janus.understanding(key)

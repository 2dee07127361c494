"""Images as a model's tokens: scaled, cropped and encoded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linear_core.checkpoints.families import ModelInfo
from ..linear_core.errors import UserError
from ..linear_core.pictures.fit import fit
from ..linear_core.plan import CachePlan
from ..linear_core.prompts import Prompt
from ..linear_core.pyramid import Pyramid
from ..linear_core.sizes import Size, nearest
from . import host
from .sockets import Model, Tokens


def encode(model: Model, image: Tensor, prompt: Prompt | None = None) -> Tokens:
    """IMAGE B H W 3 as the model's tokens, at the size that the prompt asks for, or the model's nearest."""
    info, tokenizer = model.image.info, model.image.tokenizer
    if info.masked is not None:
        raise UserError(
            f"model: {info.name} draws tokens in any order; connect the image and a mask to Masked Generate."
        )
    if not tokenizer.config.encoder_widths:
        raise UserError(
            f"model: {model.image.files.tokenizer.name} has no encoder; choose a tokenizer file that has one."
        )
    if prompt is not None:
        model.image.check(prompt)
        info = info.with_grid(prompt.grid)
    elif info.sizes:
        height, width = image.shape[1:3]
        info = info.with_size(nearest((width, height), _sizes(info))[0])
    grid, factor = info.grid, tokenizer.config.factor
    pictures = fit(image, grid.rows * factor, grid.cols * factor) * 2 - 1
    host.load(model.tokenizer, memory=model.picture_bytes(grid.rows, grid.cols))
    device = tokenizer.device
    codes = torch.cat([_tokens(tokenizer, part.to(device), info.pyramid).cpu() for part in pictures.split(4)])
    nothing = torch.zeros(len(codes), 1, *codes.shape[1:])
    return Tokens(
        codes=codes, shares=nothing, names=("encoded picture",) * len(codes), model=info.name,
        codebook=info.config.codes, plan=CachePlan("full"), cache_bytes=0, seconds=0.0,
        meaning=model.image.codebook, sides=info.pyramid.sides if info.pyramid else (),
        pixels=(image.shape[1], image.shape[2]),
    )  # fmt: skip


def _sizes(info: ModelInfo) -> list[Size]:
    """What a picture can be cropped to: of a model that draws in scales, only with as many as it has by itself."""
    stages = info.pyramid.stages if info.pyramid else 0
    pyramids = info.pyramids or (None,) * len(info.sizes)
    return [size for size, one in zip(info.sizes, pyramids, strict=True) if one is None or one.stages == stages]


def _tokens(tokenizer: Any, pictures: Tensor, pyramid: Pyramid | None) -> Tensor:
    """Pictures B 3 H W in -1..1 as codes B rows cols, or B N of all scales."""
    if pyramid is None:
        return tokenizer.encode(pictures)
    return torch.cat([scale.flatten(1) for scale in tokenizer.encode(pictures, pyramid)], 1)

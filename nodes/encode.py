"""Encode Image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.plan import CachePlan
from ..linear_core.prompts import Prompt
from ..linear_core.sizes import nearest
from . import host
from .inputs import checked
from .sockets import MODEL, PROMPT, TOKENS, Model, Tokens


class EncodeImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_EncodeImage",
            display_name="Encode Image",
            category="LineAR",
            description="Encodes images as the tokens of a model, so that Generate can keep their upper rows and "
            "generate the rest.",
            search_aliases=["vq encode", "image to tokens", "tokenize", "outpaint", "continue", "linear"],
            inputs=[
                MODEL.Input("model", tooltip="The model that will continue the image. Its tokenizer must include an "
                            "encoder; the bundled and the published ones do."),
                io.Image.Input("image", tooltip="Images of any size. They are scaled and center-cropped to the size of "
                               "the model, or to the closest of its sizes."),
                PROMPT.Input("prompt", optional=True, tooltip="Crops to the size set in this Text Prompt, for models "
                             "with several sizes (Lumina-mGPT). Connect the one that Generate uses."),
            ],
            outputs=[TOKENS.Output(display_name="tokens", tooltip="For Generate (with keep_rows) and Decode.")],
        )  # fmt: skip

    @classmethod
    @checked
    def execute(cls, model: Model, image: Tensor, prompt: Prompt | None = None) -> io.NodeOutput:
        return io.NodeOutput(encode(model, image, prompt))


def encode(model: Model, image: Tensor, prompt: Prompt | None = None) -> Tokens:
    """IMAGE B H W 3 as the model's tokens, at the size that the prompt asks for, or the model's nearest."""
    info, tokenizer = model.image.info, model.image.tokenizer
    if not tokenizer.config.encoder_widths:
        raise UserError(
            f"model: {model.image.files.tokenizer.name} has no encoder; choose a tokenizer file that has one."
        )
    if prompt is not None:
        model.image.check(prompt)
        info = info.with_grid(prompt.grid)
    elif info.sizes:
        height, width = image.shape[1:3]
        info = info.with_size(nearest((width, height), info.sizes)[0])
    grid, factor = info.grid, tokenizer.config.factor
    pictures = fit(image, grid.rows * factor, grid.cols * factor) * 2 - 1
    host.load(model.tokenizer, memory=model.picture_bytes(grid.rows, grid.cols))
    device = tokenizer.device
    codes = torch.cat([tokenizer.encode(part.to(device)).cpu() for part in pictures.split(4)])
    nothing = torch.zeros(len(codes), 1, grid.rows, grid.cols)
    return Tokens(
        codes=codes, shares=nothing, names=("encoded picture",) * len(codes), model=info.name,
        codebook=info.config.codes, plan=CachePlan("full"), cache_bytes=0, seconds=0.0,
        meaning=model.image.codebook, pixels=(image.shape[1], image.shape[2]),
    )  # fmt: skip


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """IMAGE B H W 3 -> B 3 height width: the middle of it, scaled without changing its proportions."""
    scale = max(height / image.shape[1], width / image.shape[2])
    image = _middle(_middle(image, 1, height / scale), 2, width / scale)
    pictures = image.permute(0, 3, 1, 2)
    tall, wide = pictures.shape[2:]
    size = max(height, round(tall * scale)), max(width, round(wide * scale))
    pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pictures[:, :, top : top + height, left : left + width]


def _middle(image: Tensor, side: int, needed: float) -> Tensor:
    """Of a side far longer than needed, the middle: a strip of 1 x 20000 pixels would be scaled to gigabytes."""
    length = image.shape[side]
    rest = max(0, (length - math.ceil(8 * needed)) // 2)
    return image.narrow(side, rest, length - 2 * rest)

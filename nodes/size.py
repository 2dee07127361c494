"""The choice of a picture's size, for models that have one. Part of Text Prompt, as the prompt says the size too."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..linear_core.checkpoints.families import ModelInfo
from ..linear_core.checkpoints.families.infinity import SIZES
from ..linear_core.checkpoints.families.lumina import SIDES
from ..linear_core.sizes import sizes

OWN = "the model's own"


def _written(width: int, height: int) -> str:
    return f"{width} x {height}"


def size_input() -> io.Input:
    """First which model, then one of the sizes that it draws: nothing else can be chosen."""
    offered = {f"of Lumina-mGPT {side}": sizes(side) for side in SIDES}
    offered |= {f"of Infinity {name}": among for name, among in SIZES.items()}
    options = [
        io.DynamicCombo.Option(
            name,
            [
                io.Combo.Input(
                    "pixels",
                    options=[_written(*size) for size in among],
                    default=_written(*next(size for size in among if size[0] == size[1])),
                    tooltip="Width x height in pixels, from the widest to the tallest: the sizes that the model was "
                    "trained on.",
                )
            ],
        )
        for name, among in offered.items()
    ]
    return io.DynamicCombo.Input(
        "size",
        options=[io.DynamicCombo.Option(OWN, []), *options],
        optional=True,
        tooltip="Size of the image. 'the model's own': the only size of the model, or its square. Lumina-mGPT has "
        "many: choose the number in your model's name, then a size. Infinity draws best in the size that its file was "
        "trained for: 1M, or 0.25M or 0.06M where its name says 512 or 256. Other models have no other size.",
    )


def sized(info: ModelInfo, size: dict[str, Any] | None) -> ModelInfo:
    """The model with the grid of what was chosen. Raises UserError where it draws no such picture."""
    if size is None or size["size"] == OWN:
        return info
    width, _, height = size["pixels"].partition(" x ")
    return info.with_size((int(width), int(height)))

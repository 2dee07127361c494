"""The choice of a picture's size, for models that have one. Part of Text Prompt, as the prompt says the size too."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..linear_core.checkpoints.families import ModelInfo, infinity
from ..linear_core.checkpoints.families.lumina import SIDES, SIDES_2
from ..linear_core.sizes import EMU3_AREAS, EMU35_SIZES, Size, emu3_sizes, sizes

OWN = "the model's own"
SIZES: dict[str, tuple[Size, ...]] = {
    **{f"of Lumina-mGPT {side}": sizes(side) for side in SIDES},
    "of Lumina-mGPT 2.0": tuple(size for side in SIDES_2 for size in sizes(side)),
    **{f"of {name}": emu3_sizes(area) for name, area in EMU3_AREAS.items()},
    "of Emu3.5": EMU35_SIZES,
    **{f"of Infinity {name}": drawn for name, drawn in infinity.SIZES.items()},
}


def _written(width: int, height: int) -> str:
    return f"{width} x {height}"


def size_input() -> io.Input:
    """First which model, then one of the sizes that it draws: nothing else can be chosen."""
    options = [
        io.DynamicCombo.Option(
            name,
            [
                io.Combo.Input(
                    "pixels",
                    options=[_written(*size) for size in drawn],
                    default=next(_written(*size) for size in drawn if size[0] == size[1]),
                    tooltip="Width x height in pixels, from the widest to the tallest: the sizes that the model draws.",
                )
            ],
        )
        for name, drawn in SIZES.items()
    ]
    return io.DynamicCombo.Input(
        "size",
        options=[io.DynamicCombo.Option(OWN, []), *options],
        optional=True,
        tooltip="Size of the image. 'the model's own': the only size of the model, or its square. Lumina-mGPT, Emu3 "
        "and Emu3.5 have several: choose your model's version, or the number in its name, then a size. Infinity draws "
        "best in the size that its file was trained for: 1M, or 0.25M or 0.06M where its name says 512 or 256. Other "
        "models have no other size.",
    )


def sized(info: ModelInfo, size: dict[str, Any] | None) -> ModelInfo:
    """The model with the grid of what was chosen. Raises UserError where it draws no such picture."""
    if size is None or size["size"] == OWN:
        return info
    width, _, height = size["pixels"].partition(" x ")
    return info.with_size((int(width), int(height)))

"""Picture sizes of models that offer a choice. Integers only, in pixels: width, height."""

from __future__ import annotations

from functools import cache
from math import log

PIXELS = 16  # per token, along each side
STEP = 32  # sides of Lumina-mGPT's pictures are multiples of it
ASPECT = 4  # the highest aspect ratio, either way

Size = tuple[int, int]


@cache
def sizes(side: int) -> tuple[Size, ...]:
    """Every size of a Lumina-mGPT whose square picture has `side` pixels, the widest first.

    The largest sizes of at most the square's area: adding a step to both sides would exceed it. These are the crops of
    the training pictures (generate_crop_size_list in lumina_mgpt/data/item_processor.py of
    github.com/Alpha-VLLM/Lumina-mGPT).
    """
    area = (side // STEP) ** 2
    return tuple(
        (width * STEP, height * STEP)
        for width in range(area, 0, -1)
        for height in range(area // (width + 1) or 1, area // width + 1)
        if max(width, height) <= ASPECT * min(width, height)
    )


# -- Emu3 and Emu3.5 ---------------------------------------------------------------------------------------------------

EMU3_AREAS = {"Emu3-Gen": 720 * 720, "Emu3-Stage1": 512 * 512}  # pixels of a picture
EMU3_RATIOS = ((21, 9), (2, 1), (16, 9), (3, 2), (4, 3), (1, 1), (3, 4), (2, 3), (9, 16), (1, 2))
EMU3_PIXELS = 8  # per token, along each side
EMU35_SIZES = (
    tuple(  # rows and columns of 16 pixels, as in configs/example_config_t2i.py of github.com/baaivision/Emu3.5
        (cols * PIXELS, rows * PIXELS)
        for rows, cols in ((41, 97), (47, 85), (52, 78), (55, 73), (64, 64), (73, 55), (78, 52), (85, 47))
    )
)


@cache
def emu3_sizes(area: int) -> tuple[Size, ...]:
    """Sizes of an Emu3 whose pictures have about `area` pixels, the widest first.

    Emu3 was trained on any ratio; these are the usual ones. Rounded as calculate_generate_size does in
    emu3/mllm/processing_emu3.py of github.com/baaivision/Emu3.
    """
    scale = [(width, height, (area / (width * height)) ** 0.5 / EMU3_PIXELS) for width, height in EMU3_RATIOS]
    return tuple((round(width * t) * EMU3_PIXELS, round(height * t) * EMU3_PIXELS) for width, height, t in scale)


def nearest(size: Size, among: tuple[Size, ...]) -> list[Size]:
    """`among`, sorted by how close their aspect ratio is to that of `size`."""
    return sorted(among, key=lambda one: abs(log(one[0] / one[1] / (size[0] / size[1]))))

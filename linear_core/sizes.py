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


def nearest(size: Size, among: tuple[Size, ...]) -> list[Size]:
    """`among`, sorted by how close their aspect ratio is to that of `size`."""
    return sorted(among, key=lambda one: abs(log(one[0] / one[1] / (size[0] / size[1]))))

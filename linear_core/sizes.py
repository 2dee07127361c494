"""Sizes of pictures that a model with a choice of them was trained on. Integers only, in pixels: width, height."""

from __future__ import annotations

from functools import cache
from math import log

PIXELS = 16  # of a token, along each side
STEP = 32  # Lumina-mGPT's sides are multiples of this
ASPECT = 4  # at most, either way

Size = tuple[int, int]


@cache
def sizes(side: int) -> tuple[Size, ...]:
    """Every size of a Lumina-mGPT whose square picture has `side` pixels, the widest first.

    As large as they may be: no more area than the square's, but with another step on both sides they would have. These
    are the crops that the training pictures were brought to (generate_crop_size_list in
    lumina_mgpt/data/item_processor.py of github.com/Alpha-VLLM/Lumina-mGPT).
    """
    area = (side // STEP) ** 2
    return tuple(
        (width * STEP, height * STEP)
        for width in range(area, 0, -1)
        for height in range(area // (width + 1) or 1, area // width + 1)
        if max(width, height) <= ASPECT * min(width, height)
    )


def nearest(size: Size, among: tuple[Size, ...]) -> list[Size]:
    """`among`, those first whose shape is most like `size`'s."""
    return sorted(among, key=lambda one: abs(log(one[0] / one[1] / (size[0] / size[1]))))

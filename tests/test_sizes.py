"""Sizes of pictures: the published list, and what is nearest to one that is not on it."""

from __future__ import annotations

import pytest

from linear_core.sizes import nearest, sizes

COUNTS = {512: 49, 768: 73, 1024: 97}  # of generate_crop_size_list at commit 104abe45


@pytest.mark.parametrize("side", COUNTS)
def test_the_published_list(side):
    """A walk along the largest sizes, from the widest to the tallest, as the published function takes it."""
    area = (side // 32) ** 2
    walked, width, height = [], area, 1
    while width:
        if max(width, height) / min(width, height) <= 4:
            walked.append((width * 32, height * 32))
        if (height + 1) * width <= area:
            height += 1
        else:
            width -= 1
    assert list(sizes(side)) == walked and len(walked) == COUNTS[side]


@pytest.mark.parametrize("side", COUNTS)
def test_what_a_size_is(side):
    """Multiples of 32, aspect up to 4, no more area than the square, and as large as that leaves room for."""
    found = sizes(side)
    assert (side, side) in found and len(set(found)) == len(found)
    assert {(h, w) for w, h in found} == set(found), "upright ones and lying ones alike"
    for width, height in found:
        assert width % 32 == height % 32 == 0 and max(width, height) <= 4 * min(width, height)
        assert width * height <= side * side < (width + 32) * (height + 32)


def test_nearest():
    assert nearest((800, 600), sizes(768))[0] == (864, 640)
    assert nearest((600, 800), sizes(768))[0] == (640, 864)
    assert nearest((3000, 3000), sizes(1024))[0] == (1024, 1024)
    assert nearest((5000, 100), sizes(512))[0] == (1024, 256)

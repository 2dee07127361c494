"""Retention heatmaps: which tokens the cache still holds, as colours."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..pyramid import Pyramid

# Cividis (Nunez et al. 2018) at nine points: reads the same with colour-vision deficiency and in grey.
_CIVIDIS = torch.tensor([
    [0.000, 0.135, 0.304], [0.000, 0.213, 0.430], [0.207, 0.289, 0.420], [0.348, 0.367, 0.425], [0.476, 0.448, 0.445],
    [0.607, 0.530, 0.438], [0.747, 0.620, 0.406], [0.889, 0.717, 0.338], [0.996, 0.909, 0.217],
])  # fmt: skip


def colormap(values: Tensor) -> Tensor:
    """Values in 0..1 of any shape -> RGB in 0..1, the same shape with 3 channels last."""
    position = values.clamp(0, 1) * (len(_CIVIDIS) - 1)
    low = position.floor().long().clamp(max=len(_CIVIDIS) - 2)
    t = (position - low)[..., None]
    return _CIVIDIS[low] * (1 - t) + _CIVIDIS[low + 1] * t


def heatmap(share: Tensor, height: int, width: int, picture: Tensor | None = None, opacity: float = 0.7) -> Tensor:
    """Draw how much of each token the cache holds.

    share     B rows cols, share of layers and heads that hold the token
    picture   B H W 3 in 0..1, drawn below the map: evicted tokens are darkened, held ones tinted. None: the map alone
    opacity   of the map over the picture, 0..1
    Returns B height width 3 in 0..1; cells have crisp edges.
    """
    map_ = F.interpolate(share[:, None].float(), (height, width), mode="nearest")[:, 0]
    colours = colormap(map_)
    if picture is None:
        return colours
    if picture.shape[1:3] != (height, width):
        picture = F.interpolate(picture.permute(0, 3, 1, 2), (height, width), mode="nearest").permute(0, 2, 3, 1)
    faded = picture * (1 - 0.8 * opacity)
    lit = picture * 0.3 + colours * 0.7
    return faded + (lit - faded) * (opacity * 1.2 * map_.sqrt()).clamp(max=1)[..., None]


def scale_maps(share: Tensor, pyramid: Pyramid) -> list[Tensor]:
    """One map for each scale of what the cache holds, B h w each: share B N."""
    sizes = [pyramid.size(stage) for stage in range(pyramid.stages)]
    maps = share.split(sizes, 1)
    return [one.unflatten(1, sides) for one, sides in zip(maps, pyramid.sides, strict=True)]


def over_scales(share: Tensor, pyramid: Pyramid) -> Tensor:
    """Which places of the picture the cache remembers: B rows cols of the last scale, from share B N.

    The mean over the scales that are ever held, each resized to the last and weighted by the tokens held of it.
    """
    maps = scale_maps(share, pyramid)[:-1] or scale_maps(share, pyramid)
    weights = torch.stack([one.flatten(1).sum(1) for one in maps])  # scales B
    weights = weights / weights.sum(0).clamp(min=1e-9)
    resized = [F.interpolate(one[:, None], pyramid.sides[-1], mode="nearest")[:, 0] for one in maps]
    return sum((one * weight[:, None, None] for one, weight in zip(resized, weights, strict=True)), torch.zeros(()))


def strip(share: Tensor, pyramid: Pyramid, side: int = 64, gap: int = 4) -> Tensor:
    """The scales of each image side by side, coarse to fine, drawn at equal height, with the number of tokens that a
    head holds of each, on average, below: share B N -> B H W 3 in 0..1.
    """
    maps = scale_maps(share, pyramid)
    widths = [max(1, round(side * cols / rows)) for rows, cols in pyramid.sides]
    sheet = torch.ones(len(share), side + 2 * gap + LABEL, sum(widths) + gap * (len(widths) - 1), 3)
    left = 0
    for stage, (one, width) in enumerate(zip(maps, widths, strict=True)):
        large = F.interpolate(one[:, None].float(), (side, width), mode="nearest")[:, 0]
        sheet[:, :side, left : left + width] = colormap(large)
        for image, share_held in enumerate(one.flatten(1).sum(1).tolist()):
            held = "-" if stage + 1 == pyramid.stages else f"{share_held:.0f}"  # the last one is never held
            label = _label(held, width + gap)
            sheet[image, side + gap : side + gap + LABEL, left : left + label.shape[1]] = label[
                :, : sheet.shape[2] - left
            ]
        left += width + gap
    return sheet


def captioned(pictures: Tensor, text: str) -> Tensor:
    """Pictures B H W 3 in 0..1 with a line of white text on a dark bar at the bottom; as they are without a text."""
    height, width = pictures.shape[1:3]
    if not text:
        return pictures
    size = max(6, min(20, height // 4, 2 * width // len(text)))
    bar = Image.new("L", (width, min(height, size + 4)), 0)
    ImageDraw.Draw(bar).text((2, 1), text, 255, font=ImageFont.load_default(size=size))
    letters = torch.frombuffer(bytearray(bar.tobytes()), dtype=torch.uint8).view(bar.height, width, 1) / 255
    return torch.cat([pictures[:, : height - bar.height], letters.expand(len(pictures), -1, -1, 3).to(pictures)], 1)


LABEL = 12  # pixels of a number's height


def _label(text: str, width: int) -> Tensor:
    """A number in dark on white: LABEL width 3 in 0..1, or narrower than it is written."""
    image = Image.new("L", (width, LABEL), 255)
    ImageDraw.Draw(image).text((0, 0), text, 40, font=ImageFont.load_default(size=LABEL - 2))
    return (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(LABEL, width, 1) / 255).expand(
        -1, -1, 3
    )


def lifetime(shares: Tensor) -> Tensor:
    """How long each token was kept: B lines rows cols -> B rows cols.

    Mean share of layers and heads that held the token, over the line ends since its own; 1: never evicted.
    """
    lines, rows = shares.shape[1:3]
    after = torch.arange(lines)[:, None] >= torch.arange(rows)[None]  # line ends that each row of tokens has seen
    return (shares * after[None, :, :, None]).sum(1) / after.sum(0).clamp(min=1)[None, :, None]


def lifetime_of_scales(shares: Tensor, pyramid: Pyramid) -> Tensor:
    """The same of a picture drawn in scales: B scales N -> B N. The last scale is never held."""
    scale = torch.tensor([stage for stage in range(pyramid.stages) for _ in range(pyramid.size(stage))])
    after = torch.arange(shares.shape[1])[:, None] >= scale
    return (shares * after).sum(1) / after.sum(0).clamp(min=1)

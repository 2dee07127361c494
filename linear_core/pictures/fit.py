"""Pictures and masks of any size, at the size that a model draws."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor


def fit(image: Tensor, height: int, width: int) -> Tensor:
    """Pictures B H W C in 0..1 -> B C height width: the middle of them, scaled without changing their proportions."""
    scale = max(height / image.shape[1], width / image.shape[2])
    image = _middle(_middle(image, 1, height / scale), 2, width / scale)
    pictures = image.permute(0, 3, 1, 2)
    tall, wide = pictures.shape[2:]
    size = max(height, round(tall * scale)), max(width, round(wide * scale))
    pictures = F.interpolate(pictures, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return pictures[:, :, top : top + height, left : left + width]


def stretch(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """A mask B H W at another height and width, as ComfyUI does for inpainting."""
    return F.interpolate(mask[:, None], size, mode="bilinear")[:, 0]


def aligned(image: Tensor, mask: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures B H W 3 and masks B H W at the height and width `size`, and what was done to them, as sentences.

    A mask belongs to the whole picture, whatever its size, and is cropped with it.
    """
    notes = []
    high, wide = image.shape[1:3]
    if mask.shape[1:] != image.shape[1:3]:
        notes.append(f"The mask of {mask.shape[2]} x {mask.shape[1]} was stretched to the image's {wide} x {high}.")
        mask = stretch(mask, (high, wide))
    if (high, wide) != size:
        notes.append(f"Image and mask of {wide} x {high} were scaled and cropped to {size[1]} x {size[0]}.")
        image = fit(image, *size).permute(0, 2, 3, 1)
        mask = fit(mask[..., None], *size)[:, 0]
    return image, mask, notes


def _middle(image: Tensor, side: int, needed: float) -> Tensor:
    """Of a side far longer than needed, the middle: a strip of 1 x 20000 pixels would be scaled to gigabytes."""
    length = image.shape[side]
    rest = max(0, (length - math.ceil(8 * needed)) // 2)
    return image.narrow(side, rest, length - 2 * rest)

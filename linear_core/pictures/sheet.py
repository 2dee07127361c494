"""Contact sheets: rows of pictures with a caption for each row and column, or groups of pictures with their scores."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from ..errors import UserError

PAPER, INK, FAINT, CHOSEN = (250, 250, 248), (32, 34, 38), (110, 114, 120), (0, 95, 184)
GAP = 8
ABREAST = 4  # pictures of a group in a row, unless it is more of a square with more


def to_image(picture: Tensor, size: int | None = None) -> Image.Image:
    """H W 3 in 0..1 -> an image, enlarged by the largest whole factor that keeps both sides within `size`."""
    array = (picture.clamp(0, 1) * 255).round().byte().numpy()
    image = Image.fromarray(np.ascontiguousarray(array))
    factor = max(1, (size or 0) // max(image.size))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def read_image(path: Path, what: str) -> Tensor:
    """The picture at `path`: H W 3 in 0..1. Raises UserError, which says `what` it was meant for."""
    try:
        with Image.open(path) as image:
            array = np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{what}: {path} cannot be read as a picture; give a PNG or JPEG file.") from error
    return torch.from_numpy(array).float() / 255


def contact_sheet(rows: list[tuple[str, str, Tensor]], columns: list[str], size: int = 288) -> Image.Image:
    """Rows of (title, remark, pictures B H W 3), one column per picture, with the column captions at the top."""
    pictures = [[to_image(p, size) for p in row[2]] for row in rows]
    width, height = pictures[0][0].size
    title, small = ImageFont.load_default(size=22), ImageFont.load_default(size=16)
    head = 34 if columns else GAP
    bar = 40
    sheet = Image.new("RGB", (GAP + (width + GAP) * len(pictures[0]), head + (bar + height + GAP) * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, name in enumerate(columns):
        draw.text((GAP + i * (width + GAP) + width / 2, 24), name, INK, font=small, anchor="ms")
    for r, (name, remark, _) in enumerate(rows):
        top = head + r * (bar + height + GAP)
        draw.text((GAP, top + bar - 12), name, INK, font=title, anchor="ls")
        draw.text(
            (GAP + draw.textlength(name, font=title) + 14, top + bar - 12), remark, FAINT, font=small, anchor="ls"
        )
        for i, picture in enumerate(pictures[r]):
            sheet.paste(picture, (GAP + i * (width + GAP), top + bar))
    return sheet


def score_sheet(
    pictures: Tensor, scores: Sequence[float], chosen: Collection[int], titles: Sequence[str], remark: str, size: int
) -> Image.Image:
    """Groups of pictures, B H W 3 next to each other, one group for each title; each picture under its number in the
    group and its score, and framed if it is one of those chosen.
    """
    images = [to_image(picture, size) for picture in pictures]
    (width, height), each = images[0].size, len(images) // len(titles)
    title, small = ImageFont.load_default(size=22), ImageFont.load_default(size=16)
    bar, caption = 40, 26
    wide = min(each, max(ABREAST, math.ceil(math.sqrt(each))))
    block = bar + math.ceil(each / wide) * (caption + height + GAP)
    sheet = Image.new("RGB", (GAP + wide * (width + GAP), len(titles) * block + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for group, name in enumerate(titles):
        base = group * block + bar - 12
        draw.text((GAP, base), name, INK, font=title, anchor="ls")
        draw.text((GAP + (draw.textlength(name, font=title) + 14 if name else 0), base), remark, FAINT, font=small,
                  anchor="ls")  # fmt: skip
    for n, image in enumerate(images):
        group, i = divmod(n, each)
        x = GAP + i % wide * (width + GAP)
        y = group * block + bar + i // wide * (caption + height + GAP) + caption
        if n in chosen:
            draw.rectangle((x - 4, y - 4, x + width + 3, y + height + 3), fill=CHOSEN)
        sheet.paste(image, (x, y))
        colour = CHOSEN if n in chosen else INK
        draw.text((x + width / 2, y - 8), f"{i + 1}: {scores[n]:.4g}", colour, font=small, anchor="ms")
    return sheet


def to_tensor(image: Image.Image) -> Tensor:
    """An image as a picture 1 H W 3 in 0..1."""
    return torch.from_numpy(np.asarray(image).copy()).float()[None] / 255


def save(image: Image.Image, path: Path, notes: dict[str, Any]) -> None:
    """Write a PNG with `notes` as JSON in its text chunk "linear". The file appears complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        write_png(image, part, notes)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_png(image: Image.Image, file: Path | BinaryIO, notes: dict[str, Any]) -> None:
    """Write a PNG with `notes` as JSON in its text chunk "linear"."""
    info = PngImagePlugin.PngInfo()
    info.add_text("linear", json.dumps(notes))
    image.save(file, "PNG", pnginfo=info, optimize=True)

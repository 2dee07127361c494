"""Which places of a picture are kept and which are drawn anew: from a mask over pixels to latents with gaps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..tokenizers.latents import LatentTokenizer


def masked_cells(mask: Tensor, rows: int, cols: int) -> Tensor:
    """Cells that are to be drawn anew: bool B rows cols.

    mask  B H W, above 0.5 where it covers; a cell is drawn anew if any of its pixels is covered
    Raises UserError for a mask that covers nothing, or everything.
    """
    covered = (mask > 0.5).float()[:, None]
    cells = F.adaptive_max_pool2d(covered, (rows, cols))[:, 0] > 0
    for number, one in enumerate(cells, 1):
        which = "it" if len(cells) == 1 else f"number {number} of {len(cells)}"
        if not one.any():
            raise UserError(f"mask: {which} covers nothing, so nothing would be drawn; paint over what is to change.")
        if one.all():
            raise UserError(f"mask: {which} covers everything, so nothing of the picture would stay; leave it out.")
    return cells


def check_mask(picture: Tensor, mask: Tensor, size: tuple[int, int]) -> None:
    """Raise UserError if picture B H W 3, mask B H W and the height and width that a model draws do not fit."""
    height, width = picture.shape[1:3]
    if (height, width) != size:
        raise UserError(
            f"image: it has {width} x {height} pixels, but the model draws {size[1]} x {size[0]}; crop and scale it "
            "to that."
        )
    if mask.shape[1:3] != picture.shape[1:3]:
        raise UserError(
            f"mask: it has {mask.shape[2]} x {mask.shape[1]} pixels, but the image {width} x {height}; give a mask of "
            "the image's size."
        )
    if len({len(picture), len(mask), 1}) > 2:
        raise UserError(f"mask: there are {len(mask)}, but {len(picture)} images; give one, or one for each.")


@torch.inference_mode()
def known_latents(
    tokenizer: LatentTokenizer, picture: Tensor, mask: Tensor, size: tuple[int, int], patch: int = 1
) -> Tensor:
    """Latents of pictures, NaN where they are to be drawn anew: float32 B Z h w, `given` of `generate_masked`.

    picture  B H W 3 in 0..1, or one for all masks
    mask     B H W in 0..1, or one for all pictures
    size     height and width that the model draws, in pixels
    patch    latents of a token, along each side
    Raises UserError if they do not fit each other, the model, or a tokenizer without an encoder.
    """
    check_mask(picture, mask, size)
    height, width = size
    if not tokenizer.config.encoder_widths:
        raise UserError("image: the VAE's file has no encoder, so no picture can be kept; use the published one.")
    factor = tokenizer.config.factor
    rows, cols = height // factor // patch, width // factor // patch
    cells = masked_cells(mask.to(tokenizer.device), rows, cols)
    latents = tokenizer.encode(picture.to(tokenizer.device).permute(0, 3, 1, 2) * 2 - 1).float()
    gaps = cells.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, None]
    return torch.where(gaps, float("nan"), latents).cpu()


def fill(latents: Tensor) -> Tensor:
    """Latents with something in every gap: the mean of what is known around it, near or far. B Z h w.

    Zeros would be grey, and a decoder's norms and attention would spread it over the whole picture.
    """
    known = latents.isfinite()
    value, weight = torch.where(known, latents, 0.0), known[:, :1].to(latents)
    kernel = torch.ones(1, 1, 3, 3, dtype=latents.dtype, device=latents.device)
    channels = latents.shape[1]
    while not bool((weight > 0).all()) and bool((weight > 0).flatten(1).any(1).all()):
        total = F.conv2d(value, kernel.expand(channels, 1, 3, 3), padding=1, groups=channels)
        count = F.conv2d((weight > 0).to(weight), kernel, padding=1)
        new = (weight == 0) & (count > 0)
        value = torch.where(new, total / count.clamp(min=1), value)
        weight = torch.where(new, 1.0, weight)
    return value

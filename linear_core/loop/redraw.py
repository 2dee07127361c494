"""Redrawing a region: which codes of a picture stay, which are drawn, and which of several fills is kept.

Codes outside the mask are fed and not drawn; codes inside are drawn in order, with everything above and to the left
known. A raster model cannot see what lies below the hole while it fills it. So several fills may be drawn, and the one
kept under which the codes that follow are most likely (`best_of`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..grid import Grid
from ..plan import MAX_SEED, SamplePlan

DRAW = -1  # in place of a code: draw it


def masked_cells(mask: Tensor, rows: int, cols: int) -> Tensor:
    """The cells of a grid that a mask B H W in 0..1, of the picture's proportions, wants drawn: bool B rows cols.

    A cell is drawn if the mask is half or more at any of its pixels, so that nothing that is painted stays.
    """
    height, width = mask.shape[1:]
    if height % rows or width % cols:
        raise ValueError(f"{height} x {width} pixels are not cells of {rows} x {cols}")
    return F.max_pool2d(mask[:, None].float(), (height // rows, width // cols))[:, 0] >= 0.5


def keep_outside(codes: Tensor, cells: Tensor) -> Tensor:
    """Codes B rows cols with DRAW in the cells, bool B rows cols, of which either may be one for all.

    Raises UserError if there is nothing to draw, or if they are not equally many.
    """
    if not cells.flatten(1).any(1).all():
        raise UserError(
            "mask: nothing in it is marked; paint over what is to be drawn anew (in ComfyUI's mask editor)."
        )
    images = max(len(codes), len(cells))
    if {len(codes), len(cells)} - {1, images}:
        raise UserError(f"mask: there are {len(cells)} masks for {len(codes)} pictures; give one, or one for each.")
    return codes.expand(images, -1, -1).masked_fill(cells, DRAW)


def check_kept(kept: Tensor | None, above: Tensor, images: int, grid: Grid, codes: int) -> Tensor | None:
    """What is known of every image, `kept` below the lines of `above`: int64 B rows cols, DRAW elsewhere.

    None: nothing is. Raises UserError if `kept` does not fit the grid or the codebook, or leaves nothing to draw.
    """
    rows = above.shape[1]
    if kept is None:
        return F.pad(above, (0, 0, 0, grid.rows - rows), value=DRAW) if rows else None
    if tuple(kept.shape[1:]) != (grid.rows, grid.cols):
        raise UserError(
            f"tokens: the picture has {kept.shape[1]} lines of {kept.shape[2]}, but the model draws {grid.rows} lines "
            f"of {grid.cols}; give tokens of that size, so that a region of them can be drawn anew."
        )
    if len(kept) not in (1, images):
        raise UserError(
            f"tokens: there are {len(kept)} pictures, but {images} are drawn; give one, or one for each (see "
            "batch_size)."
        )
    if int(kept.min()) < DRAW or int(kept.max()) >= codes:
        raise UserError(f"tokens: code {int(kept.max())} is not one of the model's {codes} codes.")
    known = kept.expand(images, -1, -1).clone()
    known[:, :rows] = above
    if not (known == DRAW).any():
        raise UserError("mask: everything it marks lies in the rows that are kept already; lower keep_rows.")
    return known


def pieces(known: Tensor, ends: list[int]) -> list[tuple[int, int]]:
    """A line in pieces that are fed at once, as first and last column + 1: a code, and those behind it that are known
    of every image. `known`, bool B cols, on the host. No piece goes beyond one of `ends`.
    """
    fixed = known.all(0).tolist()
    starts = [column for column in range(len(fixed)) if column in (0, *ends) or not fixed[column]]
    return list(zip(starts, [*starts[1:], len(fixed)], strict=True))


def merged(known: Tensor, drawn: Tensor) -> Tensor:
    """Codes that are known, and `drawn` ones in place of DRAW."""
    return torch.where(known == DRAW, drawn, known)


def following(kept: Tensor) -> Tensor:
    """The kept codes behind the first that is drawn, in the order of drawing: bool B rows cols."""
    drawn = (kept == DRAW).flatten(1)
    return ((drawn.cumsum(1) > 0) & ~drawn).view(kept.shape)


def candidates(sample: SamplePlan, images: int, count: int) -> SamplePlan:
    """The plan for `count` fills of each image, copies next to each other; the first has the image's own seed."""
    if count == 1:
        return sample
    seeds = tuple((seed + (n << 32)) % (MAX_SEED + 1) for seed in sample.image_seeds(images) for n in range(count))
    return replace(sample, seed=seeds[0], seeds=seeds)


def best_of(scores: Tensor, count: int, keep: int = 1) -> list[int]:
    """The numbers of the `keep` pictures with the highest scores B of each `count`, next to each other; best first."""
    order = scores.view(-1, count).sort(dim=1, descending=True, stable=True).indices[:, :keep]
    return [group * count + n for group, best in enumerate(order.tolist()) for n in best]

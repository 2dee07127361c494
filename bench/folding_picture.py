"""The picture in README and on the help page of Line Cache: what a folded slot is.

    python bench/folding_picture.py          writes web/docs/folding.png

Seven keys in the plane, each a disc whose area is the attention that it draws. One has to leave. The policy `fold` says
which one, the cache's own folding where the merged one lies and what it weighs, and softmax the rest.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from math import pi, sqrt
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from linear_core.cache.fold import fold
from linear_core.cache.view import View
from linear_core.grid import Grid
from linear_core.pictures.sheet import INK, PAPER
from linear_core.policies import POLICIES

OUT = Path(__file__).parents[1] / "web" / "docs" / "folding.png"
KEYS = ((-1.0, 0.62), (-0.86, -0.62), (-0.1, 0.74), (0.02, -0.28), (0.52, 0.06), (1.0, 0.7), (0.9, -0.72))
QUERIES = ((0.7, -1.0), (0.3, 1.1), (-1.0, 0.2), (1.1, 0.2))
BLUE, ORANGE = (74, 124, 184), (232, 119, 34)  # which everybody can tell apart
WIDTH, HEIGHT = 1000, 410  # of the picture; three parts side by side
UNIT, AREA, MIDDLE = 112, 23_000, 203  # of the plane; of all discs of a part together; where the plane's origin is
PIXELS, FINER = 2, 2  # of the file to one of WIDTH; and how much finer it is painted


@dataclass(frozen=True)
class Disc:
    """A key: the attention that it draws by itself, and what it draws in place of the one that left; shares of 1."""

    x: float
    y: float
    own: float
    taken: float = 0.0


def scene() -> tuple[list[Disc], list[Disc], list[Disc], int]:
    """The discs before, after eviction and after folding, and which of the first leaves."""
    keys, queries = (torch.tensor(x, dtype=torch.float64)[None, None, None] for x in (KEYS, QUERIES))
    index = torch.arange(len(KEYS), dtype=torch.int32)[None, None, None]
    bias, grid = torch.zeros_like(keys[..., 0]), Grid(len(KEYS) + 2, 1, prompt=0)
    view = View(keys, keys, bias, index, queries, None, grid, len(KEYS) - 1, rotate=lambda q, *_: q)
    victim = POLICIES["fold"].score(view).argmin(-1, keepdim=True)
    folded = fold(view, victim, torch.ones_like(bias))

    def drawn(keys: Tensor, bias: Tensor) -> list[float]:
        """Attention of each key."""
        mass: list[float] = replace(view, keys=keys, bias=bias).look_ahead().mass.flatten().tolist()
        return mass

    before, gone, taker = drawn(keys, bias), int(victim), int(folded.slot)
    evicted = drawn(keys, bias.scatter(-1, victim, float("-inf")))
    keys = keys.index_copy(3, folded.slot.flatten(), folded.keys)
    merged = drawn(keys, bias.scatter(-1, folded.slot, folded.bias).scatter(-1, victim, float("-inf")))
    places, kept = keys.flatten(0, 3).tolist(), [n for n in range(len(KEYS)) if n != gone]
    own = {n: before[n] if n == taker else merged[n] for n in kept}
    return (
        [Disc(*KEYS[n], before[n]) for n in range(len(KEYS))],
        [Disc(*KEYS[n], before[n], evicted[n] - before[n]) for n in kept],
        [Disc(*places[n], own[n], merged[n] - own[n]) for n in kept],
        gone,
    )


class Paper:
    """Draws in units of WIDTH and HEIGHT, finer than the file."""

    def __init__(self) -> None:
        self.unit = PIXELS * FINER
        self.image = Image.new("RGBA", (WIDTH * self.unit, HEIGHT * self.unit), (0, 0, 0, 0))
        self.draw = ImageDraw.Draw(self.image)
        self.draw.rounded_rectangle((0, 0, WIDTH * self.unit - 1, HEIGHT * self.unit - 1), 14 * self.unit, PAPER)

    def text(self, x: float, y: float, text: str, size: int, colour: tuple[int, ...] = INK, bold: bool = False) -> None:
        font = ImageFont.load_default(size=size * self.unit)
        x, y, stroke = x * self.unit, y * self.unit, self.unit // 2 if bold else 0
        self.draw.text((x, y), text, colour, font=font, anchor="ms", stroke_width=stroke)

    def circle(self, x: float, y: float, r: float, colour: tuple[int, ...], dashed: bool = False) -> None:
        box = tuple(self.unit * at for at in (x - r, y - r, x + r, y + r))
        if not dashed:
            self.draw.ellipse(box, colour)
        for start in range(0, 360, 30) if dashed else ():
            self.draw.arc(box, start, start + 17, colour, 2 * self.unit)

    def finished(self) -> Image.Image:
        return self.image.resize((WIDTH * PIXELS, HEIGHT * PIXELS), Image.Resampling.LANCZOS).quantize(48)


def radius(share: float) -> float:
    """Of a disc with this share of attention."""
    return sqrt(share * AREA / pi)


def paint(before: list[Disc], evicted: list[Disc], folded: list[Disc], gone: int) -> Image.Image:
    paper, left = Paper(), before[gone]
    parts = (("one token leaves", "size: share of attention", before),
             ("evicted", "strangers get its share", evicted), ("folded", "its neighbour keeps it", folded))  # fmt: skip
    for number, (name, remark, discs) in enumerate(parts):
        middle = WIDTH * (2 * number + 1) / 6

        def place(disc: Disc, middle: float = middle) -> tuple[float, float]:
            return middle + disc.x * UNIT, MIDDLE - disc.y * UNIT

        paper.text(middle, 48, name, 33, bold=True)
        paper.text(middle, HEIGHT - 26, remark, 27)
        if number:
            paper.circle(*place(left), radius(left.own), ORANGE, dashed=True)
            x = WIDTH * number / 3
            paper.draw.line([paper.unit * at for at in (x, 80, x, HEIGHT - 80)], (222, 224, 226), paper.unit)
        for disc in discs:
            paper.circle(*place(disc), radius(disc.own + disc.taken), ORANGE)
            paper.circle(*place(disc), radius(disc.own), ORANGE if disc is left else BLUE)
            if discs is folded and disc.taken:
                x, y = place(disc)
                paper.text(x, y + 9, "2", 27, PAPER)  # tokens in the slot
    return paper.finished()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    before, evicted, folded, gone = scene()
    for name, discs in (("before", before), ("evicted", evicted), ("folded", folded)):
        print(f"{name:8}", ", ".join(f"{d.own:.3f} + {d.taken:.3f}" for d in discs))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    paint(before, evicted, folded, gone).save(args.out, "PNG", optimize=True)
    print(f"wrote {args.out}, {args.out.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

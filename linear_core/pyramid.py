"""Pyramid: a picture's token maps, coarse to fine. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from .errors import UserError
from .grid import Grid


@dataclass(frozen=True)
class Pyramid:
    """The token maps of a next-scale model, each in raster order, after `prompt` tokens of conditioning.

    sides  rows and columns of each scale, coarse to fine
    """

    sides: tuple[tuple[int, int], ...]
    prompt: int = 0

    def __post_init__(self) -> None:
        if not self.sides or any(min(side) < 1 for side in self.sides):
            raise UserError(f"pyramid: {self.text} is not a pyramid; every scale needs 1 row and 1 column or more.")
        if any(
            a > b
            for before, after in zip(self.sides, self.sides[1:], strict=False)
            for a, b in zip(before, after, strict=True)
        ):
            raise UserError(f"pyramid: {self.text} does not go from coarse to fine.")

    @classmethod
    def square(cls, *sides: int) -> Pyramid:
        return cls(tuple((side, side) for side in sides))

    @property
    def stages(self) -> int:
        """Scales. Each is drawn in one forward pass."""
        return len(self.sides)

    @property
    def tokens(self) -> int:
        """Tokens of all scales."""
        return sum(rows * cols for rows, cols in self.sides)

    @property
    def kept(self) -> int:
        """Tokens that a full cache holds: nothing is drawn after the last scale, so nothing reads it."""
        return self.tokens - self.size(-1)

    @property
    def text(self) -> str:
        """1 2 3, or 1x2 2x4 if scales are not square."""
        return " ".join(str(rows) if rows == cols else f"{rows}x{cols}" for rows, cols in self.sides)

    def after(self, prompt: int) -> Pyramid:
        """The same pyramid after `prompt` tokens of conditioning."""
        return replace(self, prompt=prompt)

    def size(self, stage: int) -> int:
        """Tokens of a scale."""
        rows, cols = self.sides[stage]
        return rows * cols

    def index(self, stage: int, token: int = 0) -> int:
        """Index in the sequence of a token of scale `stage`; of scale number `stages`, one past the last token."""
        return self.prompt + sum(rows * cols for rows, cols in self.sides[:stage]) + token

    def stage_of(self, index: int) -> int:
        """The scale of the token at `index`."""
        ends = accumulate(rows * cols for rows, cols in self.sides)
        return next(stage for stage, end in enumerate(ends) if index - self.prompt < end)

    def whole(self, tokens: int) -> int:
        """Tokens of the fewest first scales that hold at least `tokens`."""
        return next(end for end in (self.index(n) - self.prompt for n in range(self.stages + 1)) if end >= tokens)

    def within(self, tokens: int) -> int:
        """Tokens of the first scales that at most `tokens` tokens hold."""
        return max(end for end in (self.index(n) - self.prompt for n in range(self.stages + 1)) if end <= tokens)


Stages = Grid | Pyramid
"""What is drawn in stages: a grid line by line, a pyramid scale by scale."""

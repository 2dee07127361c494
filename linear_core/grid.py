"""Grid: a picture's tokens in raster order. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .errors import UserError

Row = TypeVar("Row")  # int, or a tensor of one element


@dataclass(frozen=True)
class Grid:
    """`rows` lines of `cols` codes, in raster order, after `prompt` tokens of conditioning.

    eol  the token that ends each line in models that have one; it is part of the line. Counted from code 0, so it is
         negative where it comes before the codes in the vocabulary
    """

    rows: int
    cols: int
    eol: int | None = None
    prompt: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UserError(f"grid: {self.rows} x {self.cols} tokens is not a picture; both sides must be 1 or more.")

    @property
    def stride(self) -> int:
        """Tokens per line."""
        return self.cols + (self.eol is not None)

    @property
    def tokens(self) -> int:
        """Tokens of the image, end-of-line tokens included."""
        return self.rows * self.stride

    def after(self, prompt: int) -> Grid:
        """The same grid after `prompt` tokens of conditioning."""
        return replace(self, prompt=prompt)

    def index(self, row: Row, column: int = 0) -> Row:
        """Index in the sequence of the token at `row`, `column`."""
        number: Any = row
        index: Row = self.prompt + number * self.stride + column
        return index

    def tokens_fed(self, column: int) -> int:
        """Tokens that are fed once the code at `column` is known: 1, or 2 if an end-of-line token follows."""
        return self.stride - column if column + 1 == self.cols else 1

"""Grid: where a token stands. Integers only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, TypeVar

from .errors import UserError

Row = TypeVar("Row")  # a number, or a tensor of one


@dataclass(frozen=True)
class Grid:
    """`rows` lines of `cols` codes. The image follows `prompt` tokens of condition, in raster order.

    Models that end each row with a token of its own (Lumina-mGPT) name it in `eol`; it is part of the line.
    """

    rows: int
    cols: int
    eol: int | None = None
    prompt: int = 0

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise UserError(f"grid: {self.rows} x {self.cols} tokens is no picture; both sides must be 1 or more.")

    @property
    def stride(self) -> int:
        """Tokens a line."""
        return self.cols + (self.eol is not None)

    @property
    def tokens(self) -> int:
        """Tokens the image takes, end-of-line tokens included."""
        return self.rows * self.stride

    def after(self, prompt: int) -> Grid:
        """The same grid behind `prompt` tokens of condition."""
        return replace(self, prompt=prompt)

    def index(self, row: Row, column: int = 0) -> Row:
        """Index in the sequence of the token at `row`, `column`."""
        number: Any = row
        index: Row = self.prompt + number * self.stride + column
        return index

    def tokens_fed(self, column: int) -> int:
        """How many tokens are fed when the code at `column` is known: itself, and behind a line's last code its end."""
        return self.stride - column if column + 1 == self.cols else 1

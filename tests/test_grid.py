"""Where a token stands: every index is named once, in raster order, behind the prompt."""

from __future__ import annotations

import pytest

from linear_core.errors import UserError
from linear_core.grid import Grid


@pytest.mark.parametrize("grid", [Grid(3, 4), Grid(3, 4, prompt=7), Grid(1, 6), Grid(5, 1, eol=9), Grid(2, 3, 9, 2)])
def test_indices_run_on_without_a_gap(grid):
    """Row by row and column by column, end-of-line included, `index` counts from the prompt's end."""
    indices = [grid.index(row, column) for row in range(grid.rows) for column in range(grid.stride)]
    assert indices == list(range(grid.prompt, grid.prompt + grid.tokens))


def test_an_end_of_line_token_makes_a_line_longer():
    """With `eol` a line takes one token more, which is fed with its last code; the picture's columns are drawn."""
    plain, ended = Grid(2, 3), Grid(2, 3, eol=99)
    assert (plain.stride, plain.tokens) == (3, 6)
    assert (ended.stride, ended.tokens) == (4, 8)
    assert [plain.tokens_fed(c) for c in range(3)] == [1, 1, 1]
    assert [ended.tokens_fed(c) for c in range(3)] == [1, 1, 2]
    assert Grid(2, 3, eol=0).stride == 4, "code 0 can end a line"


def test_after_moves_the_picture_and_nothing_else():
    """`after` sets how many tokens of condition come first."""
    moved = Grid(2, 3, eol=9, prompt=1).after(7)
    assert moved == Grid(2, 3, eol=9, prompt=7)
    assert moved.index(1, 2) == 7 + 4 + 2


@pytest.mark.parametrize(("rows", "cols"), [(0, 4), (4, 0), (-1, 4)])
def test_no_picture(rows, cols):
    """A side without tokens is the user's mistake, and the message names both sides."""
    with pytest.raises(UserError, match=f"{rows} x {cols}"):
        Grid(rows, cols)

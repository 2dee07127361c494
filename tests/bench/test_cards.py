"""The table of cards in README is what `bench/cards.py` prints, and its bytes are those of real caches and networks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import cards
from bench.shapes import SHAPES
from linear_core.cache.line_cache import LineCache

ROOT = Path(__file__).parents[2]


def test_readme_has_the_table():
    """Every line, as the command prints it."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert cards.table() in readme, "python bench/cards.py prints another table"


@pytest.mark.parametrize("name", cards.MODELS)
@pytest.mark.parametrize("share", cards.SHARES.values())
def test_the_cache_takes_what_the_table_says(name, share):
    """Bytes of the keys and values that a run allocates for two rows; on the meta device, as they are gigabytes."""
    shape = SHAPES[name]
    plan, cache_shape = cards.plan(shape, share), shape.cache_shape(torch.bfloat16)
    cache = LineCache(cache_shape, 2, shape.grid.after(shape.prompt_tokens), plan, dtype=torch.bfloat16, device="meta")
    assert cache.nbytes == cache_shape.bytes(shape.grid, plan, 2)


def test_weights_in_half_precision():
    """Emu3's published count less the rows of its head that no picture needs."""
    config = SHAPES["Emu3-Gen"].config
    cut = (config.vocabulary - config.codes) * config.width
    assert cards.weight_bytes(SHAPES["Emu3-Gen"])["bfloat16"] == 2 * (8_492_011_520 - cut)
    cut = (SHAPES["Xiaomi-Robotics-U0-4B"].config.vocabulary - 131072) * 2560
    assert cards.weight_bytes(SHAPES["Xiaomi-Robotics-U0-4B"])["bfloat16"] == 2 * (5_082_093_056 - cut)

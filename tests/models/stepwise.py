"""Ours as it draws, one token at a time, to be set beside a published network that sees all of them at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.grid import Grid
from linear_core.plan import CachePlan
from linear_core.prompts import Prompt


def unpadded(prompt: Prompt) -> list[list[int]]:
    """The prompt's tokens, row by row."""
    return [row[pad:] for row, pad in zip(prompt.tokens.tolist(), prompt.pad.tolist(), strict=True)]


def random_tokens(codes: int, grid: Grid) -> Tensor:
    """Two images, each for both guidance rows: int64 4 T, lines with their ends, less what a code is counted from."""
    drawn = torch.randint(codes, (2, grid.rows, grid.cols), generator=torch.Generator().manual_seed(0))
    return F.pad(drawn, (0, 1), value=grid.eol).flatten(1).repeat(2, 1)


def stepped(decoder: Any, rows: Prompt, grid: Grid, tokens: Tensor) -> Tensor:
    """Logits R T V of the code at each token: those of the prefill, and of every step but the last. All is kept."""
    shape = decoder.cache_shape(rows.length)
    cache = LineCache(shape, rows.rows, grid, CachePlan("full"), dtype=torch.float32, device="cpu")
    logits = [decoder.prefill(rows, cache)]
    for n in range(grid.tokens - 1):
        if n % grid.stride == 0:
            cache.extend()
        column = torch.tensor([n % grid.stride])
        logits.append(decoder.step(tokens[:, n], torch.tensor([grid.prompt + n]), rows.pad, column, cache))
    return torch.stack(logits, 1)

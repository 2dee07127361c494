"""What every transformer that draws raster lines does with a token: whatever its prompt and its rotary table.

A model of this kind has `layers` and `norm`, and says how a code becomes an embedding, how a hidden state becomes
logits over codes, and how queries and keys are turned (`embed_codes`, `head`, `table`, `turn`). Its prompt is its own
matter (`prefill`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache.attention import attend
from ..cache.line_cache import LineCache
from ..grid import Grid
from ..plan import CacheShape


class Raster(nn.Module):
    """Feeds image tokens, one or several of a line at a time, to the layers over a LineCache."""

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: Any, grid: Grid):
        super().__init__()
        self.config, self.grid = config, grid
        # A host whose layers cast, and move their weights as they are needed, says what and where it computes.
        self.compute_dtype: torch.dtype | None = None
        self.compute_device: torch.device | None = None

    # -- what a model says --------------------------------------------------------------------------------------------

    def embed_codes(self, tokens: Tensor) -> Tensor:
        """Codes, and end-of-line tokens where the grid has them, int64 ... -> ... W."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ... W -> logits of the codes ... V."""
        raise NotImplementedError

    def rope_table(self, index: Tensor, pad: Tensor, grid: Grid) -> Tensor:
        """The rotary table of the image tokens at `index` T of rows with `pad` B empty places before the prompt."""
        raise NotImplementedError

    @staticmethod
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        """Queries and keys ... T D, rotated."""
        raise NotImplementedError

    # -- what the loop asks -------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.norm.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.compute_device or next(self.norm.parameters()).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    @property
    def codes(self) -> int:
        return self.config.codes

    def cache_shape(self, prompt: int = 1) -> CacheShape:
        """What a prompt with so many places takes, and an image token."""
        return self.config.cache_shape(prompt, self.dtype.itemsize)

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        """Feed the token at `index` of each row and return the logits B V of the next.

        token int64 B; index, column int64 with one element; pad int64 B, empty places before each row's prompt.
        """
        table = self.rope_table(index, pad, cache.grid)
        x = self.embed_codes(token[:, None]).to(self.dtype)
        cache.advance(index, column)
        for layer, block in enumerate(self.layers):

            def attend_cache(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write(layer, column, k, v, q)
                return cache.attend(layer, q)

            x = block(x, lambda t: self.rotate(t, table), attend_cache)
        return self.head(self.norm(x[:, -1])).float()

    def feed(
        self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache, all_logits: bool = False
    ) -> Tensor:
        """`step` for T tokens of one line at once: tokens B T, index and columns T.

        Returns the logits B V after the last, or with `all_logits` B T V, those after each.
        """
        table = self.rope_table(index, pad, cache.grid)
        x = self.embed_codes(tokens).to(self.dtype)
        for layer, block in enumerate(self.layers):

            def attend_line(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return attend(q, *cache.feed(layer, columns, k, v, q))

            x = block(x, lambda t: self.rotate(t, table), attend_line)
        cache.advance(index, columns)
        return self.head(self.norm(x if all_logits else x[:, -1])).float()

"""Decoding of raster lines, whatever a model's prompt and RoPE.

A model has `layers` and `norm`, and defines how a code is embedded, how a hidden state becomes logits over codes, and
how queries and keys are rotated (`embed_codes`, `head`, `rope_table`, `rotate`), and its `prefill`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..cache.attention import attend
from ..cache.line_cache import LineCache, Window
from ..grid import Grid
from ..plan import CacheShape


class Raster(nn.Module):
    """Feeds image tokens, one or several of a line at a time, through the layers with a LineCache."""

    layers: nn.ModuleList
    norm: nn.Module

    def __init__(self, config: Any, grid: Grid):
        super().__init__()
        self.config, self.grid = config, grid
        # Set by a host whose layers cast and move their weights when they are used.
        self.compute_dtype: torch.dtype | None = None
        self.compute_device: torch.device | None = None

    # -- defined by each model -----------------------------------------------------------------------------------------

    def embed_codes(self, tokens: Tensor) -> Tensor:
        """Codes, and end-of-line tokens if the grid has them, int64 ... -> ... W."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ... W -> logits of the codes ... V."""
        raise NotImplementedError

    def rope_table(self, index: Tensor, pad: Tensor, grid: Grid) -> Tensor:
        """RoPE table of the image tokens at `index` T, for rows with `pad` B padding tokens before the prompt.

        If every row has tokens of its own, `index` is B T, and the table B 1 T 2 D.
        """
        raise NotImplementedError

    @staticmethod
    def rotate(x: Tensor, table: Tensor) -> Tensor:
        """Rotate queries and keys ... T D."""
        raise NotImplementedError

    # -- used by the loop ----------------------------------------------------------------------------------------------

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
        """Sizes that decide the cache's memory, for a prompt of this length."""
        return self.config.cache_shape(prompt, self.dtype.itemsize)

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        """Feed the token at `index` of each row and return the logits B V of the next one.

        token int64 B; index, column int64 with one element; pad int64 B, padding tokens before each row's prompt.
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

        Returns the logits B V after the last token, or with `all_logits` B T V, after each.
        """
        table = self.rope_table(index, pad, cache.grid)
        x = self.embed_codes(tokens).to(self.dtype)
        for layer, block in enumerate(self.layers):

            def attend_line(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return attend(q, *cache.feed(layer, columns, k, v, q))

            x = block(x, lambda t: self.rotate(t, table), attend_line)
        cache.advance(index, columns)
        return self.head(self.norm(x if all_logits else x[:, -1])).float()

    def peek(
        self, tokens: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache
    ) -> tuple[Tensor, Window]:
        """Feed tokens B T without a trace in the cache; each row's first one is at `index` and `column` B.

        Returns the logits B T V after each token, and what `LineCache.accept` writes once some of them are known to be
        right. Tokens may lie beyond the line's end; those beyond the image's end count as its last.
        """
        last = cache.grid.prompt + cache.grid.tokens - 1
        places = index[:, None] + torch.arange(tokens.shape[1], device=index.device)
        table = self.rope_table(places.clamp(max=last), pad, cache.grid)
        x = self.embed_codes(tokens).to(self.dtype)
        window: list[tuple[Tensor, Tensor, Tensor]] = []
        for layer, block in enumerate(self.layers):

            def attend_window(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                window.append((q, k, v))
                return attend(q, *cache.peek(layer, column, k, v))

            x = block(x, lambda t: self.rotate(t, table), attend_window)
        queries, keys, values = (torch.stack(each) for each in zip(*window, strict=True))
        return self.head(self.norm(x)).float(), (queries, keys, values)

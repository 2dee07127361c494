"""Prompts: what conditions the images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..grid import Grid


@dataclass(frozen=True)
class Origin:
    """Whose a prompt is.

    model    name of the model that it was made for; "": of a text encoder, for any model that takes its features
    meaning  what its numbers mean: "classes", "tokens" or "features", then what tells them from others of the kind
    """

    model: str
    meaning: tuple[str, ...]


@dataclass(frozen=True)
class Prompt:
    """One row per image; a decoder adds the unconditional rows itself.

    tokens    what the model embeds: class or token ids int64 B T, or features float B T D
    pad       int64 B: how many of the T tokens, from the left, are padding
    names     what the user asked for, one per row
    negative  the negative prompt of guidance, one row for each row here, of any length; None: the decoder's own
    grid      of the picture, if the prompt sets a size; None: the model's own
    origin    whose it is; None: not stated
    """

    tokens: Tensor
    pad: Tensor
    names: tuple[str, ...] = ()
    negative: Prompt | None = None
    grid: Grid | None = None
    origin: Origin | None = None

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    @property
    def max_length(self) -> int:
        """Tokens per row when the rows of guidance are stacked below."""
        return max(self.length, self.negative.length if self.negative else 0)

    def repeat(self, times: int) -> Prompt:
        """Every row `times` times, copies next to each other."""
        return self.select([row for row in range(self.rows) for _ in range(times)])

    def select(self, rows: Sequence[int]) -> Prompt:
        """The rows with these numbers, in this order."""
        names = tuple(self.names[row] for row in rows) if self.names else ()
        negative = self.negative and self.negative.select(rows)
        chosen = torch.as_tensor(rows, dtype=torch.int64, device=self.pad.device)
        return replace(self, tokens=self.tokens[chosen], pad=self.pad[chosen], names=names, negative=negative)

    def unique(self) -> tuple[Prompt, Tensor]:
        """Each distinct row once, and for each row which of them it is, int64 B. Without names and negative."""
        tokens = self.tokens.float() if self.tokens.is_floating_point() else self.tokens
        flat = torch.cat([self.pad[:, None].to(tokens.dtype), tokens.flatten(1)], 1)
        row = flat.unique(dim=0, return_inverse=True)[1]
        count = int(row.max()) + 1
        first = torch.full((count,), self.rows, device=row.device).scatter_reduce_(
            0, row, torch.arange(self.rows, device=row.device), "amin"
        )
        return Prompt(self.tokens[first], self.pad[first]), row

    def stack(self, below: Prompt) -> Prompt:
        """These rows, then those of `below`, the shorter ones padded on the left. Without negative."""
        length = max(self.length, below.length)
        above, below = self.padded(length), below.padded(length)
        tokens, pad = torch.cat([above.tokens, below.tokens]), torch.cat([above.pad, below.pad])
        return replace(self, tokens=tokens, pad=pad, negative=None)

    def padded(self, length: int) -> Prompt:
        """The same rows, padded on the left to `length` tokens."""
        added = length - self.length
        empty = self.tokens.new_zeros(self.rows, added, *self.tokens.shape[2:])
        return replace(self, tokens=torch.cat([empty, self.tokens], 1), pad=self.pad + added)

    def to(self, device: torch.device | str) -> Prompt:
        negative = self.negative and self.negative.to(device)
        return replace(self, tokens=self.tokens.to(device), pad=self.pad.to(device), negative=negative)

    def attention_mask(self, count: int | None = None) -> Tensor:
        """Which token sees which: bool B N N, causal, with padding hidden; every token sees itself.

        N is `count`, by default the prompt's length.
        """
        return causal_mask(self.pad, count or self.length)


def causal_mask(pad: Tensor, count: int) -> Tensor:
    """`Prompt.attention_mask` for rows with `pad` B padding tokens."""
    index = torch.arange(count, device=pad.device)
    causal = index[None, :] <= index[:, None]
    return causal & (index[None, None, :] >= pad[:, None, None]) | (index[None, :] == index[:, None])


def class_prompt(labels: list[int], names: tuple[str, ...] = (), origin: Origin | None = None) -> Prompt:
    """One image for each class id."""
    pad = torch.zeros(len(labels), dtype=torch.int64)
    return Prompt(torch.tensor(labels, dtype=torch.int64)[:, None], pad, names, origin=origin)


def token_prompt(
    rows: Sequence[Sequence[int]], names: tuple[str, ...] = (), negative: Prompt | None = None, grid: Grid | None = None
) -> Prompt:
    """One image for each row of token ids; rows of unequal length are padded on the left."""
    length = max(map(len, rows))
    tokens = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows])
    return Prompt(tokens, torch.tensor([length - len(row) for row in rows]), names, negative, grid)

"""Prompts: what conditions the images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One row an image; a decoder adds the unconditional rows itself.

    tokens  what the model's embedding takes: class or token ids int64 B T, or features float B T D
    pad     int64 B: how many of the T places, from the left, are empty
    names   what the user asked for, one a row
    """

    tokens: Tensor
    pad: Tensor
    names: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def repeat(self, times: int) -> Prompt:
        """Every row `times` times, copies side by side."""
        names = tuple(n for n in self.names for _ in range(times))
        return Prompt(self.tokens.repeat_interleave(times, 0), self.pad.repeat_interleave(times, 0), names)

    def stack(self, below: Prompt) -> Prompt:
        """These rows, then `below`'s, of equal length."""
        return Prompt(torch.cat([self.tokens, below.tokens]), torch.cat([self.pad, below.pad]), self.names)

    def to(self, device: torch.device | str) -> Prompt:
        return Prompt(self.tokens.to(device), self.pad.to(device), self.names)


def class_prompt(labels: list[int], names: tuple[str, ...] = ()) -> Prompt:
    """One image for each class id."""
    return Prompt(torch.tensor(labels, dtype=torch.int64)[:, None], torch.zeros(len(labels), dtype=torch.int64), names)

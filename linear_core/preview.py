"""Pictures of rows that are not finished yet. An approximation, and labelled so: only a full decode is the picture."""

from __future__ import annotations

import torch
from torch import Tensor

from .events import Line
from .vq.tokenizer import VQTokenizer, to_pixels

EMPTY = 0.35  # grey of what is not drawn yet


class Preview:
    """Collects a run's lines and decodes the rows so far.

    A VQ decoder looks at the whole picture (group norms, attention), so rows shown early still change a little.
    """

    def __init__(self, tokenizer: VQTokenizer, rows: int):
        self.tokenizer, self.rows = tokenizer, rows
        self.lines: list[Tensor] = []

    def add(self, line: Line) -> None:
        self.lines.append(line.tokens)

    @property
    def tokens(self) -> Tensor:
        """Codes so far: int64 B rows cols."""
        return torch.stack(self.lines, 1)

    @torch.inference_mode()
    def pictures(self, images: int = 1) -> Tensor:
        """The first `images` pictures so far, what is missing in grey: float32 B H W 3 in 0..1, on the CPU."""
        codes = self.tokens[:images].to(self.tokenizer.device)
        done = to_pixels(self.tokenizer.decode(codes)).cpu()
        missing = (self.rows - len(self.lines)) * self.tokenizer.config.factor
        rest = torch.full((done.shape[0], missing, *done.shape[2:]), EMPTY)
        return torch.cat([done, rest], 1)


@torch.inference_mode()
def decode(tokenizer: VQTokenizer, tokens: Tensor, batch: int = 16) -> Tensor:
    """The pictures, each one full decode: codes int64 B rows cols -> float32 B H W 3 in 0..1, on the CPU."""
    device = tokenizer.device
    return torch.cat([to_pixels(tokenizer.decode(part.to(device))).cpu() for part in tokens.split(batch)])

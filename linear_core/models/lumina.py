"""Lumina-mGPT and its kin: Chameleon, one vocabulary for words and pictures (github.com/Alpha-VLLM/Lumina-mGPT).

A Llama whose queries and keys go through a LayerNorm. An image code is a token like any other, so the prompt's table
embeds it too; of the head only the rows of the codes are kept, as nothing else may be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..grid import Grid
from .blocks import Ops
from .llama import Llama, LlamaConfig


@dataclass(frozen=True)
class LuminaConfig(LlamaConfig):
    """`first` is the vocabulary's id of code 0; the others follow it."""

    first: int = 4


class Lumina(Llama):
    """Decoder for Lumina-mGPT-7B of every size, and for Anole.

    Codes, and the token that ends a line, are counted from code 0 of the vocabulary: the grid's `eol` is an id less
    `first`.
    """

    config: LuminaConfig

    def __init__(self, config: LuminaConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid, ops)
        self.lm_head = ops.Linear(config.width, config.codes, bias=False)

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens + self.config.first)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

"""Lumina-mGPT and Anole: Chameleon, with one vocabulary for text and images (github.com/Alpha-VLLM/Lumina-mGPT).

A Llama with LayerNorm on queries and keys. An image code is a token like any other, so the prompt's embedding table
serves it too. Only the output head's rows for codes are kept, because nothing else may be drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..grid import Grid
from .blocks import Ops
from .llama import Llama, LlamaConfig


@dataclass(frozen=True)
class LuminaConfig(LlamaConfig):
    """`first_code` is the vocabulary's id of code 0; the other codes follow it."""

    first_code: int = 4


class Lumina(Llama):
    """Decoder for Lumina-mGPT-7B of every size, and for Anole.

    Codes and the end-of-line token are counted from code 0 of the vocabulary: the grid's `eol` is an id minus
    `first_code`.
    """

    config: LuminaConfig

    def __init__(self, config: LuminaConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid, ops)
        self.lm_head = ops.Linear(config.width, config.codes, bias=False)

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens + self.config.first_code)

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

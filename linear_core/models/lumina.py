"""Lumina-mGPT and its kin: Chameleon, one vocabulary for text and pictures (github.com/Alpha-VLLM/Lumina-mGPT).

A Llama whose queries and keys go through a LayerNorm. An image code is a token like any other, so it is embedded by the
prompt's table; of the head only the rows of the codes are kept, as nothing else can be drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocks import Ops
from ..grid import Grid
from .llama import Llama, LlamaConfig


class Lumina(Llama):
    """Decoder for Lumina-mGPT-7B of every size, and for Anole.

    `ids` are the vocabulary's ids of the codes, in order, and after them of the token that ends a line: a grid with
    line ends calls that token by its place there, which is `codes`.
    """

    def __init__(self, config: LlamaConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid, ops)
        self.lm_head = ops.Linear(config.width, config.codes, bias=False)
        self.register_buffer("ids", torch.zeros(config.codes + 1, dtype=torch.int64))

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(self.ids[tokens])

    def head(self, hidden: Tensor) -> Tensor:
        return self.lm_head(hidden)

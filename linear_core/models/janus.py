"""Janus and Janus-Pro: a Llama with a codebook and a head of its own for images (github.com/deepseek-ai/Janus).

An image token is fed as its entry of a small codebook (`gen_embed`), brought to the model's width by two layers
(`gen_aligner`); logits come from two more (`gen_head`). What only reads pictures or writes text is not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Grid
from .blocks import Ops
from .llama import Llama, LlamaConfig

DIM = 128  # numbers a head, in every published size


@dataclass(frozen=True)
class JanusConfig(LlamaConfig):
    """`code_dim` numbers an entry of the codebook, `head_hidden` between the two layers of the head."""

    code_dim: int = 8
    head_hidden: int = 2048


class TwoLayers(nn.Module):
    """Linear, GELU, Linear: ... I -> ... O."""

    def __init__(self, inner: int, hidden: int, outer: int, ops: Ops = nn):
        super().__init__()
        self.fc1 = ops.Linear(inner, hidden)
        self.fc2 = ops.Linear(hidden, outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Janus(Llama):
    """Decoder for Janus-1.3B, Janus-Pro-1B and Janus-Pro-7B."""

    config: JanusConfig

    def __init__(self, config: JanusConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid, ops)
        self.gen_embed = ops.Embedding(config.codes, config.code_dim)
        self.gen_aligner = TwoLayers(config.code_dim, config.width, config.width, ops)
        self.gen_head = TwoLayers(config.width, config.head_hidden, config.codes, ops)

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(self.gen_embed(tokens).to(self.dtype))

    def head(self, hidden: Tensor) -> Tensor:
        return self.gen_head(hidden)

"""Janus and Janus-Pro: a Llama with a codebook and an output head of its own for images (github.com/deepseek-ai/Janus).

An image token is embedded by its entry in a small codebook (`gen_embed`) and a two-layer MLP to the model's width
(`gen_aligner`); another MLP (`gen_head`) gives the logits. The parts that only read images or write text are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from ..grid import Grid
from .blocks import Ops
from .llama import Llama, LlamaConfig

HEAD_DIM = 128  # in every published size


@dataclass(frozen=True)
class JanusConfig(LlamaConfig):
    """`code_dim`: size of a codebook entry; `head_hidden`: hidden size of the output head."""

    code_dim: int = 8
    head_hidden: int = 2048


class MLP(nn.Module):
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
        self.gen_aligner = MLP(config.code_dim, config.width, config.width, ops)
        self.gen_head = MLP(config.width, config.head_hidden, config.codes, ops)

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.gen_aligner(self.gen_embed(tokens).to(self.dtype))

    def head(self, hidden: Tensor) -> Tensor:
        return self.gen_head(hidden)

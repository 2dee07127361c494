"""How Janus looks at pictures: SigLIP's vision tower, and an aligner to the language model's width
(github.com/deepseek-ai/Janus, janus/models/siglip_vit.py, clip_encoder.py, projector.py).

Of the output head that writes text, only the rows of two tokens are read: those that a yes-or-no question is answered
with. Key names are the published ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Ops
from .janus import MLP
from .mar import Attention, FeedForward

EPS = 1e-6
HEAD_DIM = 64  # of the published tower, SigLIP-L/16


@dataclass(frozen=True)
class UnderstandingConfig:
    """Sizes. `side`: patches along each side of a picture; `patch`: pixels along each side of a patch; `out`: width of
    the language model.
    """

    layers: int
    width: int
    heads: int
    hidden: int
    side: int
    patch: int
    out: int

    @property
    def pixels(self) -> int:
        """Along each side of a picture."""
        return self.side * self.patch

    @property
    def tokens(self) -> int:
        """That a picture becomes."""
        return self.side**2


class Block(nn.Module):
    """Pre-norm transformer block, B N W -> B N W; every patch sees all others."""

    def __init__(self, config: UnderstandingConfig, ops: Ops):
        super().__init__()
        self.norm1 = ops.LayerNorm(config.width, eps=EPS)
        self.attn = Attention(config.width, config.heads, ops)
        self.norm2 = ops.LayerNorm(config.width, eps=EPS)
        self.mlp = FeedForward(config.width, config.hidden, ops)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, self.attn.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTower(nn.Module):
    """SigLIP without the pooling of its own text side, which Janus does not use."""

    def __init__(self, config: UnderstandingConfig, ops: Ops):
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": ops.Conv2d(3, config.width, config.patch, stride=config.patch)})
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.layers))
        self.norm = ops.LayerNorm(config.width, eps=EPS)

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 S S in -1..1 -> B N W."""
        x = self.patch_embed["proj"](pictures).flatten(2).transpose(1, 2)
        x = x + self.pos_embed.to(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Understanding(nn.Module):
    """Pictures as the language model sees them, and its answer to a yes-or-no question."""

    def __init__(self, config: UnderstandingConfig, ops: Ops = nn):
        super().__init__()
        self.config = config
        self.compute_device: torch.device | None = None  # as in models.raster.Raster
        self.vision_tower = VisionTower(config, ops)
        self.aligner = MLP(config.width, config.out, config.out, ops)
        self.answers = ops.Linear(config.out, 2, bias=False)

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.aligner.fc1.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures B 3 S S in -1..1 -> B N O, to stand where a text has its picture."""
        return self.aligner(self.vision_tower(pictures.to(self.aligner.fc1.weight.dtype)))

    def odds(self, hidden: Tensor) -> Tensor:
        """ln of the odds of the first answer, from the hidden states B O behind a question: float32 B."""
        yes, no = self.answers(hidden).float().unbind(-1)
        return yes - no

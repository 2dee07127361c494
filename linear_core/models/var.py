"""VAR: next-scale prediction from classes (github.com/FoundationVision/VAR, models/var.py, MIT).

Key names are those of the published files; every size is read from their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.look_ahead import upcast
from ..cache.stage_cache import StageCache
from ..errors import UserError
from ..plan import CacheShape
from ..prompts import Prompt
from ..pyramid import Pyramid
from .blocks import Ops, Rotate
from .scales import Prune, Scales, everything

HEAD_DIM = 64  # of every published file
PYRAMIDS = {
    pyramid.tokens: pyramid
    for pyramid in (
        Pyramid.square(1, 2, 3, 4, 5, 6, 8, 10, 13, 16),  # 256 pixels
        Pyramid.square(1, 2, 3, 4, 6, 9, 13, 18, 24, 32),  # 512 pixels
    )
}
LARGEST_SCALE = math.log(100)  # of unit queries, as logarithm
PLAIN_SCALE = 0.25  # of queries that are not normalised, besides the usual 1 / sqrt(head size)
EPS = 1e-6

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v R H n D -> R H n D


@dataclass(frozen=True)
class VARConfig:
    """Sizes.

    code_dim      channels of the canvas
    shared_adaln  one projection of the condition for all layers, plus an offset each (d36)
    unit_qk       queries and keys are normalised to unit length, with a learned scale for each head
    """

    layers: int
    width: int
    heads: int
    hidden: int
    codes: int
    classes: int
    code_dim: int
    pyramid: Pyramid
    shared_adaln: bool = False
    unit_qk: bool = True

    @property
    def head_dim(self) -> int:
        """Head size."""
        return self.width // self.heads

    @property
    def logits(self) -> int:
        """Of a token."""
        return self.codes

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """The class is a condition, not a token, so it takes no slot."""
        return CacheShape(self.layers, self.heads, self.head_dim, 0, bytes_per_element)


class Attention(nn.Module):
    q_bias: nn.Parameter
    v_bias: nn.Parameter

    def __init__(self, width: int, heads: int, unit_qk: bool, ops: Ops):
        super().__init__()
        self.heads = heads
        self.mat_qkv = ops.Linear(width, 3 * width, bias=False)
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.scale_mul_1H11 = nn.Parameter(torch.full((1, heads, 1, 1), math.log(4))) if unit_qk else None
        self.proj = ops.Linear(width, width)

    def forward(self, x: Tensor, attend: Attend, rotate: Rotate = lambda x: x) -> Tensor:
        """x R n W. Queries are scaled so that q k / sqrt(D) is the model's score. `rotate` gets unit vectors."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]).to(x)
        q, k, v = (self.mat_qkv(x) + bias).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.scale_mul_1H11 is None:
            q = q * PLAIN_SCALE
        else:
            scale = upcast(self.scale_mul_1H11).to(x.device).clamp(max=LARGEST_SCALE).exp() * q.shape[-1] ** 0.5
            q, k = (F.normalize(upcast(part), dim=-1) for part in (q, k))
            q, k = rotate(q * scale).to(x.dtype), rotate(k).to(x.dtype)
        return self.proj(attend(q, k, v).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int, ops: Ops):
        super().__init__()
        self.fc1 = ops.Linear(width, hidden)
        self.fc2 = ops.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


def modulation(width: int, vectors: int, ops: Ops) -> nn.Sequential:
    """From the condition R W to the vectors that scale and shift a norm's output: R vectors*W."""
    return nn.Sequential(nn.SiLU(), ops.Linear(width, vectors * width))


class Block(nn.Module):
    """Transformer block whose norms and residuals are modulated by the condition, R n W -> R n W."""

    def __init__(self, config: VARConfig, ops: Ops):
        super().__init__()
        self.attn = Attention(config.width, config.heads, config.unit_qk, ops)
        self.ffn = FeedForward(config.width, config.hidden, ops)
        if config.shared_adaln:
            self.ada_gss = nn.Parameter(torch.randn(1, 1, 6, config.width) / config.width**0.5)
        else:
            self.ada_lin = modulation(config.width, 6, ops)

    def forward(
        self,
        x: Tensor,
        vectors: Tensor,
        attend: Callable[..., Tensor],
        dtype: torch.dtype,
        layer: int = 0,
        prune: Prune = everything,
    ) -> Tensor:
        """x R n W, float32. vectors R 6 1 W: two factors of the residuals, two scales, two shifts."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(1)

        def attention(x: Tensor, places: Tensor | None) -> Tensor:
            return self.attn(modulate(x, scale1, shift1).to(dtype), partial(attend, places=places)) * gamma1

        def feed_forward(x: Tensor, places: Tensor | None) -> Tensor:
            return self.ffn(modulate(x, scale2, shift2).to(dtype)) * gamma2

        x = x + prune(layer, "attention", x, attention)
        return x + prune(layer, "feed-forward", x, feed_forward)


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift."""
    return F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + scale) + shift


class HeadModulation(nn.Module):
    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.ada_lin = modulation(width, 2, ops)


@dataclass(frozen=True)
class State:
    """What all scales of some rows share.

    first   input of the first scale, R n W
    blocks  by layer: R 6 1 W
    head    R 2 1 W: scale and shift
    """

    first: Tensor
    blocks: list[Tensor]
    head: Tensor


class VAR(Scales):
    """Decoder for VAR of every size."""

    config: VARConfig
    prunes = True
    block: type[nn.Module] = Block
    vectors = 6  # that modulate a block

    def __init__(self, config: VARConfig, ops: Ops = nn):
        super().__init__(config, config.pyramid)
        width, pyramid = config.width, config.pyramid
        self.class_emb = ops.Embedding(config.classes + 1, width)
        self.pos_start = nn.Parameter(torch.zeros(1, pyramid.size(0), width))
        self.pos_1LC = nn.Parameter(torch.zeros(1, pyramid.tokens, width))
        self.lvl_embed = ops.Embedding(pyramid.stages, width)
        self.word_embed = ops.Linear(config.code_dim, width)
        self.blocks = nn.ModuleList(self.block(config, ops) for _ in range(config.layers))
        if config.shared_adaln:
            self.shared_ada_lin = modulation(width, 6, ops)
        self.head_nm = HeadModulation(width, ops)
        self.head = ops.Linear(width, config.codes)

    # -- the prompt ----------------------------------------------------------------------------------------------------

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        self.check(prompt)
        return prompt.stack(Prompt(torch.full_like(prompt.tokens, self.config.classes), prompt.pad))

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt."""
        if prompt.tokens.is_floating_point() or prompt.tokens.ndim != 2 or prompt.length != 1:
            raise UserError("prompt: this model draws from classes, not texts; connect a Class Prompt.")
        if (largest := int(prompt.tokens.max())) > self.config.classes:
            raise UserError(
                f"prompt: it asks for class {largest}, but this model has {self.config.classes} classes; connect a "
                "Class Prompt made with this model."
            )

    def begin(self, prompt: Prompt) -> State:
        self.check(prompt)
        dtype, width = self.dtype, self.config.width
        condition = self.class_emb(prompt.tokens[:, 0]).to(dtype)

        def vectors(modulation: nn.Module, count: int) -> Tensor:
            return upcast(modulation(condition)).view(-1, count, 1, width)

        if self.config.shared_adaln:
            shared = vectors(self.shared_ada_lin, 6)
            blocks = [
                shared + upcast(block.get_parameter("ada_gss")).to(shared).transpose(1, 2) for block in self.blocks
            ]
        else:
            blocks = [vectors(block.get_submodule("ada_lin"), self.vectors) for block in self.blocks]
        first = upcast(condition)[:, None] + upcast(self.pos_start).to(condition.device)
        return State(first + self._place(0), blocks, vectors(self.head_nm.ada_lin, 2))

    def select_rows(self, state: State, rows: int) -> State:
        return State(state.first[:rows], [part[:rows] for part in state.blocks], state.head[:rows])

    # -- a scale -------------------------------------------------------------------------------------------------------

    def guidance(self, stage: int, scale: float) -> float:
        """Grows from 1, which is none, at the first scale to `scale` at the last: the published cfg is `scale` - 1."""
        return 1 + (scale - 1) * stage / max(self.pyramid.stages - 1, 1)

    def stage(
        self, stage: int, below: Tensor | None, state: State, cache: StageCache, prune: Prune = everything
    ) -> Tensor:
        x = self._input(stage, below, state)
        for layer, block in enumerate(self.blocks):
            x = block(x, state.blocks[layer], partial(cache.attend, layer), self.dtype, layer, prune)
        return self._logits(x, state)

    def forward(self, prompt: Prompt, below: list[Tensor], visible: Tensor | None = None) -> Tensor:
        """Logits of every token of all scales in one pass without a cache: for training, and the reference for tests.

        below    the canvas shrunk to every scale but the first, B n Z each
        visible  bool L B H N N, which keys each query sees; None: those of the scales that it `sees`
        Returns B N V.
        """
        state = self.begin(prompt)
        inputs = [state.first, *(self._embed(stage, one) for stage, one in enumerate(below, 1))]
        x = torch.cat(inputs, 1)
        if visible is None:
            scale = torch.cat([torch.full((one.shape[1],), n, device=x.device) for n, one in enumerate(inputs)])
            masks = [self.sees(scale[:, None], scale)] * len(self.blocks)
        else:
            masks = list(visible)
        for block, mask, vectors in zip(self.blocks, masks, state.blocks, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, places: None = None, mask: Tensor = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, vectors, attend, self.dtype)
        return self._logits(x, state)

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether a token of scale `query` sees those of scale `key`, in the same layer."""
        return query >= key

    def _input(self, stage: int, below: Tensor | None, state: State) -> Tensor:
        """What the first layer reads, R n W: rows of guidance read the same canvas."""
        if below is None:
            return state.first
        return self._embed(stage, below).repeat(len(state.first) // len(below), 1, 1)

    def _place(self, stage: int) -> Tensor:
        """What a token's place adds to its input: 1 n W, float32."""
        first = self.pyramid.index(stage)
        place = upcast(self.pos_1LC[:, first : first + self.pyramid.size(stage)]).to(self.device)
        return place + upcast(self.lvl_embed(torch.tensor([stage], device=self.device)))

    def _embed(self, stage: int, below: Tensor) -> Tensor:
        """The shrunk canvas B n Z -> input of a scale B n W, float32."""
        return upcast(self.word_embed(below.to(self.dtype))) + self._place(stage)

    def _logits(self, x: Tensor, state: State) -> Tensor:
        scale, shift = state.head.unbind(1)
        return upcast(self.head(modulate(x, scale, shift).to(self.dtype)))


def read_config(shapes: Mapping[str, tuple[int, ...]], pyramid: Pyramid | None = None) -> VARConfig:
    """Every size of a VAR file from its keys and shapes. The pyramid follows from its tokens if it was published.

    Raises KeyError, IndexError or ValueError if the shapes are not a VAR's.
    """
    tokens, scales = shapes["pos_1LC"][1], shapes["lvl_embed.weight"][0]
    pyramid = pyramid or PYRAMIDS.get(tokens)
    if pyramid is None or (pyramid.tokens, pyramid.stages) != (tokens, scales):
        raise ValueError(f"{tokens} tokens in {scales} scales are no published pyramid")
    codes, width = shapes["head.weight"]
    unit = shapes.get("blocks.0.attn.scale_mul_1H11")
    return VARConfig(
        layers=1 + max(int(key.split(".")[1]) for key in shapes if key.startswith("blocks.")),
        width=width,
        heads=unit[1] if unit else width // HEAD_DIM,
        hidden=shapes["blocks.0.ffn.fc1.weight"][0],
        codes=codes,
        classes=shapes["class_emb.weight"][0] - 1,
        code_dim=shapes["word_embed.weight"][1],
        pyramid=pyramid,
        shared_adaln="shared_ada_lin.1.weight" in shapes,
        unit_qk=unit is not None,
    )

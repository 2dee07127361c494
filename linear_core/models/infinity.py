"""Infinity: next-scale prediction of bits from texts (github.com/FoundationVision/Infinity, infinity/models, MIT).

A token is a number of 16 to 56 bits, and every bit is drawn by itself. Key names are those of the published files but
for their blocks, which are numbered here from first to last.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.look_ahead import upcast
from ..cache.stage_cache import StageCache
from ..errors import UserError
from ..grid import Grid
from ..plan import CacheShape
from ..prompts import Prompt
from ..pyramid import Pyramid
from .blocks import Ops, rope_2d, rotate_pairs
from .scales import Prune, Scales, everything
from .var import EPS, Attention, FeedForward, HeadModulation, modulate, modulation

ROPE_BASE = 10000.0

# The scales of a picture, by its height over its width: 1, 1.25, 4/3, 1.5, 1.75, 2, 2.5 and 3. A lying picture has
# rows and columns exchanged. They follow no rule (infinity/utils/dynamic_resolution.py).
UPRIGHT = (
    "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
)
STAGES = {"0.06M": 7, "0.25M": 10, "1M": 13}  # scales that are drawn, by the published name of the picture's size


def _read_sides(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(rows), int(cols)) for rows, cols in (side.split("x") for side in text.split()))


def _all_sides() -> tuple[tuple[tuple[int, int], ...], ...]:
    """The thirteen sides of every shape, the lying ones first."""
    upright = [_read_sides(text) for text in UPRIGHT]
    lying = [tuple((cols, rows) for rows, cols in sides) for sides in upright[1:]]
    return (*reversed(lying), *upright)


PYRAMIDS = {name: tuple(Pyramid(sides[:stages]) for sides in _all_sides()) for name, stages in STAGES.items()}
_LARGEST = {sides[:stages]: sides[-1] for sides in _all_sides() for stages in STAGES.values()}


@dataclass(frozen=True)
class InfinityConfig:
    """Sizes.

    bits           of a token; its number is below 2 ** bits
    caption_dim    numbers that the text encoder gives for each token
    caption_slots  tokens of the longest text
    pool_heads     heads of the attention that makes one condition of a text
    levels         scales that have an embedding, a few more than are drawn
    chunk          blocks that the file names together; 1: it may number them from first to last
    """

    layers: int
    width: int
    heads: int
    hidden: int
    bits: int
    caption_dim: int
    caption_slots: int
    pool_heads: int
    levels: int
    chunk: int = 1
    classes: int = 0  # it draws from texts

    @property
    def codes(self) -> int:
        return 2**self.bits

    @property
    def logits(self) -> int:
        """Of a token: for each bit, one for 0 and one for 1."""
        return 2 * self.bits

    @property
    def code_dim(self) -> int:
        """Numbers of the canvas that a token reads and adds to."""
        return self.bits

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """The text is read by cross-attention, so it takes no slot."""
        return CacheShape(self.layers, self.heads, self.width // self.heads, 0, bytes_per_element)


@dataclass(frozen=True)
class Text:
    """What one layer's cross-attention reads of the texts: keys and values R H T D, and which tokens are words, bool
    R 1 1 T (None: all)."""

    keys: Tensor
    values: Tensor
    words: Tensor | None

    def rows(self, rows: int) -> Text:
        """Those of the first `rows` rows."""
        return Text(self.keys[:rows], self.values[:rows], None if self.words is None else self.words[:rows])

    def attend(self, q: Tensor) -> Tensor:
        """q R H n D -> R n H*D."""
        out = F.scaled_dot_product_attention(q, self.keys, self.values, attn_mask=self.words)
        return out.transpose(1, 2).flatten(2)


class TextHeads(nn.Module):
    """Keys and values of texts, and the projection of what was attended to. Keys have no bias."""

    v_bias: nn.Parameter

    def __init__(self, width: int, heads: int, inner: int, ops: Ops):
        super().__init__()
        self.heads = heads
        self.mat_kv = ops.Linear(inner, 2 * width, bias=False)
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = ops.Linear(width, width)

    def read(self, features: Tensor, words: Tensor | None) -> Text:
        """features R T I."""
        keys, values = self.mat_kv(features).chunk(2, -1)
        values = values + self.v_bias.to(values)
        keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (keys, values))
        return Text(keys, values, words)


class TextPool(TextHeads):
    """One vector for each text, by attention with a learned query: R T I -> R W."""

    mat_q: nn.Parameter

    def __init__(self, width: int, heads: int, inner: int, ops: Ops):
        super().__init__(width, heads, inner, ops)
        self.mat_q = nn.Parameter(torch.zeros(1, heads, width // heads))

    def forward(self, features: Tensor, words: Tensor | None) -> Tensor:
        query = self.mat_q[:, :, None].to(features).expand(len(features), -1, -1, -1)
        return self.proj(self.read(features, words).attend(query)[:, 0])


class CrossAttention(TextHeads):
    def __init__(self, width: int, heads: int, ops: Ops):
        super().__init__(width, heads, width, ops)
        self.mat_q = ops.Linear(width, width)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        """x R n W."""
        return self.proj(text.attend(self.mat_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)))


class Block(nn.Module):
    """VAR's block with attention to the text in between, R n W -> R n W."""

    def __init__(self, config: InfinityConfig, ops: Ops):
        super().__init__()
        self.sa = Attention(config.width, config.heads, True, ops)
        self.ca_norm = ops.LayerNorm(config.width, eps=EPS)
        self.ca = CrossAttention(config.width, config.heads, ops)
        self.ffn = FeedForward(config.width, config.hidden, ops)
        self.ada_gss = nn.Parameter(torch.zeros(1, 1, 6, config.width))

    def forward(
        self,
        x: Tensor,
        vectors: Tensor,
        text: Text,
        attend: Callable[..., Tensor],
        table: Tensor,
        dtype: torch.dtype,
        layer: int = 0,
        prune: Prune = everything,
    ) -> Tensor:
        """x R n W, float32. vectors R 6 1 W: two factors of the residuals, two scales, two shifts."""
        gamma1, gamma2, scale1, scale2, shift1, shift2 = vectors.unbind(1)

        def attention(x: Tensor, places: Tensor | None) -> Tensor:
            own = table if places is None else table[places][:, None]  # rows may compute different tokens
            inner, rotate = modulate(x, scale1, shift1).to(dtype), partial(rotate_pairs, table=own)
            return self.sa(inner, partial(attend, places=places), rotate) * gamma1

        def cross_attention(x: Tensor, places: Tensor | None) -> Tensor:
            return self.ca(self.ca_norm(x).to(dtype), text)  # its norm has weights, and nothing modulates it

        def feed_forward(x: Tensor, places: Tensor | None) -> Tensor:
            return self.ffn(modulate(x, scale2, shift2).to(dtype)) * gamma2

        x = x + prune(layer, "attention", x, attention)
        x = x + prune(layer, "cross-attention", x, cross_attention)
        return x + prune(layer, "feed-forward", x, feed_forward)


@dataclass(frozen=True)
class State:
    """What all scales of some rows share.

    first   input of the first scale, R 1 W
    blocks  by layer: R 6 1 W
    head    R 2 1 W: scale and shift
    texts   by layer
    """

    first: Tensor
    blocks: list[Tensor]
    head: Tensor
    texts: list[Text]


class Infinity(Scales):
    """Decoder for Infinity of every size."""

    config: InfinityConfig
    prunes = True
    cfg_uncond: nn.Parameter

    def __init__(self, config: InfinityConfig, pyramid: Pyramid, ops: Ops = nn):
        super().__init__(config, pyramid)
        width = config.width
        self.text_norm = ops.RMSNorm(config.caption_dim, eps=EPS)
        self.cfg_uncond = nn.Parameter(torch.zeros(config.caption_slots, config.caption_dim))
        self.text_proj_for_sos = nn.ModuleDict({"ca": TextPool(width, config.pool_heads, config.caption_dim, ops)})
        self.text_proj_for_ca = nn.Sequential(
            ops.Linear(config.caption_dim, width), nn.GELU(approximate="tanh"), ops.Linear(width, width)
        )
        self.pos_start = nn.Parameter(torch.zeros(1, 1, width))
        self.lvl_embed = ops.Embedding(config.levels, width)
        self.word_embed = ops.Linear(config.bits, width)
        self.shared_ada_lin = modulation(width, 6, ops)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.layers))
        self.head_nm = HeadModulation(width, ops)
        self.head = ops.Linear(width, 2 * config.bits)

    @property
    def dtype(self) -> torch.dtype:
        """Of the blocks. All else is float32 or better, as published."""
        return self.compute_dtype or self.get_parameter("blocks.0.sa.q_bias").dtype

    @property
    def _precise(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def digits(self) -> int:
        return self.config.bits

    @property
    def outcomes(self) -> int:
        return 2

    def with_grid(self, grid: Grid | None) -> Infinity:
        """The same model and weights for pictures of another size."""
        if grid is None or (grid.rows, grid.cols) == self.pyramid.sides[-1]:
            return self
        other = copy.copy(self)
        other.pyramid = pyramid_of(grid)
        return other

    # -- the prompt ----------------------------------------------------------------------------------------------------

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        """The rows of `prompt`, then its negative rows, or as many learned ones as each text has tokens."""
        self.check(prompt)
        if prompt.negative is not None:
            self.check(prompt.negative)
            return prompt.stack(prompt.negative)
        place = torch.arange(prompt.length, device=prompt.pad.device) - prompt.pad[:, None]
        learned = self.cfg_uncond.to(prompt.tokens)[place.clamp(min=0)] * (place >= 0)[..., None]
        return prompt.stack(Prompt(learned, prompt.pad))

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt."""
        config = self.config
        if prompt.tokens.ndim != 3 or not prompt.tokens.is_floating_point():
            raise UserError("prompt: this model draws from texts; connect a Text Prompt.")
        if prompt.tokens.shape[2] != config.caption_dim:
            raise UserError(
                f"prompt: the text encoder gives {prompt.tokens.shape[2]} features per token, but this model takes "
                f"{config.caption_dim}; choose FLAN-T5-XL's encoder."
            )
        if prompt.length != config.caption_slots:
            raise UserError("prompt: its text was prepared for another model; connect this model to its Text Prompt.")

    def begin(self, prompt: Prompt) -> State:
        self.check(prompt)
        width, precise = self.config.width, self._precise
        shortest = int(prompt.pad.min())  # padding of the longest text: nobody's words
        features = self.text_norm(prompt.tokens[:, shortest:].to(precise))
        words = torch.arange(shortest, prompt.length, device=prompt.pad.device) >= prompt.pad[:, None]
        mask = None if bool(words.all()) else words[:, None, None]
        condition = self.text_proj_for_sos["ca"](features, mask)

        def vectors(modulation: nn.Module, count: int) -> Tensor:
            return upcast(modulation(condition)).view(-1, count, 1, width)

        shared = vectors(self.shared_ada_lin, 6)
        blocks = [shared + block.get_parameter("ada_gss").to(shared).transpose(1, 2) for block in self.blocks]
        features = self.text_proj_for_ca(features).to(self.dtype)
        texts = [block.ca.read(features, mask) for block in self.blocks if isinstance(block, Block)]
        first = condition[:, None] + self.pos_start.to(condition) + self._level(0)
        return State(first, blocks, vectors(self.head_nm.ada_lin, 2), texts)

    def select_rows(self, state: State, rows: int) -> State:
        texts = [text.rows(rows) for text in state.texts]
        return State(state.first[:rows], [part[:rows] for part in state.blocks], state.head[:rows], texts)

    # -- a scale -------------------------------------------------------------------------------------------------------

    def stage(
        self, stage: int, below: Tensor | None, state: State, cache: StageCache, prune: Prune = everything
    ) -> Tensor:
        x = state.first
        if below is not None:  # rows of guidance read the same canvas
            x = self._embed(stage, below).repeat(len(x) // len(below), 1, 1)
        table = self.rope_table(stage)
        for layer, block in enumerate(self.blocks):
            attend = partial(cache.attend, layer)
            x = block(x, state.blocks[layer], state.texts[layer], attend, table, self.dtype, layer, prune)
        return self._logits(x, state)

    def forward(self, prompt: Prompt, below: list[Tensor], visible: Tensor | None = None) -> Tensor:
        """Logits of every token of all scales in one pass without a cache: the reference for tests.

        below    the canvas shrunk to every scale but the first, B n Z each
        visible  bool L B H N N, which keys each query sees; None: its own scale and those before it
        Returns B N 2*bits.
        """
        state = self.begin(prompt)
        inputs = [state.first, *(self._embed(stage, one) for stage, one in enumerate(below, 1))]
        x = torch.cat(inputs, 1)
        table = torch.cat([self.rope_table(stage) for stage in range(len(inputs))])
        if visible is None:
            scale = torch.cat([torch.full((one.shape[1],), n, device=x.device) for n, one in enumerate(inputs)])
            masks = [scale[:, None] >= scale] * len(self.blocks)
        else:
            masks = list(visible)
        for layer, (block, mask) in enumerate(zip(self.blocks, masks, strict=True)):

            def attend(q: Tensor, k: Tensor, v: Tensor, places: None = None, mask: Tensor = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, state.blocks[layer], state.texts[layer], attend, table, self.dtype)
        return self._logits(x, state)

    def rope_table(self, stage: int) -> Tensor:
        """RoPE table n 2 D of a scale. Its places are spread over those of the thirteenth, be that drawn or not.

        So the same place of the picture is rotated nearly alike at every scale, and `rotate_ahead` has nothing to do.
        """
        sides, head = self.pyramid.sides, self.config.width // self.config.heads
        largest = _LARGEST.get(sides, sides[-1])
        table = rope_2d(*largest, head, ROPE_BASE, self.device).unflatten(0, largest)
        rows, cols = (spread(count, last).to(table.device) for count, last in zip(sides[stage], largest, strict=True))
        return table[rows][:, cols].flatten(0, 1)

    def _level(self, stage: int) -> Tensor:
        """What says which scale it is: 1 W."""
        return upcast(self.lvl_embed(torch.tensor([stage], device=self.device)))

    def _embed(self, stage: int, below: Tensor) -> Tensor:
        """The shrunk canvas B n Z -> input of a scale B n W, float32."""
        return self.word_embed(below.to(self._precise)) + self._level(stage)

    def _logits(self, x: Tensor, state: State) -> Tensor:
        scale, shift = state.head.unbind(1)
        return self.head(modulate(x, scale, shift))


def spread(count: int, last: int) -> Tensor:
    """Positions of `count` rows or columns among `last`: int64, ties to even, in float32 as published."""
    return (torch.arange(count) * (last / count)).round().long()


def pyramid_of(grid: Grid) -> Pyramid:
    """The scales of a picture whose last one is `grid`. Raises UserError if none was published."""
    for pyramids in PYRAMIDS.values():
        for pyramid in pyramids:
            if pyramid.sides[-1] == (grid.rows, grid.cols):
                return pyramid
    raise UserError(f"size: Infinity draws no picture of {grid.rows} x {grid.cols} tokens; choose one of its sizes.")


def read_config(shapes: Mapping[str, tuple[int, ...]]) -> InfinityConfig:
    """Every size of an Infinity file from its keys and shapes.

    Raises KeyError, IndexError or ValueError if the shapes are not an Infinity's.
    """
    chunked = "block_chunks.0.module.0.sa.proj.weight" in shapes
    first = "block_chunks.0.module.0" if chunked else "blocks.0"
    chunk = sum(key.startswith("block_chunks.0.module.") and key.endswith(".sa.proj.weight") for key in shapes)
    width, bits = shapes["word_embed.weight"]
    if shapes["head.weight"][0] != 2 * bits or bits > 62:
        raise ValueError(f"{bits} bits and {shapes['head.weight'][0]} logits")
    slots, dim = shapes["cfg_uncond"]
    return InfinityConfig(
        layers=sum(key.endswith(".sa.proj.weight") for key in shapes),
        width=width,
        heads=shapes[f"{first}.sa.scale_mul_1H11"][1],
        hidden=shapes[f"{first}.ffn.fc1.weight"][0],
        bits=bits,
        caption_dim=dim,
        caption_slots=slots,
        pool_heads=shapes["text_proj_for_sos.ca.mat_q"][1],
        levels=shapes["lvl_embed.weight"][0],
        chunk=max(chunk, 1),
    )


def block_name(key: str, config: InfinityConfig) -> str:
    """The name here of a file's key: block_chunks.1.module.2 with four blocks a chunk is blocks.6."""
    found = re.fullmatch(r"block_chunks\.(\d{1,4})\.module\.(\d{1,4})\.(.+)", key)
    return f"blocks.{int(found[1]) * config.chunk + int(found[2])}.{found[3]}" if found else key

"""LlamaGen: a Llama over image codes with 2-D RoPE (github.com/FoundationVision/LlamaGen, MIT).

Key names are those of the published files. Every size is read from a state dict's shapes, except the number of heads
and the grid, which the files do not contain: see `read_config`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.line_cache import LineCache
from ..errors import UserError
from ..grid import Grid
from ..plan import CacheShape
from ..prompts import Prompt
from .blocks import Block, Heads, Ops, for_pairs, rope_1d, rope_2d, rope_2d_at, rotate_pairs
from .raster import Raster

HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32, 2560: 40, 2048: 32, 4096: 32}  # by published width
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class LlamaGenConfig:
    """Sizes. `rope`: "2d", by row and column, as published; "1d", by the place in the sequence, as Janus has it."""

    layers: int
    width: int
    heads: int
    hidden: int
    codes: int
    classes: int = 0  # class-conditional; without the unconditional class
    caption_dim: int = 0  # text-conditional
    caption_slots: int = 0
    eps: float = 1e-5
    rope: str = "2d"

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """One slot for the whole prompt: see LlamaGen."""
        return CacheShape(self.layers, self.heads, self.width // self.heads, LlamaGen.prompt_slots, bytes_per_element)


class ClassEmbedding(nn.Module):
    def __init__(self, classes: int, width: int, ops: Ops):
        super().__init__()
        self.embedding_table = ops.Embedding(classes + 1, width)

    def forward(self, labels: Tensor) -> Tensor:
        return self.embedding_table(labels)


class CaptionEmbedding(nn.Module):
    uncond_embedding: Tensor

    def __init__(self, config: LlamaGenConfig, ops: Ops):
        super().__init__()
        fc1 = ops.Linear(config.caption_dim, config.width, bias=False)
        self.cap_proj = nn.ModuleDict({"fc1": fc1, "fc2": ops.Linear(config.width, config.width, bias=False)})
        self.register_buffer("uncond_embedding", torch.zeros(config.caption_slots, config.caption_dim))

    def forward(self, features: Tensor) -> Tensor:
        return self.cap_proj["fc2"](F.gelu(self.cap_proj["fc1"](features), approximate="tanh"))


class LlamaGen(Raster):
    """Decoder for class- and text-conditional LlamaGen of every size.

    The published RoPE table is zero, not the identity, for the prompt, so its rotated queries and keys are exactly
    zero. Every image query therefore scores each visible prompt token 0, and n of them equal one slot with a zero key,
    the mean value and weight n. That one slot is all that the prompt takes in the cache.
    """

    prompt_slots = 1

    def __init__(self, config: LlamaGenConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid)
        heads = Heads(config.heads, config.heads, config.width // config.heads)
        self.cls_embedding: ClassEmbedding | CaptionEmbedding = (
            ClassEmbedding(config.classes, config.width, ops) if config.classes else CaptionEmbedding(config, ops)
        )
        self.tok_embeddings = ops.Embedding(config.codes, config.width)
        self.layers = nn.ModuleList(
            Block(config.width, heads, config.hidden, config.eps, ops) for _ in range(config.layers)
        )
        self.norm = ops.RMSNorm(config.width, eps=config.eps)
        self.output = ops.Linear(config.width, config.codes, bias=False)

    rotate = staticmethod(rotate_pairs)

    def embed_codes(self, tokens: Tensor) -> Tensor:
        return self.tok_embeddings(tokens)

    def head(self, hidden: Tensor) -> Tensor:
        return self.output(hidden)

    def rope_table(self, index: Tensor, pad: Tensor, grid: Grid) -> Tensor:
        """RoPE table T 2 D. `pad` has no effect: LlamaGen rotates by the position in the picture alone."""
        dim, place = self.config.width // self.config.heads, index - grid.prompt
        if self.config.rope == "1d":
            table = for_pairs(rope_1d(place, dim, ROPE_BASE))
        else:
            table = rope_2d(grid.rows, grid.cols, dim, ROPE_BASE, index.device)
            table = table.index_select(0, place.flatten()).unflatten(0, place.shape)
        return table if index.ndim == 1 else table[:, None]

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        """The rows of `prompt`, then its negative rows, or unconditional rows with the same padding."""
        self.check(prompt)
        if prompt.negative is not None:
            return prompt.stack(prompt.negative)
        if isinstance(self.cls_embedding, CaptionEmbedding):
            unconditional = self.cls_embedding.uncond_embedding.to(prompt.tokens)[-prompt.length :].expand_as(
                prompt.tokens
            )
        else:
            unconditional = torch.full_like(prompt.tokens, self.config.classes)
        return prompt.stack(Prompt(unconditional, prompt.pad))

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt: a class in place of a text, too many tokens, other features."""
        c, tokens = self.config, prompt.tokens
        if c.classes and (tokens.ndim != 2 or prompt.length != 1):
            raise UserError("prompt: this model draws from classes, not texts; connect a Class Prompt.")
        if c.classes and (largest := int(tokens.max())) > c.classes:
            raise UserError(
                f"prompt: it asks for class {largest}, but this model has {c.classes} classes; connect a Class Prompt "
                "made with this model."
            )
        if c.caption_dim and (tokens.ndim != 3 or prompt.length > c.caption_slots):
            raise UserError("prompt: this model draws from texts; connect a Text Prompt.")
        if c.caption_dim and tokens.shape[2] != c.caption_dim:
            raise UserError(
                f"prompt: the text encoder gives {tokens.shape[2]} features per token, but this model takes "
                f"{c.caption_dim}; choose FLAN-T5-XL's encoder."
            )

    def _embed(self, prompt: Prompt) -> Tensor:
        tokens = prompt.tokens if self.config.classes else prompt.tokens.to(self.dtype)
        return self.cls_embedding(tokens).to(self.dtype)

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        """Logits B V of the first image token; writes the prompt's slot.

        Equal rows, such as the unconditional rows of class prompts, are computed once.
        """
        self.check(prompt)
        unique, row = prompt.unique()
        x = self._embed(unique)
        visible = unique.attention_mask()
        to_image = visible[:, -1:]  # image tokens see everything but padding
        count = to_image.sum((1, 2))
        bias = torch.zeros(visible.shape, dtype=x.dtype, device=x.device).masked_fill(~visible, float("-inf"))
        for layer, block in enumerate(self.layers):

            def attend_prompt(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                share = (to_image.float() / count[:, None, None]).to(v.dtype)[:, None]  # B 1 1 T
                mean = (share @ v)[row]
                cache.write_prompt(layer, torch.zeros_like(mean), mean, count[row, None].float())
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None])

            x = block(x, torch.zeros_like, attend_prompt)
        return self.head(self.norm(x[:, -1])).float()[row]

    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int, columns: int) -> Tensor:
        """Rotate the rotated queries ... T D to `lines` lines further down and `columns` to the right."""
        dim, device = queries.shape[-1], queries.device
        if self.config.rope == "1d":
            offset = torch.full((1,), lines * grid.stride + columns, device=device)
            return rotate_pairs(queries, for_pairs(rope_1d(offset, dim, ROPE_BASE)))
        row, col = (torch.full((1,), n, device=device) for n in (lines, columns))
        return rotate_pairs(queries, rope_2d_at(row, col, dim, ROPE_BASE))

    def forward(self, prompt: Prompt, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of every image token in one pass without a cache: for training, and the reference for tests.

        tokens   int64 B N-1 or B N; the logits of token n depend on tokens before n
        visible  bool L B H T+N T+N, which keys each query sees; None: causal, with padding hidden
        Returns B T+N V; the logits of image token n are at T + n - 1.
        """
        length, count = prompt.length, prompt.length + tokens.shape[1]
        table = self.rope_table(torch.arange(tokens.shape[1], device=tokens.device), prompt.pad, self.grid)
        table = torch.cat([table.new_zeros(length, *table.shape[1:]), table])
        x = torch.cat([self._embed(prompt), self.tok_embeddings(tokens).to(self.dtype)], 1)
        if visible is None and not bool(prompt.pad.any()):
            masks: list[Tensor | None] = [None] * len(self.layers)
        elif visible is None:
            masks = [prompt.attention_mask(count)[:, None]] * len(self.layers)
        else:
            masks = list(visible)
        for block, mask in zip(self.layers, masks, strict=True):

            def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)

            x = block(x, lambda t: rotate_pairs(t, table), attend_all)
        return self.output(self.norm(x))


def read_config(shapes: Mapping[str, tuple[int, ...]], heads: int | None = None) -> LlamaGenConfig:
    """Every size of a LlamaGen file from its keys and shapes. `heads` is needed if the width was not published.

    Raises UserError if the number of heads is unknown, KeyError or ValueError if the shapes are not a LlamaGen's.
    """
    codes, width = shapes["tok_embeddings.weight"]
    layers = 1 + max(int(k.split(".")[1]) for k in shapes if k.startswith("layers."))
    heads = heads or HEADS.get(width)
    if heads is None:
        raise UserError(f"no LlamaGen of width {width} was published, and the file does not say how many heads it has.")
    hidden = shapes["layers.0.feed_forward.w1.weight"][0]
    if (table := shapes.get("cls_embedding.embedding_table.weight")) is not None:
        return LlamaGenConfig(layers, width, heads, hidden, codes, classes=table[0] - 1)
    slots, dim = shapes["cls_embedding.uncond_embedding"]
    return LlamaGenConfig(layers, width, heads, hidden, codes, caption_dim=dim, caption_slots=slots)

"""A Llama that draws: a prompt of text tokens, then an image's codes in raster lines, all with 1-D RoPE.

This is what Janus, Lumina-mGPT and related models share. Each of them defines how a code is embedded and how a hidden
state becomes logits over codes (`embed_codes`, `head`). Key names are those of LlamaGen, whose blocks are used; the
families in `linear_core/checkpoints/families` map the keys of published files to them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.attention import attend
from ..cache.line_cache import LineCache
from ..errors import UserError
from ..grid import Grid
from ..plan import CacheShape
from ..prompts import Prompt, causal_mask
from .blocks import Block, Heads, Ops, rope_1d, rotate_halves
from .raster import Raster


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes.

    codes       number of codes that images are drawn from
    vocabulary  number of tokens of the prompt
    qk_norm     norm of queries and keys, as in `blocks.Heads`
    key_heads   heads of keys and values, each shared by equally many of the `heads` of queries; 0: as many
    head_dim    numbers of a head; 0: width / heads
    """

    layers: int
    width: int
    heads: int
    hidden: int
    codes: int
    vocabulary: int
    eps: float = 1e-6
    rope_base: float = 10000.0
    qk_norm: str = ""
    key_heads: int = 0
    head_dim: int = 0

    classes = 0  # prompts are texts

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_heads", self.key_heads or self.heads)
        object.__setattr__(self, "head_dim", self.head_dim or self.width // max(self.heads, 1))

    @property
    def group(self) -> int:
        """Query heads that share a key head."""
        return self.heads // self.key_heads

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """One slot per token of the prompt."""
        return CacheShape(self.layers, self.key_heads, self.head_dim, prompt, bytes_per_element, self.group)


class Llama(Raster):
    """Base class of these models. A token's position is its index minus its row's padding.

    Subclasses add `embed_codes` and `head`. The negative prompt of guidance comes with the prompt.
    """

    def __init__(self, config: LlamaConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid)
        self.embed_tokens = ops.Embedding(config.vocabulary, config.width)
        heads = Heads(config.heads, config.key_heads, config.head_dim, config.qk_norm, config.eps)
        self.layers = nn.ModuleList(
            Block(config.width, heads, config.hidden, config.eps, ops) for _ in range(config.layers)
        )
        self.norm = ops.RMSNorm(config.width, eps=config.eps)

    rotate = staticmethod(rotate_halves)

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        """The rows of `prompt`, then the negative rows that guidance leads away from."""
        self.check(prompt)
        if prompt.negative is None:
            raise UserError("prompt: it was made for another model; connect this model to Text Prompt.")
        return prompt.stack(prompt.negative)

    def check(self, prompt: Prompt) -> None:
        """Raise UserError for another model's prompt: a class, a text encoder's features, or foreign token ids."""
        if prompt.tokens.is_floating_point():
            raise UserError("prompt: it was made for a model with a text encoder; connect this model to Text Prompt.")
        if prompt.length < 2:
            raise UserError("prompt: this model draws from texts; connect a Text Prompt.")
        if (largest := int(prompt.tokens.max())) >= self.config.vocabulary:
            raise UserError(
                f"prompt: it has token {largest}, but this model has {self.config.vocabulary} tokens; make it with the "
                "model's own tokenizer."
            )

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        """Logits B V of the first image token; writes the prompt's slots.

        Equal rows, such as the unconditional rows of prompts of equal length, are computed once.
        """
        self.check(prompt)
        unique, row = prompt.unique()
        index = torch.arange(prompt.length, device=row.device)
        weight = (index >= prompt.pad[:, None]).float()
        table = self.rope_table(index, unique.pad, self.grid)
        x = self.embed_tokens(unique.tokens).to(self.dtype)
        bias = torch.zeros(unique.attention_mask().shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~unique.attention_mask(), float("-inf"))[:, None]
        for layer, block in enumerate(self.layers):

            def attend_prompt(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write_prompt(layer, k[row], v[row], weight)
                return attend(q, k, v, bias)

            x = block(x, lambda t: rotate_halves(t, table), attend_prompt)
        return self.head(self.norm(x[:, -1])).float()[row]

    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int, columns: int) -> Tensor:
        """Rotate the rotated queries ... T D to `lines` lines further down and `columns` to the right."""
        offset = torch.full((1,), lines * grid.stride + columns, device=queries.device)
        return rotate_halves(queries, rope_1d(offset, self.config.head_dim, self.config.rope_base))

    def forward(self, prompt: Prompt, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of every image token in one pass without a cache: the reference for tests.

        tokens   int64 B N, end-of-line tokens included; the logits of token n depend on tokens before n
        visible  bool L B H T+N T+N, which keys the queries of each key head see; None: causal, with padding hidden
        Returns B T+N V; the logits of image token n are at T + n - 1.
        """
        x = torch.cat([self.embed_tokens(prompt.tokens), self.embed_codes(tokens)], 1)
        return self.head(self.hidden(x, prompt.pad, visible))

    def hidden(self, x: Tensor, pad: Tensor, visible: Tensor | None = None) -> Tensor:
        """Hidden states B N W of embedded tokens B N W, of which the first `pad` B are padding, without a cache.

        visible  as in `forward`
        """
        x, count = x.to(self.dtype), x.shape[1]
        table = self.rope_table(torch.arange(count, device=x.device), pad, self.grid)
        masks = [causal_mask(pad, count)[:, None]] * len(self.layers) if visible is None else list(visible)
        for block, mask in zip(self.layers, masks, strict=True):

            def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
                k, v = (x.repeat_interleave(self.config.group, 1) for x in (k, v))
                mask = mask if mask.shape[1] == 1 else mask.repeat_interleave(self.config.group, 1)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, lambda t: rotate_halves(t, table), attend_all)
        return self.norm(x)

    def rope_table(self, index: Tensor, pad: Tensor, grid: Grid) -> Tensor:
        """RoPE table of the tokens at `index` T or B T, for rows with `pad` B padding tokens: B 1 T 2 D."""
        position = (index - pad[:, None]).clamp(min=0)
        return rope_1d(position, self.config.head_dim, self.config.rope_base)[:, None]

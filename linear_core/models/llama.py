"""A Llama that draws: a prompt of text tokens, then an image's codes in raster lines, all with 1-D RoPE.

What Janus, Lumina-mGPT and their kin share. A model of this kind says how a code becomes an embedding and how a hidden
state becomes logits over codes (`embed_codes`, `head`); the rest is here. Inside, the key names are LlamaGen's, whose
blocks it is built from; where a file's names differ, its family says which goes where (`linear_core/families`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.line_cache import LineCache
from ..errors import UserError
from ..grid import Grid
from ..plan import CacheShape
from ..prompts import Prompt
from .blocks import Block, Ops, rope_1d, rotate_halves
from .raster import Raster


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes. `codes` an image is drawn from, `vocabulary` of its prompt; `qk_norm`: Chameleon's LayerNorm per head."""

    layers: int
    width: int
    heads: int
    hidden: int
    codes: int
    vocabulary: int
    eps: float = 1e-6
    rope_base: float = 10000.0
    qk_norm: bool = False

    classes = 0  # these draw texts

    @property
    def head_dim(self) -> int:
        """Numbers a head."""
        return self.width // self.heads

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """A slot for every place of the prompt."""
        return CacheShape(self.layers, self.heads, self.head_dim, prompt, bytes_per_element)


class Llama(Raster):
    """What every model of this kind does. A token's position is its index less its row's padding.

    Models add `embed_codes` and `head`; what guidance leads away from comes with the prompt.
    """

    def __init__(self, config: LlamaConfig, grid: Grid, ops: Ops = nn):
        super().__init__(config, grid)
        self.embed_tokens = ops.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(
            Block(config.width, config.heads, config.hidden, config.eps, ops, config.qk_norm)
            for _ in range(config.layers)
        )
        self.norm = ops.RMSNorm(config.width, eps=config.eps)

    rotate = staticmethod(rotate_halves)

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        """The rows of `prompt`, then what they are to be guided from."""
        self.check(prompt)
        if prompt.negative is None:
            raise UserError("prompt: it was not made for this model; connect the model to Text Prompt.")
        return prompt.stack(prompt.negative)

    def check(self, prompt: Prompt) -> None:
        """Refuse what another model's prompt is: a class, another encoder's features, another tokenizer's ids."""
        if prompt.tokens.is_floating_point():
            raise UserError("prompt: it is for a model with a text encoder; connect this model to Text Prompt.")
        if prompt.length < 2:
            raise UserError("prompt: this model draws what a text says; connect a Text Prompt.")
        if (largest := int(prompt.tokens.max())) >= self.config.vocabulary:
            raise UserError(
                f"prompt: it has a token {largest}, and this model knows {self.config.vocabulary}; make it with this "
                "model's own tokenizer."
            )

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        """Logits B V of the first image token; the prompt's slots are written.

        Rows that are alike, such as the unconditional ones of prompts of equal length, are computed once.
        """
        self.check(prompt)
        once, row = prompt.unique()
        place = torch.arange(prompt.length, device=row.device)
        weight = (place >= prompt.pad[:, None]).float()
        table = self.rope_table(place, once.pad, self.grid)
        x = self.embed_tokens(once.tokens).to(self.dtype)
        bias = torch.zeros(once.visible().shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~once.visible(), float("-inf"))[:, None]
        for layer, block in enumerate(self.layers):

            def attend_prompt(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write_prompt(layer, k[row], v[row], weight)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

            x = block(x, lambda t: rotate_halves(t, table), attend_prompt)
        return self.head(self.norm(x[:, -1])).float()[row]

    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int) -> Tensor:
        """Rotated queries ... T D as they would be `lines` lines further down, in the same column."""
        place = torch.full((1,), lines * grid.stride, device=queries.device)
        return rotate_halves(queries, rope_1d(place, self.config.head_dim, self.config.rope_base))

    def forward(self, prompt: Prompt, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of every image token in one uncached pass: the oracle of the tests.

        tokens   int64 B N, end-of-line tokens included; the logits of token n depend on tokens before n
        visible  bool L B H T+N T+N, which key each query sees; None: causal, padding hidden
        Returns B T+N V; the logits of image token n are at T + n - 1.
        """
        count = prompt.length + tokens.shape[1]
        table = self.rope_table(torch.arange(count, device=tokens.device), prompt.pad, self.grid)
        x = torch.cat([self.embed_tokens(prompt.tokens), self.embed_codes(tokens)], 1).to(self.dtype)
        masks = [prompt.visible(count)[:, None]] * len(self.layers) if visible is None else list(visible)
        for block, mask in zip(self.layers, masks, strict=True):

            def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, lambda t: rotate_halves(t, table), attend_all)
        return self.head(self.norm(x))

    def rope_table(self, index: Tensor, pad: Tensor, grid: Grid) -> Tensor:
        """The rotary table of the tokens at `index` T of rows with `pad` B empty places: B 1 T 2 D, for all heads."""
        position = (index - pad[:, None]).clamp(min=0)
        return rope_1d(position, self.config.head_dim, self.config.rope_base)[:, None]

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

from ..attention import attend
from ..blocks import Block, Ops, rope_1d, turn_halves
from ..cache import LineCache
from ..errors import UserError
from ..grid import Grid
from ..plan import CacheShape
from ..prompts import Prompt


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
    def dim(self) -> int:
        """Numbers a head."""
        return self.width // self.heads

    def cache_shape(self, prompt: int, bytes_per_number: int) -> CacheShape:
        """A slot for every place of the prompt."""
        return CacheShape(self.layers, self.heads, self.dim, prompt, bytes_per_number)


class Llama(nn.Module):
    """What every model of this kind does. A token's position is its index less its row's padding.

    Models add what they embed codes with and `head`; what guidance leads away from comes with the prompt.
    """

    def __init__(self, config: LlamaConfig, grid: Grid, ops: Ops = nn):
        super().__init__()
        self.config, self.grid = config, grid
        self.embed_tokens = ops.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(
            Block(config.width, config.heads, config.hidden, config.eps, ops, config.qk_norm)
            for _ in range(config.layers)
        )
        self.norm = ops.RMSNorm(config.width, eps=config.eps)
        # A host whose layers cast, and move their weights as they are needed, says what and where it computes.
        self.compute_dtype: torch.dtype | None = None
        self.compute_device: torch.device | None = None

    # -- what a model says --------------------------------------------------------------------------------------------

    def embed_codes(self, tokens: Tensor) -> Tensor:
        """Codes, and end-of-line tokens where the grid has them, int64 ... -> ... W."""
        raise NotImplementedError

    def head(self, hidden: Tensor) -> Tensor:
        """Hidden states ... W -> logits of the codes ... V."""
        raise NotImplementedError

    # -- what the loop asks -------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embed_tokens.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.compute_device or self.embed_tokens.weight.device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    @property
    def codes(self) -> int:
        return self.config.codes

    def cache_shape(self, prompt: int) -> CacheShape:
        return self.config.cache_shape(prompt, self.dtype.itemsize)

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
        alike = torch.cat([prompt.pad[:, None], prompt.tokens], 1)
        distinct, row = alike.unique(dim=0, return_inverse=True)
        once = Prompt(distinct[:, 1:], distinct[:, 0])
        place = torch.arange(prompt.length, device=row.device)
        weight = (place >= prompt.pad[:, None]).float()
        table = self._table(place, once.pad)
        x = self.embed_tokens(once.tokens).to(self.dtype)
        bias = torch.zeros(once.visible().shape, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill(~once.visible(), float("-inf"))[:, None]
        for layer, block in enumerate(self.layers):

            def attend_prompt(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write_prompt(layer, k[row], v[row], weight)
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

            x = block(x, lambda t: turn_halves(t, table), attend_prompt)
        return self.head(self.norm(x[:, -1])).float()[row]

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        """Feed the token at `index` of each row and return the logits of the next.

        token int64 B; index, column int64 with one element; pad int64 B, empty places before each row's prompt.
        """
        table = self._table(index, pad)
        x = self.embed_codes(token[:, None]).to(self.dtype)
        cache.advance(index, column)
        for layer, block in enumerate(self.layers):

            def attend_cache(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                cache.write(layer, column, k, v, q)
                return attend(q, *cache.read(layer))

            x = block(x, lambda t: turn_halves(t, table), attend_cache)
        return self.head(self.norm(x[:, -1])).float()

    def feed(
        self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache, every: bool = False
    ) -> Tensor:
        """`step` for T tokens of one line at once: tokens B T, index and columns T.

        Returns the logits B V after the last, or with `every` B T V, those after each.
        """
        table = self._table(index, pad)
        x = self.embed_codes(tokens).to(self.dtype)
        for layer, block in enumerate(self.layers):

            def attend_line(q: Tensor, k: Tensor, v: Tensor, layer: int = layer) -> Tensor:
                return attend(q, *cache.feed(layer, columns, k, v, q))

            x = block(x, lambda t: turn_halves(t, table), attend_line)
        cache.advance(index, columns)
        return self.head(self.norm(x if every else x[:, -1])).float()

    def turn_ahead(self, grid: Grid, queries: Tensor, lines: int) -> Tensor:
        """Rotated queries ... T D as they would be `lines` lines further down, in the same column."""
        place = torch.tensor([lines * grid.stride], device=queries.device)
        return turn_halves(queries, rope_1d(place, self.config.dim, self.config.rope_base))

    def forward(self, prompt: Prompt, tokens: Tensor, visible: Tensor | None = None) -> Tensor:
        """Logits of every image token in one uncached pass: the oracle of the tests.

        tokens   int64 B N, end-of-line tokens included; the logits of token n depend on tokens before n
        visible  bool L B H T+N T+N, which key each query sees; None: causal, padding hidden
        Returns B T+N V; the logits of image token n are at T + n - 1.
        """
        count = prompt.length + tokens.shape[1]
        table = self._table(torch.arange(count, device=tokens.device), prompt.pad)
        x = torch.cat([self.embed_tokens(prompt.tokens), self.embed_codes(tokens)], 1).to(self.dtype)
        masks = [prompt.visible(count)[:, None]] * len(self.layers) if visible is None else list(visible)
        for block, mask in zip(self.layers, masks, strict=True):

            def attend_all(q: Tensor, k: Tensor, v: Tensor, mask: Tensor = mask) -> Tensor:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

            x = block(x, lambda t: turn_halves(t, table), attend_all)
        return self.head(self.norm(x))

    def _table(self, index: Tensor, pad: Tensor) -> Tensor:
        """The rotary table of the tokens at `index` T of rows with `pad` B empty places: B 1 T D/2 2, for all heads."""
        position = (index - pad[:, None]).clamp(min=0)
        return rope_1d(position, self.config.dim, self.config.rope_base)[:, None]

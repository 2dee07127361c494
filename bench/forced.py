"""Teacher forcing: a cache's logits for existing pictures, compared with the full cache's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.attention import attention_weights
from linear_core.cache.line_cache import LineCache
from linear_core.grid import Grid
from linear_core.loop.forced import forced_lines
from linear_core.loop.generate import Decoder
from linear_core.plan import CachePlan

FULL = CachePlan(policy="full")


def forced_logits(
    decoder: Decoder,
    prompt: Any,
    codes: Tensor,
    plan: CachePlan,
    observe: Callable[[int, LineCache], None] = lambda row, cache: None,
    reads: frozenset[str] = frozenset(),
) -> Tensor:
    """All lines of `forced_lines`: float32 B rows*cols V."""
    return torch.cat(list(forced_lines(decoder, prompt, codes, plan, observe, reads)), 1)


@dataclass(frozen=True)
class Reference:
    """The full cache's results for a few pictures.

    log_probs  float32 B N V
    attention  for each line, float32 L B H tokens: attention of its queries to each image token, mean over queries
    """

    log_probs: Tensor
    attention: list[Tensor]

    @property
    def nbytes(self) -> int:
        return self.log_probs.nbytes + sum(a.nbytes for a in self.attention)


def reference(decoder: Decoder, prompt: Any, codes: Tensor) -> Reference:
    """Run `codes` B rows cols through the full cache."""
    attention: list[Tensor] = []

    def observe(row: int, cache: LineCache) -> None:
        seen = []
        for layer, queries in enumerate(cache.queries):
            keys, _, bias = cache.read(layer)
            index = cache.index[layer, ..., : cache.extent]
            seen.append(attention_weights(queries, keys, bias, index, cache.grid.index(row)).mean(2))
        image = torch.stack(seen)[..., cache.shape.prompt :]  # a full cache is in order
        attention.append(F.pad(image, (0, cache.grid.tokens - image.shape[-1])))

    logits = forced_logits(decoder, prompt, codes, FULL, observe, frozenset({"queries"}))
    return Reference(logits.log_softmax(-1), attention)


@dataclass(frozen=True)
class Drift:
    """How far a cache's predictions are from the full cache's; float64 B each, except `tokens`.

    kl      Kullback-Leibler divergence of the full cache's distribution from the plan's, nats per token
    dnll    increase of the pictures' negative log-likelihood, nats per token
    lost    share of the full cache's attention that goes to image tokens without a slot of their own while a line is
            fed: mean over lines, layers and heads. Folding loses as much, but makes up for it.
    tokens  image tokens held per head between two lines: mean over layers and heads, maximum over lines
    """

    kl: Tensor
    dnll: Tensor
    lost: Tensor
    tokens: float


def drift(decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, full: Reference) -> Drift:
    """Run `codes` B rows cols through a cache with this plan, and compare with `full`."""
    lost, held = [], []

    def observe(row: int, cache: LineCache) -> None:
        present = tokens_held(cache.index, cache.grid)
        lost.append((full.attention[row] * ~present).sum(-1).mean((0, 2)))
        if row:
            held.append(float(present.sum(-1).float().mean()) - cache.grid.stride)  # without the line itself

    log_probs = forced_logits(decoder, prompt, codes, plan, observe).log_softmax(-1)
    kl = (full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1)
    target = codes.flatten(1)[..., None].to(log_probs.device)
    dnll = (full.log_probs - log_probs).gather(-1, target)[..., 0]
    return Drift(kl.double().mean(1).cpu(), dnll.double().mean(1).cpu(), torch.stack(lost).double().mean(0).cpu(),
                 max(held, default=0.0))  # fmt: skip


def tokens_held(index: Tensor, grid: Grid) -> Tensor:
    """Which image tokens have a slot: index L B H S -> bool L B H tokens."""
    cell = (index.long() - grid.prompt).clamp(min=-1) + 1  # cell 0 collects the prompt and empty slots
    held = torch.zeros(*index.shape[:-1], grid.tokens + 1, dtype=torch.bool, device=index.device)
    return held.scatter_(-1, cell, True)[..., 1:]

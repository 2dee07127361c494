"""Teacher forcing: what a cache makes of pictures that are there already, beside the full cache.

Lines are fed whole (`Decoder.feed`), which gives every token exactly what it would have seen token by token, in a
fraction of the time. Nothing is drawn, so every policy sees the same tokens and differences are the cache's alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache.attention import attention_weights
from linear_core.cache.line_cache import LineCache
from linear_core.grid import Grid
from linear_core.loop.generate import Decoder, end_line
from linear_core.plan import CachePlan
from linear_core.policies import get_policy

FULL = CachePlan(policy="full")


@torch.inference_mode()
def forced_logits(
    decoder: Decoder,
    prompt: Any,
    codes: Tensor,
    plan: CachePlan,
    look: Callable[[int, LineCache], None] = lambda row, cache: None,
    reads: frozenset[str] = frozenset(),
) -> Tensor:
    """Logits with which each code of `codes` B rows cols is expected under the plan: float32 B rows*cols V.

    `look` is shown the cache after each line, before anything is let go. `reads` is what it needs to find there. What
    a line's end token would have been expected with is left out, as nobody draws it.
    """
    grid = (prompt.grid or decoder.grid).after(prompt.length)
    plan.check(grid)
    policy = get_policy(plan.policy)
    reads = reads | policy.reads | ({"ahead"} if plan.release == "fold" else set())
    shape = decoder.cache_shape(prompt.length)
    cache = LineCache(shape, prompt.rows, grid, plan, dtype=decoder.dtype, device=decoder.device, reads=reads)
    rotate = partial(decoder.rotate_ahead, grid)
    columns = torch.arange(grid.stride, device=decoder.device)
    lines = codes.to(decoder.device)
    if grid.eol is not None:
        lines = F.pad(lines, (0, 1), value=grid.eol)
    logits = [decoder.prefill(prompt, cache)[:, None]]
    cache.extend()
    for row in range(grid.rows):
        logits.append(
            decoder.feed(lines[:, row], grid.index(row) + columns, prompt.pad, columns, cache, all_logits=True)
        )
        look(row, cache)
        if row + 1 < grid.rows:
            end_line(cache, policy, row, rotate)
    expected = torch.cat(logits, 1)[:, : grid.tokens]  # those after token n - 1 are of token n
    return expected.unflatten(1, (grid.rows, grid.stride))[:, :, : grid.cols].flatten(1, 2)


@dataclass(frozen=True)
class Reference:
    """The full cache's answers for a few pictures.

    log_probs  float32 B N V
    attention  for each line, float32 L B H tokens: attention of the line's queries to each image token, their mean
    """

    log_probs: Tensor
    attention: list[Tensor]

    @property
    def nbytes(self) -> int:
        return self.log_probs.nbytes + sum(a.nbytes for a in self.attention)


def reference(decoder: Decoder, prompt: Any, codes: Tensor) -> Reference:
    attention: list[Tensor] = []

    def look(row: int, cache: LineCache) -> None:
        seen = []
        for layer, queries in enumerate(cache.queries):
            keys, _, bias = cache.read(layer)
            index = cache.index[layer, ..., : cache.extent]
            seen.append(attention_weights(queries, keys, bias, index, cache.grid.index(row)).mean(2))
        image = torch.stack(seen)[..., cache.shape.prompt :]  # a full cache lies in order
        attention.append(F.pad(image, (0, cache.grid.tokens - image.shape[-1])))

    logits = forced_logits(decoder, prompt, codes, FULL, look, frozenset({"queries"}))
    return Reference(logits.log_softmax(-1), attention)


@dataclass(frozen=True)
class Drift:
    """How far a cache takes the model from what it says with the full one; float64 B each but `tokens`.

    kl      Kullback-Leibler divergence of the full cache's distribution from the plan's, nats a token
    dnll    rise of the pictures' negative log-likelihood, nats a token
    lost    share of the full cache's attention that goes to image tokens that are no longer in a slot of their own
            while a line is fed: mean over lines, layers and heads. Folding loses as much and makes up for it.
    tokens  image tokens a head holds when a line has ended and the next begins: mean over layers and heads, at most
    """

    kl: Tensor
    dnll: Tensor
    lost: Tensor
    tokens: float


def drift(decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, full: Reference) -> Drift:
    lost, held = [], []

    def look(row: int, cache: LineCache) -> None:
        there = tokens_held(cache.index, cache.grid)
        lost.append((full.attention[row] * ~there).sum(-1).mean((0, 2)))
        if row:
            held.append(float(there.sum(-1).float().mean()) - cache.grid.stride)  # what was there before the line

    log_probs = forced_logits(decoder, prompt, codes, plan, look).log_softmax(-1)
    kl = (full.log_probs.exp() * (full.log_probs - log_probs)).sum(-1)
    target = codes.flatten(1)[..., None].to(log_probs.device)
    dnll = (full.log_probs - log_probs).gather(-1, target)[..., 0]
    return Drift(kl.double().mean(1).cpu(), dnll.double().mean(1).cpu(), torch.stack(lost).double().mean(0).cpu(),
                 max(held, default=0.0))  # fmt: skip


def tokens_held(index: Tensor, grid: Grid) -> Tensor:
    """Which image tokens have a slot: index L B H S -> bool L B H tokens."""
    place = (index.long() - grid.prompt).clamp(min=-1) + 1  # 0 collects the prompt and empty slots
    held = torch.zeros(*index.shape[:-1], grid.tokens + 1, dtype=torch.bool, device=index.device)
    return held.scatter_(-1, place, True)[..., 1:]

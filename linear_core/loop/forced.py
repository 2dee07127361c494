"""Teacher forcing: what a cache expects of pictures that are there already.

Lines are fed whole (`Decoder.feed`), which gives every token exactly what it would have seen token by token, in a
fraction of the time. Nothing is drawn, so every cache sees the same tokens and differences are the cache's alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.line_cache import LineCache
from ..plan import CachePlan, SamplePlan
from ..policies import get_policy
from .generate import Decoder, end_line, scores


@torch.inference_mode()
def forced_lines(
    decoder: Decoder,
    prompt: Any,
    codes: Tensor,
    plan: CachePlan,
    look: Callable[[int, LineCache], None] = lambda row, cache: None,
    reads: frozenset[str] = frozenset(),
) -> Iterator[Tensor]:
    """For each line of `codes` B rows cols, the logits that its codes are drawn from under the plan: float32 B cols V.

    `look` is shown the cache after each line, before anything is evicted. `reads` is what it needs to find there. What
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
    first = decoder.prefill(prompt, cache)[:, None]  # those after token n - 1 are of token n
    cache.extend()
    for row in range(grid.rows):
        others = decoder.feed(lines[:, row], grid.index(row) + columns, prompt.pad, columns, cache, all_logits=True)
        yield torch.cat([first, others], 1)[:, : grid.cols]
        first = others[:, -1:]
        look(row, cache)
        if row + 1 < grid.rows:
            end_line(cache, policy, row, rotate)


@torch.inference_mode()
def shared_probability(
    decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, sample: SamplePlan
) -> Iterator[Tensor]:
    """For each line of `codes`, how much of every code's probability the plan shares with the full cache: B cols.

    1: what is drawn next has the same probabilities under both, given the same codes so far; 0: no code is possible
    under both. That is 1 minus the total variation distance of the distributions that `sample` draws from.
    """
    images = prompt.rows
    prompt = prompt.to(decoder.device)
    rows = decoder.with_unconditional(prompt) if sample.guided else prompt
    fed, stride = codes.repeat(rows.rows // images, 1, 1), (prompt.grid or decoder.grid).stride
    both = (forced_lines(decoder, rows, fed, each) for each in (CachePlan("full"), plan))
    for row, logits in enumerate(zip(*both, strict=True)):
        shared = []
        for column in range(codes.shape[-1]):
            given = (scores(each[:, column], row * stride + column, images, sample) for each in logits)
            full, few = (probabilities(each, sample.temperature) for each in given)
            shared.append(torch.minimum(full, few).sum(-1))
        yield torch.stack(shared, 1)


def probabilities(scores: Tensor, temperature: float) -> Tensor:
    """What `sample_codes` draws each code with: float32 B V."""
    if temperature == 0:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()
    return (scores.float() / temperature).softmax(-1)

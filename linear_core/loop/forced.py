"""Teacher forcing: the logits that a cache gives for existing pictures.

Lines are fed whole (`Decoder.feed`), so that every token sees exactly what it would have seen token by token, in a
fraction of the time. Nothing is sampled: every cache sees the same tokens, and differences come from the cache alone.
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
    observe: Callable[[int, LineCache], None] = lambda row, cache: None,
    reads: frozenset[str] = frozenset(),
) -> Iterator[Tensor]:
    """For each line of `codes` B rows cols, the logits of its codes under the plan: float32 B cols V.

    observe  called with the row and the cache after each line, before anything is evicted
    reads    what `observe` needs to find in the cache

    The logits of end-of-line tokens are left out, because those tokens are never sampled.
    """
    grid = (prompt.grid or decoder.grid).after(prompt.length)
    shape = decoder.cache_shape(prompt.length)
    plan = plan.resolve(shape, grid, prompt.rows)
    plan.check(grid)
    policy = get_policy(plan.policy)
    reads = reads | policy.reads | ({"ahead"} if plan.release == "fold" else set())
    cache = LineCache(shape, prompt.rows, grid, plan, dtype=decoder.dtype, device=decoder.device, reads=reads)
    rotate = partial(decoder.rotate_ahead, grid)
    columns = torch.arange(grid.stride, device=decoder.device)
    lines = codes.to(decoder.device)
    if grid.eol is not None:
        lines = F.pad(lines, (0, 1), value=grid.eol)
    first = decoder.prefill(prompt, cache)[:, None]  # the logits after token n - 1 are those of token n
    cache.extend()
    for row in range(grid.rows):
        logits = decoder.feed(lines[:, row], grid.index(row) + columns, prompt.pad, columns, cache, all_logits=True)
        yield torch.cat([first, logits], 1)[:, : grid.cols]
        first = logits[:, -1:]
        observe(row, cache)
        if row + 1 < grid.rows:
            end_line(cache, policy, row, rotate)


@torch.inference_mode()
def shared_probability(
    decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, sample: SamplePlan
) -> Iterator[Tensor]:
    """For each line of `codes`, how much of each code's distribution the plan shares with the full cache: float32 B
    cols.

    1: given the same codes so far, the next code has the same distribution under both; 0: no code is possible under
    both. Equals 1 minus the total variation distance of the distributions that `sample` draws from.
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
    """The probabilities with which `sample_codes` draws: float32 B V."""
    if temperature == 0:
        return F.one_hot(scores.argmax(-1), scores.shape[-1]).float()
    return (scores.float() / temperature).softmax(-1)

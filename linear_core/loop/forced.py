"""Teacher forcing: the logits that a cache gives for existing pictures.

Lines are fed whole (`Decoder.feed`), so that every token sees exactly what it would have seen token by token, in a
fraction of the time. Nothing is sampled: every cache sees the same tokens, and differences come from the cache alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.line_cache import LineCache
from ..plan import CachePlan, SamplePlan
from ..policies import get_policy
from .generate import Decoder, room_after, scores
from .memory import split_batch
from .redraw import following
from .sampling import apply_guidance


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
    make_room = partial(room_after, cache, policy, partial(decoder.rotate_ahead, grid))
    lines = codes.to(decoder.device)
    if grid.eol is not None:
        lines = F.pad(lines, (0, 1), value=grid.eol)
    first = decoder.prefill(prompt, cache)[:, None]  # the logits after token n - 1 are those of token n
    cache.extend()
    for row in range(grid.rows):
        found = [first]
        for start, end in pairwise([0, *plan.ends(grid, row)]):
            if start:
                make_room(row, start)
            columns = torch.arange(start, end, device=decoder.device)
            tokens, index = lines[:, row, start:end], grid.index(row) + columns
            found.append(decoder.feed(tokens, index, prompt.pad, columns, cache, all_logits=True))
        yield torch.cat(found, 1)[:, : grid.cols]
        first = found[-1][:, -1:]
        observe(row, cache)
        if row + 1 < grid.rows:
            make_room(row, grid.stride)


@torch.inference_mode()
def log_likelihood(
    decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, sample: SamplePlan, at_once: int = 8
) -> Tensor:
    """ln of the probability of each code of existing pictures, B rows cols, given the prompt and the codes before it:
    float32 B rows cols, on the CPU.

    With the guidance of `sample`, over all codes and at temperature 1: codes that exist already may be none that top-k
    or top-p would draw. `at_once` pictures are computed together.
    """

    def judge(logits: Tensor, images: int, number: int) -> Tensor:
        found = logits[:images].clone()
        guided = [n for n in range(found.shape[1]) if sample.guides(number + n)]
        if guided:
            found[:, guided] = apply_guidance(logits[:, guided], images, sample.guidance)
        return found.log_softmax(-1)

    return _judged(decoder, prompt, codes, plan, judge, sample.guided, at_once)


def following_likelihood(
    decoder: Decoder, prompt: Any, codes: Tensor, kept: Tensor, plan: CachePlan, sample: SamplePlan, at_once: int = 8
) -> Tensor:
    """What fills of a region are chosen by: ln of the probability of the kept codes behind it, float32 B, on the CPU.

    kept  B rows cols, as for `generate`; `codes` are the finished pictures
    """
    found = log_likelihood(decoder, prompt, codes, plan, sample, at_once)
    return found.masked_fill(~following(kept), 0.0).flatten(1).sum(1)


@torch.inference_mode()
def prompt_match(decoder: Decoder, prompt: Any, codes: Tensor, plan: CachePlan, at_once: int = 8) -> Tensor:
    """How much likelier the prompt makes each code of existing pictures, in ln, than no prompt does: as
    `log_likelihood`, which is high for plain pictures of anything.
    """

    def judge(logits: Tensor, images: int, number: int) -> Tensor:
        return logits[:images].log_softmax(-1) - logits[images:].log_softmax(-1)

    return _judged(decoder, prompt, codes, plan, judge, True, at_once)


def _judged(
    decoder: Decoder,
    prompt: Any,
    codes: Tensor,
    plan: CachePlan,
    judge: Callable[[Tensor, int, int], Tensor],
    guided: bool,
    at_once: int,
) -> Tensor:
    """What `judge` says of each code, from the logits B cols V of a line's sequences and its first token's number."""
    stride, parts = (prompt.grid or decoder.grid).stride, []
    for part in split_batch(prompt.rows, at_once):
        rows, own = prompt.select(part).to(decoder.device), codes[list(part)]
        sequences = decoder.with_unconditional(rows) if guided else rows
        lines = forced_lines(decoder, sequences, own.repeat(sequences.rows // len(part), 1, 1), plan)
        found = []
        for row, logits in enumerate(lines):
            scores = judge(logits, len(part), row * stride)
            found.append(scores.gather(-1, own[:, row, :, None].to(scores.device))[..., 0].cpu())
        parts.append(torch.stack(found, 1))
    return torch.cat(parts)


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

"""The loop: prompt in, one Line per row out. The line is the clock for everything that is not a token."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import LineCache
from .errors import UserError
from .events import Line
from .grid import Grid
from .plan import CachePlan, CacheShape, SamplePlan
from .policies import Policy, choose, get_policy
from .sampling import Noise, guide, pick, restrict


class Decoder(Protocol):
    """What a model's adapter owes."""

    grid: Grid
    codes: int
    dtype: torch.dtype
    device: torch.device

    def cache_shape(self) -> CacheShape: ...
    def with_unconditional(self, prompt: Any) -> Any: ...
    def prefill(self, prompt: Any, cache: LineCache) -> Tensor: ...
    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor: ...


Step = Callable[[Tensor, Tensor, Tensor, Tensor, LineCache], Tensor]


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Any,
    plan: CachePlan,
    sample: SamplePlan,
    *,
    step: Step | None = None,
) -> Iterator[Line]:
    """Draw one image for each row of `prompt`, yielding each row of tokens as it is finished.

    `plan` says what the cache keeps, `sample` how tokens are drawn. `step` replaces the decoder's own (compiled,
    captured). Settings that do not fit raise UserError before anything is allocated. Dropping the iterator frees all
    it holds.
    """
    grid = decoder.grid.after(prompt.length)
    policy = get_policy(plan.policy)
    plan.check(grid)
    images, device = prompt.rows, decoder.device
    if images < 1:
        raise UserError("prompt: it names no image; give at least one class or text.")
    prompt = prompt.to(device)
    rows = decoder.with_unconditional(prompt) if sample.guided else prompt
    cache = LineCache(
        decoder.cache_shape(), rows.rows, grid, plan, dtype=decoder.dtype, device=device, reads=policy.reads
    )
    step = step or decoder.step
    noise = Noise(sample.seed, images, decoder.codes, device)
    index = torch.arange(grid.prompt, grid.prompt + grid.tokens, device=device)
    columns = torch.arange(grid.stride, device=device)
    pad = rows.pad

    started = time.perf_counter()
    logits = decoder.prefill(rows, cache)
    cache.extend()
    for row in range(grid.rows):
        tokens = torch.empty(images, grid.cols, dtype=torch.int64, device=device)
        for column in range(grid.stride):
            number = row * grid.stride + column
            forced = grid.forced(column)
            if forced is None:
                scores = guide(logits, images, sample.guidance) if sample.guides(number) else logits[:images]
                scores = restrict(scores, sample.top_k, sample.top_p, sample.temperature)
                token = pick(scores, noise.exponential(number), sample.temperature)
                tokens[:, column] = token
            else:
                token = torch.full((images,), forced, dtype=torch.int64, device=device)
            if number + 1 == grid.tokens:
                break  # nothing is drawn after it
            if cache.rows > images and not sample.guides(number + 1):
                cache.keep_rows(images)
                pad = pad[:images]
            fed = token.repeat(cache.rows // images)
            logits = step(fed, index[number : number + 1], pad, columns[column : column + 1], cache)
        if row + 1 < grid.rows:
            _end_line(cache, policy, row)
        share = cache.share_held(images)
        held = round(float(share.sum()) / images, 3)
        tokens_now = tokens.cpu()  # the one point of a line at which the host waits for the device
        now = time.perf_counter()
        yield Line(row, grid.rows, tokens_now, share.cpu(), held, now - started, cache.nbytes)
        started = time.perf_counter()


def _end_line(cache: LineCache, policy: Policy, row: int) -> None:
    """Bring the cache back to its budget and decide where the next line is written."""
    if cache.full or cache.mass is not None:
        view = cache.view(row)
    if not cache.full:
        cache.extend()
        return
    plan = cache.plan
    scores = policy.score(view)
    stride = cache.grid.stride
    cache.release(
        choose(scores, view, stride, anchors=plan.anchors, recent=plan.recent, prompt_slots=cache.shape.prompt)
    )


class Run:
    """The lines of one run as they come, and what can be said of them together."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, line: Line) -> None:
        self.lines.append(line)

    @property
    def tokens(self) -> Tensor:
        """Codes so far: int64 B rows cols, on the CPU."""
        return torch.stack([line.tokens for line in self.lines], 1)

    @property
    def shares(self) -> Tensor:
        """What was held after each line: float32 B lines rows cols, share of layers and heads."""
        return torch.stack([line.share for line in self.lines], 1)

    @property
    def seconds(self) -> float:
        return sum(line.seconds for line in self.lines)

    @property
    def tokens_per_second(self) -> float:
        """Of all images together."""
        return self.tokens.numel() / max(self.seconds, 1e-9)

    @property
    def held(self) -> float:
        """Image tokens held per head when a line has ended and the next begins, at most."""
        return max((line.held for line in self.lines if line.row + 1 < line.rows), default=0.0)

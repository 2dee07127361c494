"""A batch that does not fit into memory: drawn in micro-batches, and in smaller ones if memory still runs out."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..events import Stage, Step
from ..plan import SamplePlan
from .generate import Run
from .memory import split_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """Images that are drawn together, once with each cache: input of `generate`, and its result.

    above  by cache: lines that exist already, codes B rows cols, or one image's for all; None: none. For models that
           draw in scales: the tokens of the first scales, B N; for masked ones: latents B Z h w with NaN in the gaps
    runs   by cache: lines drawn so far
    kept   codes of pictures that exist already, B rows cols, or one image's for all; see `generate`
    """

    prompt: Any
    sample: SamplePlan
    above: list[Tensor | None]
    runs: list[Run] = field(default_factory=list)
    kept: Tensor | None = None

    def codes(self, cache: int = 0) -> Tensor | None:
        """The lines so far, drawn or given: codes B rows cols."""
        given, run = self.above[cache], self.runs[cache]
        if run.latents is not None:
            return run.latents
        count = run.tokens.shape[1] if run.lines else 0
        return run.tokens if count > (0 if given is None else given.shape[1]) else given

    def split(self, at_once: int) -> list[MicroBatch]:
        """Split into micro-batches of at most `at_once` images, which start from the lines so far, except the last.

        Every image keeps its own seed, so its picture does not change.
        """
        above = [self.codes(cache) for cache in range(len(self.runs))]
        above = [
            codes if codes is None or not run.lines else _without_last(codes, run)
            for codes, run in zip(above, self.runs, strict=True)
        ]

        def select(given: Tensor | None, rows: range) -> Tensor | None:
            return given if given is None or len(given) == 1 else given[list(rows)]

        return [
            MicroBatch(
                self.prompt.select(rows),
                self.sample.select(rows),
                [select(given, rows) for given in above],
                [Run() for _ in above],
                select(self.kept, rows),
            )
            for rows in split_batch(self.prompt.rows, at_once)
        ]


class MicroBatches:
    """The micro-batches of a batch, to iterate over. Draw each within `watch`; afterwards `runs` covers the whole
    batch.

    If memory runs out, the rest of the batch is drawn in micro-batches of half the size. Nothing is lost: complete
    lines are fed, not drawn again. If memory runs out a second time, `watch` raises UserError, which ends with
    `advice`.
    """

    def __init__(
        self,
        prompt: Any,
        sample: SamplePlan,
        at_once: int,
        above: Tensor | None = None,
        *,
        caches: int = 1,
        kept: Tensor | None = None,
        advice: str,
    ):
        batch = MicroBatch(prompt, sample, [above] * caches, [Run() for _ in range(caches)], kept)
        self.done: list[MicroBatch] = []
        self.pending, self.halved_from, self.advice = batch.split(at_once), 0, advice

    def __iter__(self) -> Iterator[MicroBatch]:
        while self.pending:
            yield self.pending[0]

    def __len__(self) -> int:
        return len(self.done) + len(self.pending)

    @property
    def max_images(self) -> int:
        """Size of the largest micro-batch that was drawn."""
        return max(micro_batch.prompt.rows for micro_batch in self.done)

    @property
    def runs(self) -> list[Run]:
        """By cache, the whole batch as if drawn at once."""
        runs = [Run() for _ in self.done[0].runs]
        for run, parts in zip(runs, zip(*(micro_batch.runs for micro_batch in self.done), strict=True), strict=True):
            for line in merge_lines([part.lines for part in parts]):
                run.add(line)
        return runs

    @property
    def codes(self) -> list[Tensor]:
        """The first cache's lines so far: codes B rows cols of every micro-batch that has any."""
        parts = [micro_batch.codes() for micro_batch in [*self.done, *self.pending]]
        return [codes for codes in parts if codes is not None]

    @contextmanager
    def watch(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Draw `micro_batch` within. If memory runs out, it is split in halves, which are iterated over next."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold every tensor of the computation
        else:
            self.done.append(self.pending.pop(0))
            return
        gc.collect()
        images = micro_batch.prompt.rows
        if self.halved_from or images == 1:
            before = f"with {_pictures(self.halved_from)} at a time, and again " if self.halved_from else ""
            raise UserError(f"memory: it ran out {before}with {_pictures(images)} at a time; {self.advice}.") from None
        log.warning("LineAR: memory ran out with %d pictures at a time; going on with %d", images, images // 2)
        self.halved_from = images
        self.pending = [part for micro_batch in self.pending for part in micro_batch.split(images // 2)]


def _without_last(codes: Tensor, run: Run) -> Tensor:
    """The lines, scales or steps so far, but for the last of the picture: something has to be left to draw."""
    if run.latents is not None:
        last = run.lines[-1]
        if last.step + 1 < last.steps:
            return codes
        drawn = F.interpolate(last.drawn[:, None].float(), codes.shape[2:], mode="nearest").bool()
        return codes.masked_fill(drawn, float("nan"))
    if run.canvas is None:
        return codes[:, : run.lines[0].rows - 1]
    finished = len(run.lines) == run.lines[0].rows
    return codes[:, : codes.shape[1] - run.lines[-1].tokens.shape[1]] if finished else codes


def _pictures(images: int) -> str:
    return f"{images} pictures" if images > 1 else "one picture"


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out. Only GPUs have an exception type for it, so messages are read as well."""
    messages = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in messages)
    )


def merge_lines(parts: list[list[Any]]) -> list[Any]:
    """The lines, stages or steps of a batch drawn in micro-batches, as if drawn at once; seconds add up.

    `cache_bytes` are the maximum.
    """

    def merge(lines: tuple[Any, ...]) -> Any:
        if isinstance(lines[0], Step):
            return _merge_steps(lines)
        images = [len(line.tokens) for line in lines]
        stands = [line.stands for line in lines if line.stands is not None]
        if isinstance(lines[0], Stage):
            more: dict[str, Any] = {"canvas": torch.cat([line.canvas for line in lines])}
        else:
            more = {name: sum(getattr(line, name) for line in lines) / len(lines) for name in ("passes", "accepted")}
        return replace(
            lines[0],
            tokens=torch.cat([line.tokens for line in lines]),
            share=torch.cat([line.share for line in lines]),
            stands=torch.cat(stands) if stands else None,
            held=round(sum(line.held * n for line, n in zip(lines, images, strict=True)) / sum(images), 3),
            seconds=sum(line.seconds for line in lines),
            cache_bytes=max(line.cache_bytes for line in lines),
            **more,
        )

    if parts and parts[0] and isinstance(parts[0][0], Step):
        parts = _aligned(parts)
    return [merge(lines) for lines in zip(*parts, strict=True)]


def _merge_steps(steps: tuple[Step, ...]) -> Step:
    tensors = ("latents", "drawn", "age", "computed")
    more: dict[str, Any] = {name: torch.cat([getattr(step, name) for step in steps]) for name in tensors}
    more |= {name: sum(getattr(step, name) for step in steps) for name in ("seconds", "transformer", "head")}
    return replace(steps[0], cache_bytes=max(step.cache_bytes for step in steps), **more)


def _aligned(parts: list[list[Step]]) -> list[list[Step]]:
    """As many steps of each part. A part of which more is given begins later: until then it is as it was given."""
    first = min(part[0].step for part in parts)

    def before(step: Step, number: int) -> Step:
        """A step that a part did not take, since what it would have drawn was given."""
        nothing = torch.zeros_like(step.computed)
        drawn = F.interpolate(step.drawn[:, None].float(), step.latents.shape[2:], mode="nearest").bool()
        return replace(
            step, step=number, latents=step.latents.masked_fill(drawn, float("nan")), drawn=step.drawn & False,
            age=step.age * 0, computed=nothing, seconds=0.0, transformer=0.0, head=0.0,
        )  # fmt: skip

    return [[before(part[0], number) for number in range(first, part[0].step)] + part for part in parts]

"""A batch that is too large for the memory: drawn in parts, and in smaller ones where the memory runs out after all."""

from __future__ import annotations

import gc
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..events import Line
from ..plan import SamplePlan
from .generate import Run
from .memory import split_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroBatch:
    """Images that are drawn together, once with each cache: what to hand `generate`, and what came of it.

    above  by cache: lines that are there already, codes B rows cols, or one image's for all; None: none
    runs   by cache: the lines that are drawn, added as they come
    """

    prompt: Any
    sample: SamplePlan
    above: list[Tensor | None]
    runs: list[Run] = field(default_factory=list)

    def so_far(self, cache: int = 0) -> Tensor | None:
        """The lines there are, drawn or given: codes B rows cols."""
        given, run = self.above[cache], self.runs[cache]
        return run.tokens if len(run.lines) > (0 if given is None else given.shape[1]) else given

    def split(self, at_once: int) -> list[MicroBatch]:
        """In parts of at most `at_once` images, which begin with what was drawn of them so far, but for the last line.

        Every image keeps the seed that it has in the whole, so its picture is the same.
        """
        above = [self.so_far(cache) for cache in range(len(self.runs))]
        above = [
            codes if codes is None or not run.lines else codes[:, : run.lines[0].rows - 1]
            for codes, run in zip(above, self.runs, strict=True)
        ]

        def own(given: Tensor | None, rows: range) -> Tensor | None:
            return given if given is None or len(given) == 1 else given[list(rows)]

        return [
            MicroBatch(
                self.prompt.take(rows),
                replace(self.sample, seed=self.sample.seed + rows[0]),
                [own(given, rows) for given in above],
                [Run() for _ in above],
            )
            for rows in split_batch(self.prompt.rows, at_once)
        ]


class MicroBatches:
    """The parts of a batch, to iterate over. Each is drawn within `watch`, and `runs` is then all of the batch.

    Where the memory runs out the rest of the batch goes on in parts of half as many images. What was drawn is kept: the
    complete lines of the part are fed, not drawn again. That happens once; then `watch` raises UserError, which ends
    with `advice`.
    """

    def __init__(
        self,
        prompt: Any,
        sample: SamplePlan,
        at_once: int,
        above: Tensor | None = None,
        *,
        caches: int = 1,
        advice: str,
    ):
        whole = MicroBatch(prompt, sample, [above] * caches, [Run() for _ in range(caches)])
        self.done: list[MicroBatch] = []
        self.left, self.halved, self.advice = whole.split(at_once), 0, advice

    def __iter__(self) -> Iterator[MicroBatch]:
        while self.left:
            yield self.left[0]

    def __len__(self) -> int:
        return len(self.done) + len(self.left)

    @property
    def largest(self) -> int:
        """The most images that were drawn together."""
        return max(micro_batch.prompt.rows for micro_batch in self.done)

    @property
    def runs(self) -> list[Run]:
        """The whole batch by cache, as if drawn at once."""
        runs = [Run() for _ in self.done[0].runs]
        for run, parts in zip(runs, zip(*(micro_batch.runs for micro_batch in self.done), strict=True), strict=True):
            for line in merge_lines([part.lines for part in parts]):
                run.add(line)
        return runs

    @property
    def begun(self) -> list[Tensor]:
        """What there is of the first cache's pictures: codes B rows cols of each part, as far as it has come."""
        parts = [micro_batch.so_far() for micro_batch in [*self.done, *self.left]]
        return [codes for codes in parts if codes is not None]

    @contextmanager
    def watch(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Draw `wave` within; where the memory runs out it comes again, in halves."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold everything that was being computed
        else:
            self.done.append(self.left.pop(0))
            return
        gc.collect()
        images = micro_batch.prompt.rows
        if self.halved or images == 1:
            before = f"with {_pictures(self.halved)} at a time, and again " if self.halved else ""
            raise UserError(f"memory: it ran out {before}with {_pictures(images)} at a time; {self.advice}.") from None
        log.warning("LineAR: memory ran out with %d pictures at a time; going on with %d", images, images // 2)
        self.halved = images
        self.left = [part for micro_batch in self.left for part in micro_batch.split(images // 2)]


def _pictures(images: int) -> str:
    return f"{images} pictures" if images > 1 else "one picture"


def is_out_of_memory(error: Exception) -> bool:
    """Whether it says that there is no memory left; only on a GPU does that have a type of its own."""
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, torch.cuda.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in words)
    )


def merge_lines(parts: list[list[Line]]) -> list[Line]:
    """The lines of a batch that was drawn in parts: as if at once, but for the time, and the cache of the largest."""

    def one(lines: tuple[Line, ...]) -> Line:
        images = [len(line.tokens) for line in lines]
        stands = [line.stands for line in lines if line.stands is not None]
        return replace(
            lines[0],
            tokens=torch.cat([line.tokens for line in lines]),
            share=torch.cat([line.share for line in lines]),
            stands=torch.cat(stands) if stands else None,
            held=round(sum(line.held * n for line, n in zip(lines, images, strict=True)) / sum(images), 3),
            seconds=sum(line.seconds for line in lines),
            cache_bytes=max(line.cache_bytes for line in lines),
        )

    return [one(lines) for lines in zip(*parts, strict=True)]

"""Pictures of rows that are not finished yet. An approximation, and labelled so: only a full decode is the picture."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import UserError
from ..events import Line
from ..loop.micro_batches import is_out_of_memory
from ..tokenizers.tokenizer import VQTokenizer, to_pixels

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger(__name__)
EMPTY = 0.35  # grey of what is not drawn yet


class Preview:
    """Collects a run's lines and decodes the rows so far.

    A VQ decoder looks at the whole picture (group norms, attention), so rows shown early still change a little.
    """

    def __init__(self, tokenizer: VQTokenizer, rows: int):
        self.tokenizer, self.rows = tokenizer, rows
        self.lines: list[Tensor] = []

    def add(self, line: Line) -> None:
        self.lines.append(line.tokens)

    @property
    def tokens(self) -> Tensor:
        """Codes so far: int64 B rows cols."""
        return torch.stack(self.lines, 1)

    @torch.inference_mode()
    def pictures(self, images: int = 1) -> Tensor:
        """The first `images` pictures so far, what is missing in grey: float32 B H W 3 in 0..1, on the CPU."""
        codes = self.tokens[:images].to(self.tokenizer.device)
        done = to_pixels(self.tokenizer.decode(codes)).cpu()
        missing = (self.rows - len(self.lines)) * self.tokenizer.config.factor
        rest = torch.full((done.shape[0], missing, *done.shape[2:]), EMPTY)
        return torch.cat([done, rest], 1)


@torch.inference_mode()
def decode(tokenizer: VQTokenizer, tokens: Tensor, batch: int = 16) -> Tensor:
    """The pictures, each one full decode: codes int64 B rows cols -> float32 B H W 3 in 0..1, on the CPU.

    `batch` of them at a time; where the memory runs out, half as many. Raises UserError where one is too many.
    """
    done, left = [], tokens
    while len(left):
        pictures = _decoded(tokenizer, left[:batch])
        if pictures is not None:
            done.append(pictures)
            left = left[batch:]
        elif (batch := min(batch, len(left)) // 2) == 0:
            height, width = (n * tokenizer.config.factor for n in tokens.shape[1:])
            raise UserError(
                f"memory: it ran out decoding one picture of {width} x {height}; close what else takes memory."
            )
        else:
            log.warning("LineAR: memory ran out decoding; going on with %d pictures at a time", batch)
    return torch.cat(done)


def _decoded(tokenizer: VQTokenizer, codes: Tensor) -> Tensor | None:
    """None where the memory ran out; the error, and with it all that was computed, is gone then."""
    try:
        return to_pixels(tokenizer.decode(codes.to(tokenizer.device))).cpu()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


class PreviewWorker:
    """Makes preview pictures on a thread of its own. The sampler offers and never waits: an offer that comes too early,
    or while a picture is being made, is dropped.

    What a run of `rows` lines may spend on pictures is spread over all of it. `paint` makes a job a picture, `show`
    gets it with the number of lines; `stop` is what the host raises in either when the user pressed Stop.
    """

    pause = 0.1  # seconds between pictures, at least
    allowance = 0.4  # seconds that the pictures of any run may take; a short one is to be seen as well
    share = 0.005  # of the run's time that they may take beyond that

    def __init__(
        self,
        paint: Callable[[Any], Image.Image],
        show: Callable[[Image.Image, int], None],
        rows: int,
        stop: type[BaseException] | tuple[()] = (),
    ):
        self.paint, self.show, self.rows, self.stop = paint, show, rows, stop
        self.jobs: queue.Queue[tuple[Any, int] | None] = queue.Queue(maxsize=1)
        self.began, self.took, self.next = time.perf_counter(), 0.0, 0.0
        self.stopped: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="LineAR preview", daemon=True)
        self.thread.start()

    def submit(self, job: Any, lines: int) -> bool:
        if time.perf_counter() < self.next:
            return False
        try:
            self.jobs.put_nowait((job, lines))
        except queue.Full:
            return False
        self.next = math.inf  # until this one is made
        return True

    def check(self) -> None:
        """Raises the host's stop where the thread got it."""
        if self.stopped is not None:
            raise self.stopped

    def last(self, job: Any) -> Image.Image | None:
        """The picture that must not be dropped; None where it cannot be made, as the run is worth more."""
        self.close()
        self.check()
        try:
            return self.paint(job)
        except self.stop:
            raise
        except Exception as error:
            log.warning("LineAR: no last picture (%s)", str(error))
            return None

    def close(self) -> None:
        """Wait for the picture that is being made, if any, and end the thread."""
        if self.thread.is_alive():
            self.jobs.put(None)
            self.thread.join()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            begun = time.perf_counter()
            try:
                self.show(self.paint(job[0]), job[1])
            except self.stop as stop:  # the host's layers ask for Stop on any thread, and it is told only once
                self.stopped = stop
                return
            except Exception as error:  # the run is worth more than its preview
                log.warning("LineAR: no preview (%s)", str(error))  # itself it holds on to what was computed
                return
            now = time.perf_counter()
            self.next = now + self._wait(now - begun, now - self.began, job[1])

    def _wait(self, took: float, elapsed: float, lines: int) -> float:
        """Seconds until the next picture, after one of `lines` lines that took so long."""
        self.took += took
        to_come = elapsed * (self.rows / lines - 1)  # as the lines so far went
        room = self.allowance + self.share * (elapsed + to_come) - self.took
        # This picture's share of the room is its share of the time to come; the first is slow, so a fifth at most.
        return max(self.pause, to_come * (min(0.2, took / room) if room > 0 else 1.0))

"""Pictures of unfinished images. Approximate, and labelled so: only a full decode gives the final picture."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from ..events import Line, Stage, Step
from ..loop.micro_batches import is_out_of_memory
from ..pyramid import Pyramid
from ..tokenizers.bits import BitTokenizer
from ..tokenizers.latents import LatentTokenizer
from ..tokenizers.pyramid import PyramidTokenizer
from ..tokenizers.tokenizer import VQTokenizer, to_pixels
from .inpaint import fill

if TYPE_CHECKING:
    from PIL import Image

AnyTokenizer = VQTokenizer | PyramidTokenizer | BitTokenizer | LatentTokenizer

log = logging.getLogger(__name__)
UNDRAWN = 0.35  # grey value of rows that are not drawn yet


class Preview:
    """Collects the lines of a run and decodes the rows so far.

    A VQ decoder looks at the whole picture (group norm, attention), so rows still change a little after they are shown.
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
        """The first `images` pictures so far, undrawn rows in grey: float32 B H W 3 in 0..1, on the CPU."""
        codes = self.tokens[:images].to(self.tokenizer.device)
        done = to_pixels(self.tokenizer.decode(codes)).cpu()
        missing = (self.rows - len(self.lines)) * self.tokenizer.config.factor
        undrawn = torch.full((done.shape[0], missing, *done.shape[2:]), UNDRAWN)
        return torch.cat([done, undrawn], 1)


class CanvasPreview:
    """Keeps the canvas of a run over scales, and decodes it at a reduced size.

    A canvas holds hardly any detail beyond the side of its newest scale, and decoding at half the side costs a quarter.
    So it is shrunk to the smallest of a few sides that is at least twice the newest scale's. The decoder was not
    trained at that size, so the picture is a preview.
    """

    sides = (4, 6, 8, 12, 16, 24, 32)  # rows of the canvas that are decoded; beyond, the canvas as it is

    def __init__(self, tokenizer: PyramidTokenizer | BitTokenizer, pyramid: Pyramid):
        self.tokenizer, self.pyramid = tokenizer, pyramid
        self.stage: Stage | None = None

    def add(self, stage: Stage) -> None:
        self.stage = stage

    @torch.inference_mode()
    def pictures(self, images: int = 1) -> Tensor:
        """The first `images` pictures so far, as they are or smaller: float32 B H W 3 in 0..1, on the CPU."""
        assert self.stage is not None, "nothing is drawn yet"
        canvas = self.stage.canvas[:images].to(self.tokenizer.device)
        rows, cols = canvas.shape[-2:]
        wanted = 2 * self.pyramid.sides[self.stage.stage][0] * rows // self.pyramid.sides[-1][0]
        side = min((side for side in self.sides if wanted <= side < rows), default=rows)
        if side < rows:
            canvas = F.interpolate(canvas, size=(side, max(1, round(side * cols / rows))), mode="area")
        return to_pixels(self.tokenizer.decode(canvas)).cpu()


class LatentPreview:
    """Keeps the latents of a run over masked steps, and decodes them with the gaps filled from around them, and dimmed.

    So the picture comes into focus wherever tokens are drawn.
    """

    dimmed = 0.5  # brightness of what is only filled in

    def __init__(self, tokenizer: LatentTokenizer):
        self.tokenizer = tokenizer
        self.step: Step | None = None

    def add(self, step: Step) -> None:
        self.step = step

    def pictures(self, images: int = 1) -> Tensor:
        """The first `images` pictures so far: float32 B H W 3 in 0..1, on the CPU."""
        assert self.step is not None, "nothing is drawn yet"
        return self.of(self.tokenizer, self.step.latents[:images])

    @classmethod
    @torch.inference_mode()
    def of(cls, tokenizer: LatentTokenizer, latents: Tensor) -> Tensor:
        """The pictures of latents with gaps, B Z h w."""
        latents = latents.to(tokenizer.device)
        pictures = to_pixels(tokenizer.decode(fill(latents))).cpu()
        known = F.interpolate(latents[:, :1].isfinite().float(), pictures.shape[1:3], mode="nearest")[:, 0, :, :, None]
        return pictures * (cls.dimmed + (1 - cls.dimmed) * known.cpu())


@torch.inference_mode()
def decode(tokenizer: AnyTokenizer, tokens: Tensor, batch: int = 16) -> Tensor:
    """Decode finished pictures: codes int64 B rows cols, or a canvas or latents B Z h w.

    Returns float32 B H W 3 in 0..1, on the CPU.

    Decodes `batch` pictures at a time, and half as many if memory runs out. Raises UserError if it is too little for
    one.
    """
    done, left = [], tokens
    while len(left):
        pictures = _try_decode(tokenizer, left[:batch])
        if pictures is not None:
            done.append(pictures)
            left = left[batch:]
        elif (batch := min(batch, len(left)) // 2) == 0:
            height, width = (n * 2 ** (len(tokenizer.config.decoder_widths) - 1) for n in tokens.shape[-2:])
            raise UserError(
                f"memory: it ran out decoding one picture of {width} x {height}; close other programs that use memory."
            )
        else:
            log.warning("LineAR: memory ran out decoding; going on with %d pictures at a time", batch)
    return torch.cat(done)


def _try_decode(tokenizer: AnyTokenizer, codes: Tensor) -> Tensor | None:
    """None if memory ran out. By then the error, and with it every tensor of the computation, is freed."""
    try:
        return to_pixels(tokenizer.decode(codes.to(tokenizer.device))).cpu()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    return None


class PreviewWorker:
    """Makes preview pictures on a thread of its own.

    The sampler submits jobs and never waits: a job that comes too early, or while a picture is being made, is dropped.
    The time that a run of `rows` lines may spend on pictures is spread over the run.

    render   makes a picture of a job
    display  takes the picture and its number of lines
    stop     exception that the host raises in either when the user presses Stop
    """

    pause = 0.1  # minimum seconds between pictures
    allowance = 0.4  # seconds that the pictures of any run may take, so that short runs are shown too
    share = 0.005  # of the run's time that they may take in addition

    def __init__(
        self,
        render: Callable[[Any], Image.Image],
        display: Callable[[Image.Image, int], None],
        rows: int,
        stop: type[BaseException] | tuple[()] = (),
    ):
        self.render, self.display, self.rows, self.stop = render, display, rows, stop
        self.jobs: queue.Queue[tuple[Any, int] | None] = queue.Queue(maxsize=1)
        self.started, self.spent, self.next = time.perf_counter(), 0.0, 0.0
        self.stopped: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="LineAR preview", daemon=True)
        self.thread.start()

    def submit(self, job: Any, lines: int) -> bool:
        """Offer a job; returns whether it was taken."""
        if time.perf_counter() < self.next:
            return False
        try:
            self.jobs.put_nowait((job, lines))
        except queue.Full:
            return False
        self.next = math.inf  # until this picture is made
        return True

    def check(self) -> None:
        """Raise the host's stop if the thread received it."""
        if self.stopped is not None:
            raise self.stopped

    def final(self, job: Any) -> Image.Image | None:
        """The final picture, which is never dropped; None if it cannot be made, because the run matters more."""
        self.close()
        self.check()
        try:
            return self.render(job)
        except self.stop:
            raise
        except Exception as error:
            log.warning("LineAR: no final picture (%s)", str(error))
            return None

    def close(self) -> None:
        """Wait for the picture being made, if any, and end the thread."""
        if self.thread.is_alive():
            self.jobs.put(None)
            self.thread.join()

    def _work(self) -> None:
        while (job := self.jobs.get()) is not None:
            started = time.perf_counter()
            try:
                self.display(self.render(job[0]), job[1])
            except self.stop as stop:  # the host's layers check for Stop on any thread, and it is raised only once
                self.stopped = stop
                return
            except Exception as error:  # the run is worth more than its preview
                log.warning("LineAR: no preview (%s)", str(error))  # the exception itself would keep the tensors alive
                return
            now = time.perf_counter()
            self.next = now + self._wait(now - started, now - self.started, job[1])

    def _wait(self, took: float, elapsed: float, lines: int) -> float:
        """Seconds until the next picture, after one of `lines` lines that took `took` seconds."""
        self.spent += took
        remaining = elapsed * (self.rows / lines - 1)  # at the speed so far
        left = self.allowance + self.share * (elapsed + remaining) - self.spent
        # Wait for the share of the remaining time that this picture took of what is left to spend. The first picture is
        # slow, so a fifth at most.
        return max(self.pause, remaining * (min(0.2, took / left) if left > 0 else 1.0))

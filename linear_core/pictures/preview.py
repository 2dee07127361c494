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
from ..events import Line, Step
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


class Sketch:
    """A linear map from the channels of a canvas to colours, as Stable Diffusion's latent previews have one.

    A decoder costs too much to be asked after every scale: of VAR's smallest model it would take several times the run.
    The map is a least-squares fit to pictures that were decoded: first to random colour washes, then to every finished
    picture.

    seconds  what decoding took for each place of a canvas, when it was asked last
    """

    washes, side, recall = 16, 2, 0.7  # random canvases and their rows; how much of a fit the next one leaves

    def __init__(self) -> None:
        self.fit: tuple[Tensor, Tensor] | None = None
        self.map = torch.empty(0)
        self.seconds = 0.0

    @torch.inference_mode()
    def prepare(self, tokenizer: PyramidTokenizer | BitTokenizer, pyramid: Pyramid) -> None:
        """Learn from random tokens of the first scales, unless there is something better. One small decode."""
        if self.fit is not None:
            return
        random, stages = torch.Generator().manual_seed(0), min(2, pyramid.stages)
        tokens = [
            torch.randint(tokenizer.config.codes, (self.washes, *pyramid.sides[stage]), generator=random)
            for stage in range(stages)
        ]
        canvas = tokenizer.quantize.canvas(pyramid, [one.to(tokenizer.device) for one in tokens])
        rows, cols = canvas.shape[-2:]
        self.decode(tokenizer, F.interpolate(canvas, (min(self.side, rows), min(self.side, cols)), mode="area"))

    @torch.inference_mode()
    def decode(self, tokenizer: PyramidTokenizer | BitTokenizer, canvas: Tensor) -> Tensor:
        """Decode a canvas B Z h w, learning from it: float32 B H W 3 in 0..1, on the CPU."""
        started = time.perf_counter()
        canvas = canvas.to(tokenizer.device)
        pictures = to_pixels(tokenizer.decode(canvas)).cpu()
        self.seconds = (time.perf_counter() - started) / (len(canvas) * canvas.shape[-2:].numel())
        channels = _with_one(canvas.cpu())
        colours = F.interpolate(pictures.permute(0, 3, 1, 2), canvas.shape[-2:], mode="area").permute(0, 2, 3, 1)
        channels, colours = channels.flatten(0, 2).double(), colours.flatten(0, 2).double()
        new = channels.T @ channels / len(channels), channels.T @ colours / len(channels)
        old = self.fit or new
        self.fit = gram, target = old[0].lerp(new[0], 1 - self.recall), old[1].lerp(new[1], 1 - self.recall)
        ridge = 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        self.map = torch.linalg.solve(gram + ridge, target).float()
        return pictures

    @torch.inference_mode()
    def picture(self, canvas: Tensor, least: int = 64) -> Tensor:
        """A sketch of a canvas B Z h w on the CPU, smoothly enlarged to about `least` pixels: B H W 3 in 0..1."""
        assert self.fit is not None, "nothing is learnt yet"
        colours = _with_one(canvas) @ self.map
        factor = max(1, least // max(canvas.shape[-2:]))
        colours = colours.permute(0, 3, 1, 2)
        if factor > 1:
            colours = F.interpolate(colours, scale_factor=factor, mode="bilinear")
        return colours.clamp(0, 1).permute(0, 2, 3, 1)


def _with_one(canvas: Tensor) -> Tensor:
    """Canvas B Z h w -> B h w Z+1."""
    return F.pad(canvas.float().permute(0, 2, 3, 1), (0, 1), value=1.0)


class CanvasPreview:
    """Pictures of one run's canvas after each scale: a sketch, or decoded at a reduced side where the run affords that.

    A canvas holds hardly any detail beyond the side of its newest scale, so it is decoded at no more than twice that.
    The decoder was not trained at such a size, so the picture is a preview. The last scale takes nearly half of a run
    and the first ones next to nothing; so decoding is not spread over the scales, but gets a share of the time that has
    passed.
    """

    sides = (2, 3, 4, 6, 8, 12, 16, 24, 32)  # rows of the canvas that are decoded; beyond, the canvas as it is
    share = 0.01

    def __init__(self, tokenizer: PyramidTokenizer | BitTokenizer, pyramid: Pyramid, sketch: Sketch):
        self.tokenizer, self.pyramid, self.sketch = tokenizer, pyramid, sketch
        self.spent = 0.0  # seconds of decoding

    def side(self, stage: int, canvas: Tensor, seconds: float) -> int:
        """Rows of a canvas B Z h w to decode within so many seconds; 0: none that would show more than a sketch."""
        rows, cols = canvas.shape[-2:]
        detail = 2 * self.pyramid.sides[stage][0] * rows // self.pyramid.sides[-1][0]
        enough = min((side for side in self.sides if detail <= side < rows), default=rows)
        pixels = self.tokenizer.config.factor * self.pyramid.sides[-1][0] // rows  # of a row of the canvas
        affordable = [
            side
            for side in (*self.sides, enough)
            if side <= enough and len(canvas) * side * round(side * cols / rows) * self.sketch.seconds <= seconds
        ]
        return max((side for side in affordable if side * pixels >= 2 * rows), default=0)

    @torch.inference_mode()
    def pictures(self, stage: int, canvas: Tensor, elapsed: float = math.inf) -> Tensor:
        """Canvases B Z h w after scale `stage`: float32 B H W 3 in 0..1, on the CPU.

        elapsed  seconds since the run began
        """
        side = self.side(stage, canvas, self.share * elapsed - self.spent)
        if not side:
            return self.sketch.picture(canvas)
        rows, cols = canvas.shape[-2:]
        if side < rows:
            canvas = F.interpolate(canvas, size=(side, max(1, round(side * cols / rows))), mode="area")
        pictures = self.sketch.decode(self.tokenizer, canvas)
        self.spent += self.sketch.seconds * len(canvas) * canvas.shape[-2:].numel()
        return pictures


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


class CanvasWorker(PreviewWorker):
    """The same for models that draw in scales: a picture after every scale, as sketches cost next to nothing.

    render  makes a picture of a job, so many seconds after the run began; None: the final one
    """

    pause = 0.03

    def __init__(
        self,
        render: Callable[[Any, float | None], Image.Image],
        display: Callable[[Image.Image, int], None],
        scales: int,
        stop: type[BaseException] | tuple[()] = (),
    ):
        self.draw = render
        super().__init__(lambda job: render(job, time.perf_counter() - self.started), display, scales, stop)

    def final(self, job: Any) -> Image.Image | None:
        """The final picture, of the whole canvas; None if it cannot be made."""
        self.render = lambda job: self.draw(job, None)
        return super().final(job)

    def _wait(self, took: float, elapsed: float, lines: int) -> float:
        return self.pause

"""A run as the page shows it: progress bar, events, and the rows so far as the host's own preview pictures."""

from __future__ import annotations

import logging
import math
import os
import uuid
from dataclasses import asdict
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import EVENT, IMAGES, Line, Picture, Started, Trace, detail, unpack_codes
from ..linear_core.loop.generate import Run, evict, generate
from ..linear_core.loop.graph import Graphs
from ..linear_core.loop.memory import max_batch_size, run_bytes
from ..linear_core.loop.micro_batches import MicroBatches, merge_lines
from ..linear_core.pictures.preview import Preview, PreviewWorker
from ..linear_core.pictures.sheet import to_image
from ..linear_core.plan import CachePlan, SamplePlan
from ..linear_core.prompts import Prompt
from . import host
from .sockets import Model

log = logging.getLogger(__name__)
MIB = 2**20
STEP = "LINEAR_STEP"
ADVICE = "keep fewer lines (Line Cache), lower batch_size, or close other programs that use memory"
SIZE = 384  # pixels of a preview's longer side, at most, unless it is larger by itself


def _widget(name: str) -> Any:
    """A type without a socket that web/line_cache.js draws."""

    @io.comfytype(io_type=name)
    class Widget(io.ComfyTypeI):
        class Input(io.WidgetInput):
            def __init__(self, id: str, **more: Any):
                super().__init__(id, optional=True, socketless=True, **more)

    return Widget


VIEW, COMPARE, MEMORY = _widget("LINEAR_VIEW"), _widget("LINEAR_COMPARE"), _widget("LINEAR_MEMORY")


def _sequences(sample: SamplePlan, prompt: Prompt) -> tuple[int, int]:
    """How many the cache holds, and how many places each one's prompt takes."""
    return (2 * prompt.rows, prompt.max_length) if sample.guided else (prompt.rows, prompt.length)


def started(model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, at_once: int | None = None) -> Started:
    """What a run is, in the words of the events. `at_once` of its images are in the cache together, by default all."""
    decoder, grid, images = model.image.decoder, model.image.info.grid, prompt.rows
    rows, places = _sequences(sample, prompt.select(range(at_once or images)))
    shape = decoder.cache_shape(places)
    return Started(
        run=uuid.uuid4().hex[:12],
        rows=grid.rows,
        cols=grid.cols,
        stride=grid.stride,
        images=images,
        shown=min(images, IMAGES),
        columns=_columns(min(images, IMAGES)),
        layers=shape.layers,
        heads=shape.heads,
        detail=detail(shape.layers, shape.heads, grid.tokens),
        seed=sample.seed,
        policy=plan.policy,
        release=plan.release,
        lines=min(plan.budget, grid.rows) if plan.evicts(grid) else grid.rows,
        anchors=plan.anchors,
        recent=plan.recent,
        cache_bytes=shape.bytes(grid, plan, rows),
        full_bytes=shape.bytes(grid, CachePlan("full"), rows),
    )


def memory(model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, images: int | None = None) -> int:
    """Bytes a run takes beside the weights, a preview included; `images` of the prompt's at once, by default all."""
    info = model.image.info
    images = images or prompt.rows
    rows, places = _sequences(sample, prompt)
    rows = rows // prompt.rows * images
    shape = model.image.decoder.cache_shape(places)
    preview = min(images, IMAGES) * model.picture_bytes(info.grid.rows, info.grid.cols)
    return run_bytes(shape, info.grid, plan, rows, info.config.codes, host.device_type()) + preview


class Live:
    """Tells the page of a run while it happens, and of the whole of it afterwards.

    `beside` are the lines of another run, appended to as they come: the preview shows that one on the left.
    `part` of `parts`: a batch that does not fit is drawn in several, each of which the page sees as a run of its own.
    """

    def __init__(
        self,
        model: Model,
        plan: CachePlan,
        sample: SamplePlan,
        prompt: Prompt,
        node_id: str,
        beside: list[Line] | None = None,
        part: int = 0,
        parts: int = 1,
    ):
        self.node_id, self.rows, self.tokenizer = node_id, model.image.info.grid.rows, model.image.tokenizer
        self.beside = beside
        self.before = part * self.rows
        self.text = f"part {part + 1} of {parts}, {prompt.rows} pictures at a time" if parts > 1 else ""
        self.progress = host.Progress(parts * self.rows, node_id)
        self.trace = Trace(started(model, plan, sample, prompt))
        self.lines: list[Line] = []
        self._tell(self.trace.latest)
        self.painter = PreviewWorker(self._paint, self._show, self.rows, host.Interrupted)

    def add(self, line: Line) -> None:
        """Tell of one more row. Raises ComfyUI's interrupt when the user pressed Stop."""
        self.lines.append(line)
        self.painter.submit(self._job(), len(self.lines))
        self.painter.check()
        self.progress.update(self.before + len(self.lines), self.text)
        self._tell(self.trace.add(line))

    def finish(self) -> None:
        """The last picture and the last event; `shown` is then what the node leaves on the page (its `ui`)."""
        picture = self.painter.final(self._job())
        if picture is not None:
            self._show(picture, len(self.lines))
        self._tell(self.trace.finish())
        self.shown = left(self.trace, None if self.beside is not None else picture)

    def become(self, trace: Trace, lines: list[Line]) -> None:
        """Tell of another run in place of this one, with its picture."""
        for event in trace.events:
            self._tell(event)
        self.painter.close()
        self.painter.stopped = None  # where the thread was told of Stop: it has been heard
        picture = self.painter.final([tuple(lines)])
        if picture is not None:
            self._show(picture, len(lines), trace)

    def close(self) -> None:
        self.painter.close()

    def _job(self) -> list[tuple[Line, ...]]:
        return [tuple(lines) for lines in (self.beside, self.lines) if lines is not None]

    def _paint(self, runs: list[tuple[Line, ...]]) -> Image.Image:
        sheets = [sheet(_pictures(self.tokenizer, lines, self.rows)) for lines in runs]
        return sheets[0] if len(sheets) == 1 else side_by_side(*sheets)

    def _show(self, picture: Image.Image, lines: int, trace: Trace | None = None) -> None:
        self._tell(asdict(Picture((trace or self.trace).started.run, lines)))
        host.preview(self.node_id, picture)

    def _tell(self, event: dict[str, Any]) -> None:
        host.tell(EVENT, {"node": self.node_id, **event})


def left(trace: Trace, picture: Image.Image | None) -> dict[str, Any]:
    """What a node leaves on the page (its `ui`): all events, and the picture where it shows one."""
    return {"linear_ar": trace.events} | (
        {} if picture is None else {"linear_ar_picture": [host.keep_for_the_page(picture)]}
    )


def draw(
    model: Model,
    prompt: Prompt,
    plans: list[CachePlan],
    sample: SamplePlan,
    node_id: str,
    *,
    above: Tensor | None = None,
    stop_after: int = 0,
) -> tuple[list[Run], Started, dict[str, Any]]:
    """Draw with each of `plans` at the same time, and tell the page: of the last one, with the first on its left.

    `above` are lines that stay, `stop_after` lines after which to stop (0: none). A batch that does not fit the host's
    memory, or for which it runs out, is drawn in parts. Returns the runs, what the last one was, and what the node
    leaves on the page.
    """
    image = model.image

    def needed(images: int) -> int:
        return sum(memory(model, plan, sample, prompt, images) for plan in plans)

    at_once = max_batch_size(host.room(model.decoder, model.tokenizer), prompt.rows, needed)
    micro_batches = MicroBatches(prompt, sample, at_once, above, caches=len(plans), advice=ADVICE)
    told: list[list[Line]] = []  # by part, as the page was told of the last plan
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            host.load(model.decoder, model.tokenizer, memory=needed(micro_batch.prompt.rows))
            graphs = _graphs(image.decoder, len(plans))
            given = [each.kwargs for each in graphs] or [{} for _ in plans]
            drawing = [
                generate(
                    image.decoder,
                    micro_batch.prompt,
                    plan,
                    micro_batch.sample,
                    above=upper,
                    name=image.info.name,
                    **more,
                )
                for plan, upper, more in zip(plans, micro_batch.above, given, strict=True)
            ]
            beside = micro_batch.runs[0].lines if len(plans) > 1 else None
            live = Live(
                model,
                plans[-1],
                micro_batch.sample,
                micro_batch.prompt,
                node_id,
                beside,
                part=len(told),
                parts=len(micro_batches),
            )
            try:
                for lines in zip(*drawing, strict=True):
                    for run, line in zip(micro_batch.runs, lines, strict=True):
                        run.add(line)
                    live.add(lines[-1])
                    if lines[-1].row + 1 == stop_after:
                        break
                live.finish()
            except host.Interrupted:  # the page gets the rows that all pictures so far have, to go on from
                if told and live.lines and len(plans) == 1:
                    at_once = max(len(part[0].tokens) for part in told)
                    live.become(*_as_one(model, plans[-1], sample, prompt, at_once, [*told, live.lines]))
                raise
            finally:
                for lines in drawing:
                    lines.close()  # they hold the key-value caches
                live.close()
            told.append(live.lines)
            for why in {each.why for each in graphs if each.why}:
                log.warning("LineAR: %s", why)
    shown, trace = live.shown, live.trace
    if len(micro_batches) > 1:  # afterwards the page has all of the batch, as one run
        trace, lines = _as_one(model, plans[-1], sample, prompt, micro_batches.max_images, told)
        trace.finish()
        picture = live.painter.final([tuple(lines)]) if len(plans) == 1 else None
        shown = left(trace, picture)
    return micro_batches.runs, trace.started, shown


def _graphs(decoder: Any, runs: int) -> list[Graphs]:
    """One for each run where the environment asks: they are tried on no GPU yet, so nobody gets them unasked."""
    asked = os.environ.get(STEP, "eager")
    if asked not in ("eager", "graph"):
        raise UserError(f"{STEP}: '{asked}' is unknown; set it to eager or graph, and restart ComfyUI.")
    return [Graphs(decoder.step, evict) for _ in range(runs)] if asked == "graph" else []


def _as_one(
    model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, at_once: int, parts: list[list[Line]]
) -> tuple[Trace, list[Line]]:
    """Parts of a batch, the first ones of `prompt`, as one run of the lines that they all have."""
    rows = min(map(len, parts))
    lines = merge_lines([part[:rows] for part in parts])
    trace = Trace(started(model, plan, sample, prompt.select(range(len(lines[0].tokens))), at_once))
    for line in lines:
        trace.add(line)
    return trace, lines


def _pictures(tokenizer: Any, lines: tuple[Line, ...], rows: int) -> Tensor:
    preview = Preview(tokenizer, rows)
    for line in lines:
        preview.add(line)
    return preview.pictures(IMAGES)


def _columns(images: int) -> int:
    return math.ceil(math.sqrt(images))


def sheet(pictures: Tensor, size: int = SIZE) -> Image.Image:
    """Pictures B H W 3 as one image, as square as can be, whole pixels enlarged."""
    columns = _columns(len(pictures))
    rows = math.ceil(len(pictures) / columns)
    blank = pictures.new_zeros(rows * columns - len(pictures), *pictures.shape[1:])
    cells = torch.cat([pictures, blank]).unflatten(0, (rows, columns))
    return to_image(cells.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1), size)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def kept_codes(text: str) -> Tensor:
    """The codes that the widget hands back: int64 B rows cols."""
    try:
        sizes, codes = unpack_codes(text)
    except ValueError as error:
        raise UserError(
            f"view: the rows kept on the node cannot be read ({error}); press 'Start over' on the node."
        ) from None
    return torch.tensor(codes).view(sizes)


def report(full: Run, few: Run, started_few: Started, label: str) -> str:
    """Two runs with the same seeds in a few lines of text."""
    same = float((full.tokens == few.tokens).float().mean())
    saved = 1 - started_few.cache_bytes / started_few.full_bytes
    return "\n".join(
        [
            f"full cache: {started_few.full_bytes / MIB:.1f} MiB, {full.tokens_per_second:.0f} tokens/s",
            f"{label}: {started_few.cache_bytes / MIB:.1f} MiB (\u2212{saved:.0%}), "
            f"{few.tokens_per_second:.0f} tokens/s",
            f"the same codes with the same seeds: {same:.0%}",
        ]
    )

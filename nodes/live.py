"""A run as the page shows it: progress bar, events, and what is drawn so far as the host's own preview pictures."""

from __future__ import annotations

import logging
import math
import os
import uuid
from dataclasses import asdict, replace
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import EVENT, Picture, Started, Trace, mark_cells, unpack_kept
from ..linear_core.loop.drafts import check
from ..linear_core.loop.generate import Run, evict
from ..linear_core.loop.graph import Graphs, use_graphs
from ..linear_core.loop.memory import max_batch_size
from ..linear_core.loop.micro_batches import MicroBatches, merge_lines
from ..linear_core.loop.redraw import DRAW
from ..linear_core.pictures.preview import PreviewWorker
from ..linear_core.pictures.sheet import to_image
from ..linear_core.plan import CachePlan, SamplePlan
from ..linear_core.prompts import Prompt
from . import host
from .loops import Lines, Scales, loop_of
from .sockets import Model

log = logging.getLogger(__name__)
MIB = 2**20
STEP = "LINEAR_STEP"
ADVICE = "keep less (Line Cache), lower batch_size, or close other programs that use memory"
SIZE = 384  # pixels of a preview's longer side, at most, unless it is larger by itself


def _widget(name: str) -> Any:
    """A widget type without a socket, drawn by web/line_cache.js."""

    @io.comfytype(io_type=name)
    class Widget(io.ComfyTypeI):
        class Input(io.WidgetInput):
            def __init__(self, id: str, **more: Any):
                super().__init__(id, optional=True, socketless=True, **more)

    return Widget


VIEW, COMPARE, MEMORY = _widget("LINEAR_VIEW"), _widget("LINEAR_COMPARE"), _widget("LINEAR_MEMORY")


def _sequences(sample: SamplePlan, prompt: Prompt) -> tuple[int, int]:
    """How many sequences the cache holds, and how many slots the prompt of each one takes."""
    return (2 * prompt.rows, prompt.max_length) if sample.guided else (prompt.rows, prompt.length)


def resolve(model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, stop_after: int = 0) -> CachePlan:
    """The plan with its budget in lines, or as a share of scales, now that model and batch are known; checked."""
    loop, (rows, places) = loop_of(model), _sequences(sample, prompt)
    plans = [plan.resolve(each.image.decoder.cache_shape(places), loop.of, rows) for each, _ in model.in_turn]
    plan = min(plans, key=lambda each: each.ratio(loop.of))  # of so many MiB, what fits into them whichever draws
    loop.check(plan, sample, stop_after)
    return plan


def started(
    model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, at_once: int | None = None, beside: str = ""
) -> Started:
    """The event that describes a run. `at_once` of its images are in the cache together, by default all. `beside` is
    the model of the run on its left, if that is another."""
    images = prompt.rows
    rows, places = _sequences(sample, prompt.select(range(at_once or images)))
    shape = model.image.decoder.cache_shape(places)
    told = loop_of(model).told(plan, shape, rows, images)
    return Started(
        run=uuid.uuid4().hex[:12],
        images=images,
        columns=_columns(told["shown"]),
        layers=shape.layers,
        heads=shape.heads,
        seed=sample.seed,
        policy=plan.policy,
        release=plan.release,
        anchors=plan.anchors,
        recent=plan.recent,
        codebook=model.image.codebook,
        list_index=host.list_index(),
        seeds=",".join(map(str, sample.image_seeds(images))) if sample.seeds else "",
        beside=beside,
        **told,
    )


def memory(model: Model, plan: CachePlan, sample: SamplePlan, prompt: Prompt, images: int | None = None) -> int:
    """Bytes that a run takes besides the weights, preview included, for `images` of the prompt at once, or all."""
    images = images or prompt.rows
    rows, places = _sequences(sample, prompt)
    shape = model.image.decoder.cache_shape(places)
    return loop_of(model).run_bytes(plan, shape, sample, rows // prompt.rows * images, images)


class Live:
    """Sends a run to the page: row by row, or scale by scale, while it is generated, and as a whole afterwards.

    `beside` are the lines of another run, which grows meanwhile; the preview shows that one on the left. `name` is that
    of its model, if it is another. `part` of `parts`: a batch that does not fit is generated in parts, and the page
    sees each part as a run of its own.

    decoded  the pictures that are shown, once the run has ended
    """

    def __init__(
        self,
        model: Model,
        plan: CachePlan,
        sample: SamplePlan,
        prompt: Prompt,
        node_id: str,
        beside: list[Any] | None = None,
        part: int = 0,
        parts: int = 1,
        name: str = "",
        kept: Tensor | None = None,
    ):
        self.node_id, self.loop, self.beside = node_id, loop_of(model), beside
        self.rows = self.loop.stages
        self.decoded: Tensor | None = None
        self.before = part * self.rows
        self.text = f"part {part + 1} of {parts}, {prompt.rows} pictures at a time" if parts > 1 else ""
        self.progress = host.Progress(parts * self.rows, node_id)
        self.trace = Trace(_marked(started(model, plan, sample, prompt, beside=name), kept))
        self.lines: list[Any] = []
        self._send(self.trace.latest)
        self.loop.prepare()
        self.worker: PreviewWorker = self.loop.worker(self._render, self._show, self.rows, host.Interrupted)

    def add(self, line: Any) -> None:
        """Send one more row or scale. Raises ComfyUI's interrupt if the user pressed Stop."""
        self.lines.append(line)
        self.worker.submit(self._job(), len(self.lines))
        self.worker.check()
        self.progress.update(self.before + len(self.lines), self.text)
        self._send(self.trace.add(line))

    def finish(self) -> None:
        """Send the final picture and the last event; `shown` is then what stays on the page (the node's `ui`)."""
        picture = self.worker.final(self._job())
        if picture is not None:
            self._show(picture, len(self.lines))
        self._send(self.trace.finish())
        self.shown = left(self.trace, None if self.beside is not None else picture)

    def replace_run(self, trace: Trace, lines: list[Any]) -> None:
        """Send another run in place of this one, with its picture."""
        for event in trace.events:
            self._send(event)
        self.worker.close()
        self.worker.stopped = None  # a Stop that the thread saw has been handled
        picture = self.worker.final([tuple(lines)])
        if picture is not None:
            self._show(picture, len(lines), trace)

    def close(self) -> None:
        self.worker.close()

    def _job(self) -> list[tuple[Any, ...]]:
        return [tuple(lines) for lines in (self.beside, self.lines) if lines is not None]

    def _render(self, runs: list[tuple[Any, ...]], elapsed: float | None = None) -> Image.Image:
        """The pictures so far. Previews of scales are told the time, and the page enlarges them."""
        pictures = self.loop.pictures(runs, self.trace.started.shown, elapsed)
        if isinstance(self.loop, Scales) and elapsed is None:
            self.decoded = pictures[-1]
        sheets = [sheet(one, SIZE if elapsed is None else 0) for one in pictures]
        return sheets[0] if len(sheets) == 1 else side_by_side(*sheets)

    def _show(self, picture: Image.Image, lines: int, trace: Trace | None = None) -> None:
        self._send(asdict(Picture((trace or self.trace).started.run, lines)))
        host.preview(self.node_id, picture)

    def _send(self, event: dict[str, Any]) -> None:
        host.send_event(EVENT, {"node": self.node_id, **event})


def left(trace: Trace, picture: Image.Image | None) -> dict[str, Any]:
    """What stays on the page (a node's `ui`): all events, and the picture if there is one.

    ComfyUI appends what several runs of a node leave, key by key, so a picture says of which run it is.
    """
    pictures = [] if picture is None else [host.keep_for_the_page(picture) | {"run": trace.started.run}]
    return {"linear_ar": trace.events, "linear_ar_picture": pictures}


def draw(
    model: Model,
    prompt: Prompt,
    plans: list[CachePlan],
    sample: SamplePlan,
    node_id: str,
    *,
    above: Tensor | None = None,
    kept: Tensor | None = None,
    stop_after: int = 0,
    beside: Model | None = None,
) -> tuple[list[Run], Started, dict[str, Any], Tensor | None]:
    """Generate with each of `plans` at the same time. The page sees the last one, with the first on its left.

    `above` are lines, or scales, to keep, and `kept` codes (see `generate`); `stop_after` is the number of lines or
    scales after which to stop (0: never). A batch that does not fit into memory, or for which memory runs out, is
    generated in parts. Returns the runs, the event that describes the last one, what stays on the page, and all its
    pictures if they are decoded.

    `beside` draws with the first plan instead; a model whose pictures have the same stages and codes.
    """
    loop = loop_of(model)
    models = [beside or model, *[model] * (len(plans) - 1)]
    name = beside.image.info.name if beside else ""
    drawers = [*(each for each, _ in model.in_turn), *([beside] if beside else [])]
    networks = list(dict.fromkeys([*(each.decoder for each in drawers), model.tokenizer]))  # one may draw twice

    def needed(images: int) -> int:
        return sum(memory(each, plan, sample, prompt, images) for each, plan in zip(models, plans, strict=True))

    at_once = max_batch_size(host.room(*networks), prompt.rows, needed)
    micro_batches = MicroBatches(prompt, sample, at_once, above, caches=len(plans), kept=kept, advice=ADVICE)
    done: list[list[Any]] = []  # by part: the lines of the last plan that were sent
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            host.load(*networks, memory=needed(micro_batch.prompt.rows))
            sequences, graphs = _sequences(sample, micro_batch.prompt)[0], []
            decoders = [each.image.decoder for each in models]
            # A graph reads weights where they were when it was recorded.
            if isinstance(loop, Lines) and not any(host.is_streamed(each.decoder) for each in models):
                graphs = _graphs(decoders, sequences)
            given = [each.kwargs for each in graphs] or [{} for _ in plans]
            if micro_batch.kept is not None:
                given = [more | {"kept": micro_batch.kept} for more in given]
            drawing = [
                loop_of(each).draw(micro_batch.prompt, plan, micro_batch.sample, upper, stop_after, **more)
                for each, plan, upper, more in zip(models, plans, micro_batch.above, given, strict=True)
            ]
            other = micro_batch.runs[0].lines if len(plans) > 1 else None
            live = Live(
                model,
                plans[-1],
                micro_batch.sample,
                micro_batch.prompt,
                node_id,
                other,
                part=len(done),
                parts=len(micro_batches),
                kept=micro_batch.kept,
                name=name,
            )
            try:
                for lines in zip(*drawing, strict=True):
                    for run, line in zip(micro_batch.runs, lines, strict=True):
                        run.add(line)
                    live.add(lines[-1])
                live.finish()
            except host.Interrupted:  # the page gets the rows that all images have, to continue from
                if done and live.lines and len(plans) == 1:
                    at_once = max(len(part[0].tokens) for part in done)
                    live.replace_run(
                        *_as_one(model, plans[-1], sample, prompt, at_once, [*done, live.lines], name, kept)
                    )
                raise
            finally:
                for lines in drawing:
                    lines.close()  # they hold the key-value caches
                live.close()
            done.append(live.lines)
            for why in {each.why for each in graphs if each.why}:
                log.warning("LineAR: %s", why)
    shown, trace, decoded = live.shown, live.trace, live.decoded
    if len(micro_batches) > 1:  # afterwards the page has all of the batch, as one run
        decoded = None
        trace, lines = _as_one(model, plans[-1], sample, prompt, micro_batches.max_images, done, name, kept)
        trace.finish()
        picture = live.worker.final([tuple(lines)]) if len(plans) == 1 else None
        shown = left(trace, picture)
    if decoded is not None and len(decoded) < prompt.rows:
        decoded = None
    return micro_batches.runs, trace.started, shown, decoded


def _graphs(decoders: list[Any], sequences: int) -> list[Graphs]:
    """CUDA graphs for each decoder's run, if they are wanted."""
    use = graphs_wanted(decoders[0].device, sequences)
    return [Graphs(decoder.step, evict, check) for decoder in decoders] if use else []


def graphs_wanted(device: torch.device, sequences: int) -> bool:
    """Whether the environment asks for CUDA graphs, or `linear_core/defaults.py` says that they win."""
    asked = os.environ.get(STEP, "auto")
    if asked not in ("auto", "eager", "graph"):
        raise UserError(f"{STEP}: '{asked}' is unknown; set it to eager or graph, and restart ComfyUI.")
    return use_graphs(asked, device, sequences)


def _marked(begun: Started, kept: Tensor | None) -> Started:
    """The event of a run that keeps these codes of its images, or of one for all."""
    if kept is None:
        return begun
    return replace(begun, kept=mark_cells(kept.expand(begun.images, -1, -1)[: begun.shown] != DRAW))


def _as_one(
    model: Model,
    plan: CachePlan,
    sample: SamplePlan,
    prompt: Prompt,
    at_once: int,
    parts: list[list[Any]],
    name: str = "",
    kept: Tensor | None = None,
) -> tuple[Trace, list[Any]]:
    """Parts of a batch, the first images of `prompt`, as one run with the lines that all parts have."""
    rows = min(map(len, parts))
    lines = merge_lines([part[:rows] for part in parts])
    images = range(len(lines[0].tokens))
    begun = started(model, plan, sample.select(images), prompt.select(images), at_once, name)
    trace = Trace(_marked(begun, kept if kept is None or len(kept) == 1 else kept[: len(images)]))
    for line in lines:
        trace.add(line)
    return trace, lines


def _columns(images: int) -> int:
    return math.ceil(math.sqrt(images))


def tiled(pictures: Tensor) -> Tensor:
    """Pictures B H W 3 as one, as square as possible: H W 3."""
    columns = _columns(len(pictures))
    rows = math.ceil(len(pictures) / columns)
    blank = pictures.new_zeros(rows * columns - len(pictures), *pictures.shape[1:])
    cells = torch.cat([pictures, blank]).unflatten(0, (rows, columns))
    return cells.permute(0, 2, 1, 3, 4).flatten(2, 3).flatten(0, 1)


def sheet(pictures: Tensor, size: int = SIZE) -> Image.Image:
    """Pictures B H W 3 as one image, enlarged by a whole factor."""
    return to_image(tiled(pictures), size)


def side_by_side(left: Image.Image, right: Image.Image) -> Image.Image:
    both = Image.new("RGB", (left.width + right.width, left.height))
    both.paste(left, (0, 0))
    both.paste(right, (left.width, 0))
    return both


def kept_codes(loop: Lines | Scales, text: str, rows: int) -> tuple[Tensor | None, dict[str, Any]]:
    """The codes that the widget sent back for this run, int64 B rows cols, and the run's seeds, as SamplePlan has them,
    if they are not the node's. Of scales, B N.

    `rows` is how many to keep of the run that the widget shows. Of the node's other runs, which are not to change, all
    that the widget sent; None for a run that it knows nothing of.
    """
    try:
        kept = unpack_kept(text)
    except ValueError as error:
        raise UserError(
            f"view: the {loop.unit}s kept on the node cannot be read ({error}); press 'Start over' on the node."
        ) from None
    for each in kept:
        if each.list_index in (None, host.list_index()):
            codes = torch.tensor(each.codes).view(each.sizes)
            own = {} if each.seed is None else {"seed": each.seed, "seeds": each.seeds}
            return (loop.first(codes, rows, ()) if each is kept[0] else codes), own
    return None, {}


def report(full: Run, few: Run, started_few: Started, label: str, beside: str = "") -> str:
    """Two runs with the same seeds in a few lines of text. The first is of the model `beside` if that is another."""
    if beside:
        return "\n".join(
            f"{name}, {run.tokens_per_second:.0f} tokens/s, {run.seconds:.1f} s"
            for name, run in ((beside, full), (f"{label}: {started_few.cache_bytes / MIB:.1f} MiB", few))
        )
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

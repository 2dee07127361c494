"""Lines and scales: what differs between the two ways of drawing, wherever a node has to know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import Line, Stage, detail, images_shown
from ..linear_core.loop.drafts import window_size
from ..linear_core.loop.generate import generate
from ..linear_core.loop.memory import run_bytes, scales_run_bytes
from ..linear_core.loop.scales import check_sample, check_stop, generate_scales, scale_policy, with_drafter
from ..linear_core.pictures.preview import CanvasPreview, CanvasWorker, Preview, PreviewWorker
from ..linear_core.plan import CachePlan, CacheShape, SamplePlan
from ..linear_core.prompts import Prompt
from . import host

if TYPE_CHECKING:
    from .sockets import Model

FULL = CachePlan("full")


class Lines:
    """A model that draws line by line."""

    unit = "row"
    sides: tuple[tuple[int, int], ...] = ()  # of a pyramid
    worker: Any = PreviewWorker

    def __init__(self, model: Model):
        self.model, self.grid = model, model.image.info.grid
        self.of = self.grid

    @property
    def stages(self) -> int:
        """What the progress bar counts."""
        return self.grid.rows

    def check(self, plan: CachePlan, sample: SamplePlan, stop_after: int = 0) -> None:
        """Raise UserError where something does not suit the model."""
        if sample.smooth:
            name = self.model.image.info.name
            raise UserError(f"smooth: {name} draws line by line, and only VAR and M-VAR mix codes; switch it off.")
        plan.check(self.grid)

    def evicts(self, plan: CachePlan) -> bool:
        return plan.evicts(self.grid)

    def budget(self, plan: CachePlan) -> str:
        """What the plan keeps, in words."""
        return f"{plan.budget} of {self.grid.rows} lines"

    def told(self, plan: CachePlan, shape: CacheShape, sequences: int, images: int) -> dict[str, Any]:
        """The part of a run's `Started` that depends on the way of drawing."""
        grid = self.grid
        return {
            "rows": grid.rows,
            "cols": grid.cols,
            "stride": grid.stride,
            "shown": images_shown(images, grid.rows, grid.cols),
            "detail": detail(shape.layers, shape.heads, grid.tokens),
            "lines": min(plan.budget, grid.rows) if plan.evicts(grid) else grid.rows,
            "cache_bytes": shape.bytes(grid, plan, sequences),
            "full_bytes": shape.bytes(grid, FULL, sequences),
        }

    def run_bytes(self, plan: CachePlan, shape: CacheShape, sample: SamplePlan, sequences: int, images: int) -> int:
        """Bytes besides the weights, preview included."""
        grid, model = self.grid, self.model
        window = window_size(model.image.decoder, sample, images, grid)
        preview = images_shown(images, grid.rows, grid.cols) * model.picture_bytes(grid.rows, grid.cols)
        codes = model.image.info.config.codes
        return run_bytes(shape, grid, plan, sequences, codes, host.device_type(), window) + preview

    def draw(
        self, prompt: Prompt, plan: CachePlan, sample: SamplePlan, given: Tensor | None, stop_after: int, **more: Any
    ) -> Iterator[Any]:
        """Line after line; `given` are the first ones."""
        image = self.model.image
        lines = generate(image.decoder, prompt, plan, sample, above=given, name=image.info.name, **more)
        try:
            for line in lines:
                yield line
                if line.row + 1 == stop_after:
                    return
        finally:
            lines.close()  # it holds the key-value cache

    def first(self, codes: Tensor, rows: int, sides: tuple[tuple[int, int], ...]) -> Tensor:
        """The upper `rows` of pictures B rows cols. Raises UserError if there are fewer, or if they are no lines."""
        if codes.ndim != 3:
            raise UserError(
                f"tokens: they are of a picture drawn in scales, but {self.model.image.info.name} draws line by line; "
                "connect tokens of this model."
            )
        if codes.shape[1] < rows:
            raise UserError(
                f"keep_rows: {rows} rows are to be kept, but there are only {codes.shape[1]}; choose fewer rows."
            )
        return codes[:, :rows]

    def prepare(self) -> None:
        """Whatever previews need, once the tokenizer is on its device."""

    def pictures(self, runs: Sequence[Sequence[Line]], images: int, elapsed: float | None = None) -> list[Tensor]:
        """The first `images` pictures of each run, undrawn rows in grey: B H W 3."""
        return [self._picture(lines, images) for lines in runs]

    def _picture(self, lines: Sequence[Line], images: int) -> Tensor:
        preview = Preview(self.model.image.tokenizer, self.grid.rows)
        for line in lines:
            preview.add(line)
        return preview.pictures(images)


class Scales:
    """A model that draws scale by scale."""

    unit = "scale"
    worker: Any = CanvasWorker

    def __init__(self, model: Model):
        pyramid = model.image.info.pyramid
        assert pyramid is not None
        self.model, self.pyramid, self.of = model, pyramid, pyramid
        self.sides = pyramid.sides

    @property
    def stages(self) -> int:
        return self.pyramid.stages

    def check(self, plan: CachePlan, sample: SamplePlan, stop_after: int = 0) -> None:
        image = self.model.image
        scale_policy(plan, self.pyramid)
        check_stop(stop_after, self.pyramid)
        check_sample(image.decoder, sample, image.info.name, paired=self.model.drafter is not None)

    def evicts(self, plan: CachePlan) -> bool:
        return plan.keeps(self.pyramid) < self.pyramid.kept

    def budget(self, plan: CachePlan) -> str:
        return f"{plan.keeps(self.pyramid)} of {self.pyramid.kept} tokens"

    def told(self, plan: CachePlan, shape: CacheShape, sequences: int, images: int) -> dict[str, Any]:
        pyramid = self.pyramid
        cols = pyramid.sides[-1][1]
        shapes = [(each.image.decoder.cache_shape(), scales) for each, scales in self.model.in_turn]

        def most(plan: CachePlan) -> int:
            """Of models that draw in turn, the cache of the one that takes most."""
            return max(shape.scales_bytes(pyramid, plan, sequences, scales) for shape, scales in shapes)

        return {
            "rows": pyramid.stages,
            "cols": cols,
            "stride": cols,
            "shown": images_shown(images, 1, pyramid.tokens),
            "detail": detail(shape.layers, shape.heads, pyramid.tokens) if len(shapes) == 1 else "",
            "lines": plan.keeps(pyramid),
            "cache_bytes": most(plan),
            "full_bytes": most(FULL),
            "state_bytes": most(plan) if all(each.state for each, _ in shapes) else 0,
            "sides": [list(side) for side in pyramid.sides],
        }

    def run_bytes(self, plan: CachePlan, shape: CacheShape, sample: SamplePlan, sequences: int, images: int) -> int:
        pyramid, needed = self.pyramid, 0
        for each, scales in self.model.in_turn:
            shape, config = each.image.decoder.cache_shape(), each.image.info.config
            device = host.device_type()
            needed = max(
                needed,
                scales_run_bytes(shape, pyramid, plan, sequences, config.logits, config.hidden, device, scales),
            )
        return needed + images_shown(images, 1, pyramid.tokens) * self.model.picture_bytes(*pyramid.sides[-1])

    def draw(
        self, prompt: Prompt, plan: CachePlan, sample: SamplePlan, given: Tensor | None, stop_after: int, **more: Any
    ) -> Iterator[Any]:
        """Scale after scale; `given` are the tokens of the first ones, B N."""
        image = self.model.image
        decoder = image.decoder
        if self.model.drafter is not None:  # not before it is loaded, as that tells a decoder its device
            drafter, scales = self.model.drafter
            decoder = with_drafter(decoder, drafter.image.decoder, scales)
        return generate_scales(
            decoder, image.tokenizer.quantize, prompt, plan, sample, given=given, stop_after=stop_after,
            name=image.info.name,
        )  # fmt: skip

    def first(self, codes: Tensor, rows: int, sides: tuple[tuple[int, int], ...]) -> Tensor:
        """The tokens of the first `rows` scales of pictures B N, drawn in scales of these `sides`; () : of ours."""
        name, pyramid = self.model.image.info.name, self.pyramid
        if codes.ndim != 2:
            raise UserError(
                f"tokens: they are lines of a picture, but {name} draws in scales; connect tokens of this model."
            )
        if sides and sides[:rows] != pyramid.sides[:rows]:
            raise UserError(
                f"tokens: their scales have other sizes than those of {name}'s picture; choose the same size in Text "
                "Prompt."
            )
        if rows >= pyramid.stages:
            raise UserError(
                f"keep_rows: {rows} scales are to be kept, but {name} draws {pyramid.stages}; choose at most "
                f"{pyramid.stages - 1}."
            )
        first = pyramid.index(rows)
        if codes.shape[1] < first:
            there = max(n for n in range(rows) if pyramid.index(n) <= codes.shape[1])
            raise UserError(f"keep_rows: {rows} scales are to be kept, but there are only {there}; choose fewer.")
        return codes[:, :first]

    def prepare(self) -> None:
        self.model.sketch.prepare(self.model.image.tokenizer, self.pyramid)
        self.preview = CanvasPreview(self.model.image.tokenizer, self.pyramid, self.model.sketch)

    def pictures(self, runs: Sequence[Sequence[Stage]], images: int, elapsed: float | None = None) -> list[Tensor]:
        """The first `images` pictures of each run after its newest scale, B H W 3; the final ones where no time is
        told."""
        image, sketch = self.model.image, self.model.sketch
        canvases = [lines[-1].canvas[:images] for lines in runs]
        if elapsed is None:
            return [sketch.decode(image.tokenizer, canvas) for canvas in canvases]
        both = self.preview.pictures(runs[0][-1].stage, torch.cat(canvases), elapsed)
        return list(both.chunk(len(runs)))


def loop_of(model: Model) -> Lines | Scales:
    """How a model draws."""
    return Lines(model) if model.image.info.pyramid is None else Scales(model)

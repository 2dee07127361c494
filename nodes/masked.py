"""Masked Generate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..linear_core.errors import UserError
from ..linear_core.events import Step, images_shown
from ..linear_core.loop.generate import Run
from ..linear_core.loop.graph import CapturedHead
from ..linear_core.loop.masked import generate_masked
from ..linear_core.loop.memory import masked_run_bytes, max_batch_size
from ..linear_core.loop.micro_batches import MicroBatches
from ..linear_core.pictures.fit import aligned
from ..linear_core.pictures.heatmap import heatmap
from ..linear_core.pictures.inpaint import check_mask, known_latents, masked_cells
from ..linear_core.pictures.preview import LatentPreview, PreviewWorker
from ..linear_core.plan import MAX_SEED, CachePlan, SamplePlan, parse_seeds
from ..linear_core.prompts import Prompt
from ..linear_core.steps import LAST, RULES, SCHEDULES, STEP_CACHES, MaskedPlan, StepCachePlan
from . import host
from .inputs import checked
from .live import MIB, graphs_wanted, sheet, side_by_side, tiled
from .sockets import MODEL, PROMPT, TOKENS, Model, Tokens, wants_masked

log = logging.getLogger(__name__)
CUSTOM = "Custom"
OWN = -1.0  # in place of a number: what the model was published with
ADVICE = "choose Off in step_cache, lower batch_size, or close other programs that use memory"
MAP = 128  # pixels of a map of ages, along a side
MAPS = 4  # images of which maps are put out, as there is one for each step
ENCODED = 4  # pictures that the VAE encodes at a time


def _custom() -> list[io.Input]:
    plan = STEP_CACHES["Balanced"]
    return [
        io.Int.Input(
            "refresh",
            default=plan.refresh,
            min=0,
            max=4096,
            tooltip="Tokens computed again in a step that is not full, besides those drawn last and those to be drawn. "
            "Typical: 0 to 64. Time grows with it.",
        ),
        io.Combo.Input(
            "rule",
            options=list(RULES),
            default=plan.rule,
            tooltip="Which tokens are computed again. oldest: those not computed for longest. attention: those that "
            "the tokens drawn last attend to most (MARché). attention x age: that times the steps since. values: those "
            "whose values moved most (LazyMAR). nearest, random: to compare with.",
        ),
        io.Int.Input(
            "full_every",
            default=plan.full_every,
            min=0,
            max=1024,
            tooltip="Every so many steps, one computes everything. Typical: 4 to 8. 1: every step does. 0: none but "
            "the first and last ones.",
        ),
        io.Int.Input(
            "full_first",
            default=plan.full_first,
            min=1,
            max=1024,
            tooltip="Steps at the beginning that compute everything. Typical: 2 to 10.",
        ),
        io.Int.Input(
            "full_last",
            default=plan.full_last,
            min=0,
            max=1024,
            tooltip="Steps at the end that compute everything. Typical: 0 to 2.",
        ),
    ]


class MaskedGenerate(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LineAR_MaskedGenerate",
            display_name="Masked Generate",
            category="LineAR",
            description="Generates images with MAR or NOVA, which draw a few tokens at a time, in any order. With an "
            "image and a mask, it redraws what the mask covers and keeps the rest.",
            search_aliases=["mar", "masked autoregressive", "inpaint", "outpaint", "linear", "step cache", "sampler"],
            inputs=[
                MODEL.Input("model", tooltip="A MAR or NOVA model, from Load AR Model."),
                PROMPT.Input("prompt", tooltip="What to generate, from Class Prompt, or from Text Prompt for NOVA."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Image i of a batch is the image that seed + i gives alone. Runs that differ only in their "
                    "step cache or number of steps use the same order and noise, so their images can be compared.",
                ),
                io.Float.Input(
                    "guidance",
                    default=OWN,
                    min=OWN,
                    max=30.0,
                    step=0.1,
                    tooltip="Classifier-free guidance scale: how closely the image follows the prompt. Typical: 2 to "
                    "5. 1 or less: none, which halves compute. -1: the model's own value (MAR-B 2.9, L 3.0, H 3.2; "
                    "NOVA 5).",
                ),
                io.Int.Input(
                    "steps",
                    default=MaskedPlan.steps,
                    min=1,
                    max=1024,
                    tooltip="Steps in which the tokens are drawn, more of them towards the end. Typical: 64, as "
                    "published; 32 takes half the time of the transformer. At most as many as there are tokens (MAR: "
                    "256).",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=64,
                    tooltip="Images per class or text, generated together. A batch that does not fit into free memory "
                    "is generated in parts; the images are the same.",
                ),
                io.DynamicCombo.Input(
                    "step_cache",
                    options=[
                        *[io.DynamicCombo.Option(name, []) for name in STEP_CACHES],
                        io.DynamicCombo.Option(CUSTOM, _custom()),
                    ],
                    tooltip="Which steps compute everything. The others reuse keys and values of earlier steps, which "
                    "saves time and takes more memory. Off: every step, as published. Balanced: the first ten, the "
                    "last two and every fourth. MARché: the first two; later, 64 tokens by attention are computed "
                    "again. LazyMAR: the first five and every ninth; else 48 by how far their values moved. Custom: "
                    "your own settings. What they cost in quality was not measured on the published weights.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="An image of which to keep everything outside the mask: one for all, or one per image. Any "
                    "size: it is scaled and center-cropped to the model's (MAR: 256 x 256).",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="What to draw anew, in any shape: one mask for all, or one per image. A token (16 x 16 "
                    "pixels) is drawn anew if any of its pixels is covered. A mask of another size than the image is "
                    "stretched to it, as ComfyUI's inpainting does.",
                ),
                io.Int.Input(
                    "denoising",
                    default=MaskedPlan.denoising,
                    min=2,
                    max=LAST + 1,
                    optional=True,
                    advanced=True,
                    tooltip="Denoising steps of a token. Typical: 100 for MAR, 25 for NOVA. The time of the diffusion "
                    "head grows with it, and the head takes most of the time on a CPU.",
                ),
                io.Int.Input(
                    "denoising_last",
                    default=MaskedPlan.denoising_last,
                    min=0,
                    max=LAST + 1,
                    optional=True,
                    advanced=True,
                    tooltip="Denoising steps of the tokens drawn last; from the first step to the last, their number "
                    "falls evenly to this (DiSA: 5, with denoising at 50). 0: the same in all steps.",
                ),
                io.Int.Input(
                    "start",
                    default=MaskedPlan.start,
                    min=1,
                    max=LAST,
                    optional=True,
                    advanced=True,
                    tooltip="Timestep at which denoising starts. 999: as published. Typical with few denoising steps: "
                    "950, from which errors of the network are no longer multiplied by hundreds.",
                ),
                io.Combo.Input(
                    "guidance_schedule",
                    options=list(SCHEDULES),
                    default=MaskedPlan.schedule,
                    optional=True,
                    advanced=True,
                    tooltip="linear: guidance grows with the share of the image that is known, as MAR was "
                    "published. constant: it is the same in all steps, as NOVA was published.",
                ),
                io.Float.Input(
                    "temperature",
                    default=OWN,
                    min=OWN,
                    max=4.0,
                    step=0.05,
                    optional=True,
                    advanced=True,
                    tooltip="Strength of the noise that denoising adds. Typical: 1. Lower values vary less. -1: the "
                    "model's own value, which is 1.",
                ),
                io.String.Input(
                    "seeds",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="A seed for each image of the batch, such as 3, 7, 100-103, in place of seed + i. A batch "
                    "that is split over several machines then gives the same images. Empty: seed + i.",
                ),
            ],
            outputs=[
                TOKENS.Output(display_name="tokens", tooltip="The image tokens, for Decode."),
                io.String.Output(
                    display_name="report",
                    tooltip="Steps, tokens computed in each, time of the transformer and of the diffusion head, and "
                    "memory added by the step cache.",
                ),
                io.Image.Output(
                    display_name="ages",
                    tooltip="One map for each step: bright places were computed in it, darker ones reuse what was "
                    f"computed earlier. Of the first {MAPS} images.",
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    @checked
    def execute(
        cls,
        model: Model,
        prompt: Prompt,
        seed: int,
        guidance: float,
        steps: int,
        batch_size: int,
        step_cache: dict[str, Any],
        image: Tensor | None = None,
        mask: Tensor | None = None,
        denoising: int = MaskedPlan.denoising,
        denoising_last: int = MaskedPlan.denoising_last,
        start: int = MaskedPlan.start,
        guidance_schedule: str = MaskedPlan.schedule,
        temperature: float = OWN,
        seeds: str = "",
    ) -> io.NodeOutput:
        wants_masked(model)
        info = model.image.info
        asked = {"guidance": guidance, "temperature": temperature}
        asked = {name: value for name, value in asked.items() if not value < 0}  # below 0: the model's own
        sample = replace(info.defaults, seed=seed, seeds=parse_seeds(seeds), **asked)
        plan = replace(  # the rest is the model's own
            info.masked, steps=steps, denoising=denoising, denoising_last=denoising_last, start=start,
            schedule=guidance_schedule,
        )  # fmt: skip
        plan.check(info.config.tokens)
        settings = dict(step_cache)
        name = settings.pop("step_cache")
        cache = StepCachePlan(**settings) if name == CUSTOM else STEP_CACHES[name]
        model.image.check(prompt)
        prompt = prompt.repeat(batch_size)
        sample.image_seeds(prompt.rows)
        given, notes = _given(model, image, mask, prompt.rows)
        drawing = Drawing(model, prompt, sample, plan, cache, cls.hidden.unique_id)
        run = drawing.draw(given)
        assert run.latents is not None
        shown = {} if drawing.picture is None else {"images": [host.keep_for_the_page(drawing.picture)]}
        tokens = Tokens(
            codes=torch.zeros(prompt.rows, 0, dtype=torch.int64),
            shares=torch.zeros(prompt.rows, 0),
            names=prompt.names,
            model=info.name,
            codebook=0,
            plan=CachePlan("full"),
            cache_bytes=run.lines[-1].cache_bytes,
            seconds=run.seconds,
            meaning=model.image.codebook,
            cached=False,
            decoded=drawing.decoded,
            latents=run.latents,
        )
        frames = torch.stack([tiled(age_map(step.age[:MAPS])) for step in run.lines])
        return io.NodeOutput(tokens, "\n".join([*report(run.lines), *notes]), host.to_intermediate(frames), ui=shown)


def _given(model: Model, image: Tensor | None, mask: Tensor | None, images: int) -> tuple[Tensor | None, list[str]]:
    """What stays of pictures: latents with gaps, and what to say of it. Raises UserError if the inputs do not fit."""
    if image is None and mask is None:
        return None, []
    if image is None or mask is None:
        there, missing = ("mask", "image") if image is None else ("image", "mask")
        raise UserError(
            f"{missing}: there is only the {there}; connect both to redraw a part of a picture, or neither."
        )
    if (there := max(len(image), len(mask))) not in (1, images):
        raise UserError(
            f"image: there are {there} images or masks, but {images} are generated; connect one, or one for each."
        )
    info = model.image.info
    size = info.grid.rows * info.pixels, info.grid.cols * info.pixels
    image, mask, notes = aligned(image.cpu(), mask.cpu(), size)
    check_mask(image, mask, size)
    cells = masked_cells(mask, info.grid.rows, info.grid.cols)
    tokenizer = model.image.tokenizer
    host.load(model.tokenizer, memory=ENCODED * _picture_bytes(model))
    parts = [
        known_latents(tokenizer, one, mask if len(mask) == 1 or len(image) == 1 else part, size, info.config.patch)
        for one, part in zip(image.split(ENCODED), _like(mask, image), strict=True)
    ]
    notes.append(f"{_range(cells.flatten(1).sum(1).tolist())} of {cells[0].numel()} tokens were drawn anew.")
    return torch.cat(parts), notes


def _like(mask: Tensor, image: Tensor) -> Sequence[Tensor]:
    """The masks that go with each part of the images."""
    parts = len(image.split(ENCODED))
    return mask.split(ENCODED) if len(mask) == len(image) else [mask] * parts


def _picture_bytes(model: Model) -> int:
    grid, patch = model.image.info.grid, model.image.info.config.patch
    return model.picture_bytes(grid.rows * patch, grid.cols * patch)


class Drawing:
    """A run on the node: in parts if it does not fit, with previews.

    picture  the last preview; None if there is none
    decoded  the finished pictures, where the last preview shows all of them: float32 B H W 3
    """

    def __init__(
        self, model: Model, prompt: Prompt, sample: SamplePlan, plan: MaskedPlan, cache: StepCachePlan, node_id: str
    ):
        self.model, self.prompt, self.sample, self.plan, self.cache = model, prompt, sample, plan, cache
        self.node_id = node_id
        grid = model.image.info.grid
        self.shown = images_shown(prompt.rows, grid.rows, grid.cols)
        self.picture: Image.Image | None = None
        self.decoded: Tensor | None = None

    def bytes(self, images: int) -> int:
        """Bytes besides the weights for so many images at once, preview included."""
        config, decoder = self.model.image.info.config, self.model.image.decoder
        shape = config.step_cache_shape(decoder.dtype.itemsize)
        run = masked_run_bytes(shape, self.cache, self.plan.steps, self._sequences(images), config.hidden)
        return run + min(images, self.shown) * _picture_bytes(self.model)

    def _sequences(self, images: int) -> int:
        return images * (2 if self.sample.guided else 1)

    def draw(self, given: Tensor | None) -> Run:
        """All images; of `given`, what is known stays."""
        networks = [self.model.decoder, self.model.tokenizer]
        at_once = max_batch_size(host.room(*networks), self.prompt.rows, self.bytes)
        parts = MicroBatches(self.prompt, self.sample, at_once, given, advice=ADVICE)
        progress = None
        for number, part in enumerate(parts):
            if progress is None or progress.total != len(parts) * self.plan.steps:
                progress = host.Progress(len(parts) * self.plan.steps, self.node_id)
            with parts.watch(part):
                host.load(*networks, memory=self.bytes(part.prompt.rows))
                self._draw_part(part, progress, number * self.plan.steps)
        if len(parts) > 1:
            self.decoded = None
        return parts.runs[0]

    def _draw_part(self, part: Any, progress: host.Progress, before: int) -> None:
        image, head = self.model.image, None
        sequences = self._sequences(part.prompt.rows)
        # A graph reads weights where they were when it was recorded.
        if not host.is_streamed(self.model.decoder) and graphs_wanted(image.decoder.device, sequences):
            head = CapturedHead(image.decoder.head)
        steps = generate_masked(
            image.decoder, part.prompt, part.sample, self.plan, self.cache, given=part.above[0], denoise=head,
            name=image.info.name,
        )  # fmt: skip
        latest: list[Image.Image] = []  # a preview that has not been sent
        worker = PreviewWorker(
            self._render, lambda picture, _: latest.append(picture), self.plan.steps, host.Interrupted
        )
        try:
            for step in steps:
                part.runs[0].add(step)
                worker.submit(step, step.step + 1)
                worker.check()
                progress.update(before + step.step + 1, _text(step), latest.pop() if latest else None)
                latest.clear()
            self.picture = worker.final(step) or self.picture
            progress.update(before + self.plan.steps, picture=self.picture)
        finally:
            steps.close()  # it holds the step cache
            worker.close()
        if head is not None and head.why:
            log.warning("LineAR: %s", head.why)

    def _render(self, step: Step) -> Image.Image:
        """The pictures so far, and beside them the map of ages, where anything is kept from step to step."""
        latents = step.latents[: self.shown]
        pictures = LatentPreview.of(self.model.image.tokenizer, latents)
        if step.step + 1 == step.steps and len(latents) == self.prompt.rows:
            self.decoded = pictures
        drawn = sheet(pictures)
        if not self.cache.keeps(self.plan.steps):
            return drawn
        ages = sheet(age_map(step.age[: self.shown]), 0)
        return side_by_side(drawn, ages.resize(drawn.size, Image.Resampling.NEAREST))


def age_map(age: Tensor) -> Tensor:
    """Maps of ages, int64 B rows cols: bright where computed in this step, darker the longer ago. B H W 3."""
    rows, cols = age.shape[1:]
    cell = max(1, MAP // max(rows, cols))
    return heatmap(1 / (1 + age.float()), rows * cell, cols * cell)


def _text(step: Step) -> str:
    computed = step.computed[step.computed > 0]
    what = "everything" if step.full else f"{_range(computed.tolist())} of {step.slots} tokens"
    return f"step {step.step + 1} of {step.steps}: computed {what}"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def report(steps: list[Step]) -> list[str]:
    """What a run took, in a few lines of text."""
    slots, total = steps[0].slots, steps[0].steps
    full = sum(step.full for step in steps)
    each = [_range(step.computed[step.computed > 0].tolist()) for step in steps if bool((step.computed > 0).any())]
    runs = [(name, len(list(group))) for name, group in groupby(each)]
    computed = torch.cat([step.computed for step in steps])
    mean = float(computed[computed > 0].float().mean())
    drawn = sum(int(step.drawn.sum()) for step in steps)
    transformer, head = sum(step.transformer for step in steps), sum(step.head for step in steps)
    added = steps[-1].cache_bytes
    skipped = f" (the other {total - len(steps)} had nothing to draw)" if len(steps) < total else ""
    return [
        f"{drawn} tokens drawn in {len(steps)} of {total} steps{skipped}, {full} of them full",
        f"computed in a step: {mean:.0f} of {slots} tokens on average, copies of the class included",
        "step by step: " + ", ".join(name if count == 1 else f"{count} x {name}" for name, count in runs),
        f"{sum(step.seconds for step in steps):.1f} s: transformer {transformer:.1f} s, diffusion head {head:.1f} s",
        f"memory added by the step cache: {added / MIB:.1f} MiB" if added else "no step cache, so no memory is added",
    ]

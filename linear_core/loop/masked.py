"""The loop of masked models: from a class to one Step after another, each of which draws a few tokens at once.

Known places are a longer beginning of the order. So a picture of which some places are given is drawn as if they had
been drawn first: the steps that would have drawn them are left out, and the others are those of any picture. A picture
that was stopped goes on in the same way.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cache.refresh import LOOKS, chosen, scores
from ..cache.step_cache import Rows, StepCache
from ..errors import UserError
from ..events import Step
from ..grid import Grid
from ..models.denoise import Schedule, schedule
from ..models.mar import Active, State
from ..plan import SamplePlan
from ..steps import STEP_CACHES, TIMESTEPS, MaskedPlan, StepCachePlan
from .sampling import Noise, not_finite

OFF = STEP_CACHES["Off"]

# z, noise, schedule, guidance, temperature -> tokens: see models.denoise.Denoiser
Denoise = Callable[[Tensor, Tensor, Schedule, float, float], Tensor]


class MaskedDecoder(Protocol):
    """What `generate_masked` needs of a model. Shapes are those of models.mar.MAR."""

    config: Any
    grid: Grid
    dtype: torch.dtype
    device: torch.device
    head: Any

    def check(self, prompt: Any) -> None: ...
    def to_tokens(self, latents: Tensor) -> Tensor: ...
    def to_latents(self, tokens: Tensor) -> Tensor: ...
    def begin(self, prompt: Any, order: Tensor, guided: bool) -> State: ...
    def feed(self, state: State, tokens: Tensor, first: int) -> None: ...
    def rows(self, active: Active, images: int) -> tuple[Rows, Rows]: ...
    def conditions(self, state: State, active: Active, cache: StepCache | None = None) -> Tensor: ...


@torch.inference_mode()
def generate_masked(
    decoder: MaskedDecoder,
    prompt: Any,
    sample: SamplePlan,
    plan: MaskedPlan,
    cache: StepCachePlan = OFF,
    *,
    given: Tensor | None = None,
    denoise: Denoise | None = None,
    name: str = "the model",
) -> Iterator[Step]:
    """Draw one image for each row of `prompt`; yields a Step when some tokens are drawn.

    sample   seed, guidance and temperature; nothing else of it means anything here
    plan     how many steps, of tokens and of denoising
    cache    what a step computes again; by default everything
    given    latents B Z h w, or one image's for all: what is known already, and NaN where it is to be drawn. Images may
             have different places to draw
    denoise  replaces the diffusion head (captured)
    name     what error messages call the model

    Raises UserError before anything is allocated if the settings do not fit the model, and at the end of a step whose
    numbers are not finite. Dropping the iterator frees all memory.
    """
    run = Masked(decoder, prompt, sample, plan, cache, given)
    denoise = denoise or decoder.head
    started = time.perf_counter()
    for step in filter(run.draws, range(plan.steps)):
        z = run.conditions(step)
        transformer = run.clock()
        timesteps = plan.timesteps(step)
        drawn = denoise(
            z, run.noise(timesteps), schedule(timesteps, decoder.device), run.guidance(step), sample.temperature
        )
        if not drawn.isfinite().all():  # here the host waits for the device
            raise UserError(not_finite(name, decoder.dtype, f"step {step + 1} of {plan.steps}", "latents"))
        head = run.clock()
        before = run.known
        run.feed(drawn)
        now = run.clock()
        sides = decoder.grid.rows, decoder.grid.cols
        yield Step(
            step, plan.steps, run.latents().float().cpu(), (run.known & ~before).unflatten(1, sides).cpu(),
            run.ages().unflatten(1, sides).cpu(), run.computed(), run.slots, now - started, transformer - started,
            head - transformer, run.cache_bytes,
        )  # fmt: skip
        started = time.perf_counter()


@torch.inference_mode()
def forced_masked(
    decoder: MaskedDecoder,
    prompt: Any,
    latents: Tensor,
    sample: SamplePlan,
    plan: MaskedPlan,
    cache: StepCachePlan = OFF,
) -> Iterator[Tensor]:
    """For each step of the pictures `latents` B Z h w, the conditions of the tokens it would draw: float32 R*m W.

    Nothing is sampled: whatever is computed again, the model sees the same tokens, so differences come from what was
    kept. They are drawn in the order of the seed.
    """
    run = Masked(decoder, prompt, sample, plan, cache, None)
    tokens = decoder.to_tokens(latents.to(run.tokens))
    for step in filter(run.draws, range(plan.steps)):
        z = run.conditions(step)
        yield z
        run.feed(torch.cat([tokens[image, places] for image, places in run.wanted()]))


@dataclass
class Group:
    """Images of which equally many places are given, so that all that is computed has the same shape.

    images  their numbers in the batch: int64 G
    order   places in raster order, in the order of drawing: int64 G N
    given   places that are given: the first of them
    known   places that are known
    drawn   places known after the step, unless more are known already: then it draws nothing
    passed  places that were known in the last pass; -1: there was none
    """

    images: Tensor
    order: Tensor
    given: int
    state: State
    cache: StepCache | None
    known: int
    drawn: int = 0
    passed: int = -1
    computed: int = 0

    @property
    def draws(self) -> bool:
        """Whether the step draws any of its tokens."""
        return self.drawn > self.known

    @property
    def places(self) -> Tensor:
        """Places that the step draws: int64 G m."""
        return self.order[:, self.known : self.drawn]


class Masked:
    """A batch while it is drawn. Rows of guidance follow the conditional ones."""

    def __init__(
        self, decoder: MaskedDecoder, prompt: Any, sample: SamplePlan, plan: MaskedPlan, cache: StepCachePlan,
        given: Tensor | None,
    ):  # fmt: skip
        self.decoder, self.sample, self.plan, self.cache_plan = decoder, sample, plan, cache
        config, device = decoder.config, decoder.device
        if prompt.rows < 1:
            raise UserError("prompt: it is empty; give at least one class.")
        decoder.check(prompt)
        plan.check(config.tokens)
        self.images, self.slots = prompt.rows, config.copies + config.tokens
        self.schedule = plan.known(config.tokens)
        self.tokens = self._given(given).to(device, torch.promote_types(decoder.dtype, torch.float32))
        self.known = self.tokens[:, :, 0].isfinite()
        seeds = sample.image_seeds(self.images)
        self.normal = Noise(seeds, self.images, 2 * config.numbers, device)
        self.lots = Noise(seeds, self.images, self.slots, device)
        lot = self.lots.uniform(-1)[:, config.copies :]
        order = lot.argsort(dim=-1, stable=True)
        order = order.gather(1, (~self.known).gather(1, order).byte().argsort(dim=-1, stable=True))
        self.groups: list[Group] = []
        counts = self.known.sum(1)
        prompt = prompt.to(device)
        for count in counts.unique().tolist():
            images = (counts == count).nonzero()[:, 0]
            state = decoder.begin(prompt.select(images.tolist()), order[images], sample.guided)
            rows = len(state.encoder)
            held = None
            if cache.keeps(plan.steps):
                held = StepCache(
                    config.step_cache_shape(decoder.dtype.itemsize), len(images), rows, dtype=decoder.dtype,
                    device=device, looks=cache.rule in LOOKS and cache.refresh > 0,
                )  # fmt: skip
            group = Group(images, order[images], count, state, held, count)
            if count:
                decoder.feed(state, self._ordered(group, 0, count), 0)
            self.groups.append(group)

    def _given(self, given: Tensor | None) -> Tensor:
        """Tokens in raster order, B N C, NaN where nothing is known. Raises UserError if `given` does not fit."""
        config, grid = self.decoder.config, self.decoder.grid
        shape = (config.channels, grid.rows * config.patch, grid.cols * config.patch)
        if given is None:
            return torch.full((self.images, config.tokens, config.numbers), float("nan"))
        if given.ndim != 4 or tuple(given.shape[1:]) != shape:
            raise UserError(
                f"latents: they are {' x '.join(map(str, given.shape[1:]))} numbers, but this model draws "
                f"{' x '.join(map(str, shape))}; give a picture of its size, encoded with its own VAE."
            )
        if len(given) not in (1, self.images):
            raise UserError(
                f"latents: there are {len(given)} pictures, but {self.images} are drawn; give one, or one for each."
            )
        tokens = self.decoder.to_tokens(given.float()).expand(self.images, -1, -1)
        known = tokens.isfinite().all(-1, keepdim=True)
        if known.all((1, 2)).any():
            raise UserError("latents: every place of a picture is given, so nothing is left to draw; mask some.")
        return torch.where(known, tokens, float("nan"))

    def draws(self, step: int) -> bool:
        """Whether a step draws any tokens: some may be too few to round up to one, or given."""
        return any(self.schedule[step] > group.known for group in self.groups)

    def conditions(self, step: int) -> Tensor:
        """The conditions of the tokens that a step draws, of all images one after the other: float32 R*m W."""
        conditional, unconditional = [], []
        for group in self.groups:
            group.drawn = self.schedule[step]
            group.computed = 0
            if group.draws:
                z = self._pass(group, step)
                images = len(group.images)
                conditional.append(z[:images].flatten(0, 1))
                unconditional.append(z[images:].flatten(0, 1))
        return torch.cat(conditional + unconditional)

    def _pass(self, group: Group, step: int) -> Tensor:
        decoder, plan, cache = self.decoder, self.cache_plan, group.cache
        copies, images = decoder.config.copies, len(group.images)
        known, wanted = copies + group.known, group.drawn - group.known
        active = Active(known, wanted)
        count = plan.count(copies)
        whole = wanted + group.known - group.passed + count >= self.slots
        if cache is not None and group.passed >= 0 and not plan.full(step, self.plan.steps) and not whole:
            new = slice(copies + group.passed, known)
            active = Active(known, wanted, new.start)
            taken = slice(new.start, known + wanted)
            if count and plan.rule == "values":
                active = Active(known, wanted, new.start, choose=self._by_values(group, count, active))
            elif count:
                lot = self.lots.uniform(step)[group.images]
                cols = decoder.grid.cols
                places = torch.stack([group.order // cols, group.order % cols], -1)
                extra = chosen(scores(plan, cache, new, places, lot), count, taken)
                active = Active(known, wanted, new.start, extra)
        if cache is not None and active.choose is None:
            self._begin(group, decoder.rows(active, images)[1])
        group.computed = group.computed or self.slots
        z = decoder.conditions(group.state, active, cache)
        group.passed = group.known
        return z

    def _by_values(self, group: Group, count: int, active: Active) -> Callable[[int, Tensor], Tensor]:
        def choose(layer: int, values: Tensor) -> Tensor:
            cache, new = group.cache, active.new
            assert cache is not None and new is not None
            taken = slice(new, active.known + active.wanted)
            extra = chosen(cache.moved(layer, values), count, taken)
            rows = self.decoder.rows(Active(active.known, active.wanted, new, extra), len(extra))[1]
            self._begin(group, rows)
            return extra

        return choose

    @staticmethod
    def _begin(group: Group, rows: Rows) -> None:
        assert group.cache is not None
        group.cache.begin(rows)
        group.computed = rows.stop - rows.start if isinstance(rows, slice) else rows.shape[1]

    def wanted(self) -> list[tuple[Tensor, Tensor]]:
        """Image and places of the tokens that the step draws, in the order of `conditions`: int64 1 and m each."""
        return [
            (image, places)
            for group in self.groups
            if group.draws
            for image, places in zip(group.images, group.places, strict=True)
        ]

    def noise(self, timesteps: tuple[int, ...]) -> Tensor:
        """Normal noise to begin with, and of each denoising step but the last, for these tokens: T n C.

        Addressed by seed, place and timestep.
        """
        at = torch.tensor([TIMESTEPS, *timesteps[:-1]], device=self.decoder.device)
        parts = []
        for group in self.groups:
            if group.draws:
                number = group.places[:, :, None] * (TIMESTEPS + 1) + at  # G m T
                noise = self.normal.select(group.images).normal(number.flatten(1)).unflatten(1, number.shape[1:])
                parts.append(noise.permute(2, 0, 1, 3).flatten(1, 2))
        return torch.cat(parts, 1)

    def guidance(self, step: int) -> float:
        """How strong guidance is in a step: what will be known decides, whether drawn or given."""
        return self.plan.guidance(self.sample.guidance, self.schedule[step], self.decoder.config.tokens)

    def feed(self, drawn: Tensor) -> None:
        """The tokens of a step, n C in the order of `conditions`, are known from now on."""
        self.known = self.known.clone()
        for group in self.groups:
            if not group.draws:
                continue
            images, places = group.images[:, None], group.places
            self.tokens[images, places] = drawn[: places.numel()].unflatten(0, places.shape)
            self.known[images, places] = True
            drawn = drawn[places.numel() :]
            first, group.known = group.known, group.drawn
            self.decoder.feed(group.state, self._ordered(group, first, group.known), first)

    def _ordered(self, group: Group, first: int, end: int) -> Tensor:
        return self.tokens[group.images[:, None], group.order[:, first:end]]

    def latents(self) -> Tensor:
        """What is known so far: B Z h w, NaN elsewhere."""
        return self.decoder.to_latents(self.tokens).clone()

    def ages(self) -> Tensor:
        """Steps since the keys and values of each place were computed: int64 B N in raster order."""
        ages = torch.zeros_like(self.known, dtype=torch.int64)
        for group in self.groups:
            if group.cache is not None:
                slots = group.cache.age[:, self.decoder.config.copies :]
                ages[group.images] = torch.zeros_like(slots).scatter(1, group.order, slots)
        return ages

    def computed(self) -> Tensor:
        """Slots of each image that the decoder computed in this step, copies of the class included: int64 B."""
        computed = torch.zeros(self.images, dtype=torch.int64)
        for group in self.groups:
            computed[group.images.cpu()] = group.computed
        return computed

    @property
    def cache_bytes(self) -> int:
        """Keys and values, as allocated."""
        return sum(group.cache.bytes for group in self.groups if group.cache is not None)

    def clock(self) -> float:
        """Seconds, once the device has finished."""
        if self.decoder.device.type == "cuda":
            torch.cuda.synchronize(self.decoder.device)
        return time.perf_counter()

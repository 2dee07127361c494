"""Steps: in which a masked picture is drawn, and what is computed again in each. Numbers only."""

from __future__ import annotations

from dataclasses import dataclass
from math import cos, floor, pi

from .errors import UserError

TIMESTEPS = 1000
LAST = TIMESTEPS - 1  # where published denoising starts
SAFE_START = 950  # from here on, an error of the network's is no longer multiplied by hundreds
SCHEDULES = ("linear", "constant")
SPACINGS = ("even", "trailing", "leading")  # of denoising steps, in diffusers' words; "even" is MAR's
# Which slots are computed again, besides the new and the wanted ones. See cache/refresh.py.
VALUE_LAYERS = 3  # of the decoder that compute all slots under the rule "values"
RULES = ("oldest", "attention", "attention x age", "values", "nearest", "random")


@dataclass(frozen=True)
class MaskedPlan:
    """How a masked picture is drawn. Raises UserError naming the setting that is out of range.

    steps           rounds; each draws a few tokens at once, more towards the end
    denoising       denoising steps of a token
    denoising_last  those of a token of the last step, if fewer: they fall linearly from step to step (DiSA, arXiv
                    2505.20297). 0: as many as `denoising`
    start           where denoising starts, up to 999. Whatever the number of steps, an error of the network's at 999 is
                    multiplied by hundreds; from 950 on it is not
    schedule        of guidance: "linear" grows with what is known, from nearly none; "constant" does not
    spacing         of the denoising steps: "even" from 0 to 999; or as many equal strides, at the end of which
                    ("trailing") or at the beginning ("leading") the timesteps are
    rounded         whether the tokens known after a step are rounded, so that a step may draw none (NOVA). MAR's are
                    rounded down, and at least one
    """

    steps: int = 64
    denoising: int = 100
    denoising_last: int = 0
    start: int = LAST
    schedule: str = "linear"
    spacing: str = SPACINGS[0]
    rounded: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps: {self.steps} is out of range; choose 1 or more.")
        if not 2 <= self.denoising <= LAST + 1:
            raise UserError(f"denoising: {self.denoising} is out of range; choose 2 to {LAST + 1} steps.")
        if self.denoising_last and not 2 <= self.denoising_last <= self.denoising:
            raise UserError(
                f"denoising last: {self.denoising_last} is out of range; choose 2 to {self.denoising} (0: no change)."
            )
        if not 1 <= self.start <= LAST:
            raise UserError(f"start: {self.start} is out of range; choose 1 to {LAST}.")
        if self.schedule not in SCHEDULES:
            raise UserError(f"guidance schedule: '{self.schedule}' is unknown; choose {' or '.join(SCHEDULES)}.")
        if self.spacing not in SPACINGS:
            raise UserError(f"spacing: '{self.spacing}' is unknown; choose one of {', '.join(SPACINGS)}.")

    def check(self, tokens: int) -> None:
        """Raise UserError if some steps would draw nothing."""
        if self.steps > tokens:
            raise UserError(f"steps: {self.steps} are more than the picture has tokens; choose at most {tokens}.")

    def known(self, tokens: int) -> tuple[int, ...]:
        """How many of `tokens` are known after each step, as published; the last step draws all that are left."""
        if self.rounded:
            return tuple(tokens - round(tokens * cos(pi / 2 * (step + 1) / self.steps)) for step in range(self.steps))
        left, known = tokens, []
        for step in range(self.steps):
            left = max(1, min(left - 1, floor(tokens * cos(pi / 2 * (step + 1) / self.steps))))
            known.append(tokens - left)
        return (*known[:-1], tokens)

    def guidance(self, scale: float, known: int, tokens: int) -> float:
        """The strength of guidance in a step after which `known` tokens are known. Published code never counts all."""
        return 1 + (scale - 1) * min(known, tokens - 1) / tokens if self.schedule == "linear" else scale

    def denoising_steps(self, step: int) -> int:
        """Denoising steps of the tokens that a step draws."""
        if not self.denoising_last or self.steps == 1:
            return self.denoising
        return round(self.denoising + (self.denoising_last - self.denoising) * step / (self.steps - 1))

    def timesteps(self, step: int) -> tuple[int, ...]:
        """The timesteps of 0 to 999 that a token of this step passes, from the noise on.

        As published, evenly spaced; those above `start` become one, as in DiSA's code.
        """
        count = self.denoising_steps(step)
        if self.spacing != "even":
            ends = [round(TIMESTEPS * (count - n) / count) - 1 for n in range(count)]
            strides = [TIMESTEPS // count * (count - n - 1) for n in range(count)]
            found = ends if self.spacing == "trailing" else strides
            return tuple(dict.fromkeys(min(timestep, self.start) for timestep in found))
        stride, at, found = LAST / (count - 1), 0.0, []
        for _ in range(count):  # added up, not multiplied, so that rounding is the published one
            found.append(min(round(at), self.start))
            at += stride
        return tuple(dict.fromkeys(reversed(found)))


@dataclass(frozen=True)
class StepCachePlan:
    """What a masked model computes again in a step. Raises UserError naming the setting that is out of range.

    In a full step it computes everything. In the others it computes the tokens drawn last, those to be drawn now and
    `refresh` more; for all others it uses the keys and values as they were when they were last computed.

    refresh     tokens computed again in a step that is not full
    rule        which: one of RULES
    full_every  every so many steps one is full; 1: all of them, so nothing is kept; 0: none but the first and last ones
    full_first  steps at the beginning that are full; at least one
    full_last   steps at the end that are full
    """

    refresh: int = 0
    rule: str = "oldest"
    full_every: int = 4
    full_first: int = 10
    full_last: int = 2

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise UserError(f"rule: '{self.rule}' is unknown; choose one of {', '.join(RULES)}.")
        for name, value, least in (
            ("refresh", self.refresh, 0),
            ("full every", self.full_every, 0),
            ("full first", self.full_first, 1),
            ("full last", self.full_last, 0),
        ):
            if value < least:
                raise UserError(f"{name}: {value} is out of range; choose {least} or more.")

    def full(self, step: int, steps: int) -> bool:
        """Whether a step computes everything."""
        since = step - self.full_first + 1
        return since <= 0 or step >= steps - self.full_last or bool(self.full_every and since % self.full_every == 0)

    def count(self, copies: int) -> int:
        """Slots that are computed again in a step that is not full, if there are so many."""
        return self.refresh + (copies if self.rule == "nearest" and self.refresh else 0)

    def keeps(self, steps: int) -> bool:
        """Whether anything is kept from step to step."""
        return not all(self.full(step, steps) for step in range(steps))


STEP_CACHES = {
    "Off": StepCachePlan(full_every=1),
    "Balanced": StepCachePlan(),
    # As its abstract says; where that is silent, as `cache/refresh.py` tells.
    "MARché": StepCachePlan(64, "attention", full_every=0, full_first=2, full_last=0),
    "LazyMAR": StepCachePlan(48, "values", full_every=9, full_first=5, full_last=0),
}


@dataclass(frozen=True)
class Work:
    """What a picture takes.

    full     whether each step computes everything
    partial  slots that the decoder computes in the other steps, mean; 0: there are none
    rows     slots times layers of the transformer, of all steps together, to compare one plan with another. Which slots
             are computed again is taken to be even over the picture; attention, a few percent, is left out
    """

    full: tuple[bool, ...]
    partial: float
    rows: float


@dataclass(frozen=True)
class StepCacheShape:
    """The sizes that decide what a step cache takes.

    slots  copies of the class, and tokens
    """

    encoder_layers: int
    decoder_layers: int
    heads: int
    head_dim: int
    slots: int
    bytes_per_element: int

    def bytes(self, plan: StepCachePlan, steps: int, rows: int) -> int:
        """Keys and values kept for `rows` sequences (images, twice with guidance); 0 if every step is full."""
        if not plan.keeps(steps):
            return 0
        layers = self.encoder_layers + self.decoder_layers
        return 2 * layers * rows * self.heads * (self.slots + 1) * self.head_dim * self.bytes_per_element

    def work(self, masked: MaskedPlan, plan: StepCachePlan, tokens: int) -> Work:
        """What a picture of which nothing is given takes, with `tokens` of the slots."""
        copies, known, passed = self.slots - tokens, 0, 0
        full, rows, partial = [], 0.0, []
        for step, after in enumerate(masked.known(tokens)):
            new, wanted, count = known - passed, after - known, plan.count(copies)
            whole = step == 0 or plan.full(step, masked.steps) or new + wanted + count >= self.slots
            full.append(whole)
            if whole:
                rows += self.encoder_layers * (copies + known) + self.decoder_layers * self.slots
            else:
                by_values = plan.rule == "values" and count > 0
                again = copies if by_values else count * (copies + passed) / (self.slots - new - wanted)
                rows += self.encoder_layers * (new + again)
                computed, all_of = new + wanted + count, min(VALUE_LAYERS, self.decoder_layers - 1) * by_values
                rows += all_of * self.slots + (self.decoder_layers - all_of) * computed
                partial.append(computed)
            passed, known = known, after
        return Work(tuple(full), sum(partial) / len(partial) if partial else 0.0, rows)

"""Plans: frozen settings, checked when they are made, with errors in the user's words. No torch."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil, isfinite
from typing import Any

from .errors import UserError, quoted
from .grid import Grid
from .pyramid import Pyramid, Stages

MAX_SEED = 2**64 - 1
MAX_SEEDS = 2**16  # in one text
AUTO = -1  # drafts: by itself, where they were measured to win
MIB = 2**20
UNITS = {"kib": 2**10, "mib": MIB, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}  # bytes
STORAGES = ("full", "int8", "int4")
RELEASES = ("strict", "lazy", "fold")
# Policies under which heads keep unequal numbers of tokens, on average the budget. Every head has room for HEADROOM
# times the budget: shapes stay the same for all heads, at the price of unused room.
UNEVEN = frozenset({"adakv", "amskv", "cake", "hack", "headkv", "heatkv", "prefixkv", "pyramidkv", "scalekv"})
WHOLE = frozenset({"heatkv", "scalekv"})  # of these, those under which a layer may keep all, at the others' expense
ACROSS_LAYERS = WHOLE | {
    "amskv",
    "cake",
    "hack",
    "prefixkv",
    "pyramidkv",
}  # of these, those that share among all layers
ONLY_SCALES = frozenset({"amskv", "heatkv", "scalekv"})  # policies that mean nothing where a picture is drawn in lines
HEADROOM = 2
ROOMS = 4  # over scales, heads of unequal room are grouped by quarters of the budget
PARTS = {1: 4, 2: 4, 3: 2}  # by lines of budget: how often a line `fold` makes room (`CachePlan.ends`); else once
LINES = 24  # of a picture whose budget is stated in lines while it is drawn in scales: 4 lines are then 1/6


def pairs_of_head(slots: int, head_dim: int, in_parts: bool = False) -> int:
    """Numbers that folding computes at once for a head of so many slots: their pairs, or some vectors of each.

    in_parts  room is made in parts of a line, for which values are compared as well as keys

    At a line's end, as many heads are taken at a time as memory is kept for. What takes more is given back to the
    system and comes back page by page, which may take as long as folding itself.
    """
    return slots * max(slots, (4 if in_parts else 2) * head_dim)


@dataclass(frozen=True)
class CachePlan:
    """What the line cache keeps. Raises UserError naming the setting that is out of range.

    policy   name of a policy in `linear_core.policies`
    budget   lines of image tokens that are kept when a line has ended. A picture drawn in scales has no lines: there
             it counts as that many of 24
    anchors  number of first image tokens that are never evicted; of a pyramid, whole scales (`protected`)
    recent   number of newest whole lines that are never evicted; without effect on a picture drawn in scales
    release  "strict": victims become invisible at once, as published. "lazy": a victim stays visible until the next
             line overwrites it, least useful first. "fold": a victim is merged into the kept slot with the nearest key,
             which then stands for both. "auto": fold for the policy that is made for it, strict for all others; it is
             replaced by the one chosen. All take the same memory.
    storage  "full": keys and values in the dtype they were computed in. "int8", "int4": in 8 or about 5 bits
    share    the budget as a share of what a full cache holds, 0 to 1, in place of lines. 0: `budget` says it
    mib      the budget as MiB of keys and values of the whole batch, in place of lines: as many lines as fit. 0:
             `budget` or `share` says it
    """

    policy: str = "line"
    budget: int = 4
    anchors: int = 4
    recent: int = 2
    release: str = "auto"
    storage: str = "full"
    share: float = 0.0
    mib: float = 0.0

    def __post_init__(self) -> None:
        if self.release == "auto":
            object.__setattr__(self, "release", "fold" if self.policy == "fold" else "strict")
        if self.budget < 1:
            raise UserError(f"budget: {self.budget} lines leave nothing to attend to; choose 1 or more.")
        if self.anchors < 0:
            raise UserError(f"anchors: {self.anchors} is negative; choose 0 or more.")
        if self.recent < 0:
            raise UserError(f"recent: {self.recent} is negative; choose 0 or more.")
        if not 0 <= self.share <= 1:
            raise UserError(f"share: {self.share} is out of range; choose more than 0 and at most 1 (0: by lines).")
        if not 0 <= self.mib or not isfinite(self.mib):
            raise UserError(f"budget: {self.mib} MiB is out of range; choose more than 0 (0: by lines or share).")
        if self.share and self.mib:
            raise UserError("budget: it is stated both as a share and in MiB; leave one of the two out.")
        if self.release not in RELEASES:
            raise UserError(f"release: '{self.release}' is unknown; choose one of auto, {', '.join(RELEASES)}.")
        if self.storage not in STORAGES:
            raise UserError(f"storage: '{self.storage}' is unknown; choose one of {', '.join(STORAGES)}.")

    @property
    def uneven(self) -> bool:
        """Whether heads keep unequal numbers of tokens over scales, where they have room for just that."""
        return self.policy in UNEVEN or self.policy == "fold"

    def in_lines(self, grid: Grid) -> CachePlan:
        """The same plan with the budget in lines of this grid, at least one and no fewer than are protected."""
        if not self.share:
            return self
        return replace(self, budget=max(1, round(self.share * grid.rows)), share=0.0)

    def resolve(self, shape: CacheShape, stages: Stages, rows: int) -> CachePlan:
        """The same plan for `rows` sequences of such a model, with the budget in lines; of a pyramid, as a share.

        Of MiB, the largest budget whose cache takes no more. Raises UserError if not even the smallest fits. A model
        without a cache has nothing to evict, whatever the plan says.
        """
        if shape.state:
            return CachePlan("full")
        if not self.mib or self.policy == "full":
            return self if isinstance(stages, Pyramid) else self.in_lines(stages)
        most = stages.kept if isinstance(stages, Pyramid) else stages.rows

        def keeping(count: int) -> CachePlan:
            """So many lines, or tokens of a pyramid."""
            if isinstance(stages, Pyramid):
                return replace(self, share=count / max(most, 1), mib=0.0)
            return replace(self, budget=count, mib=0.0)

        def needed(count: int) -> int:
            return shape.cache_bytes(stages, keeping(count), rows)

        fitting = bisect_right(range(1, most + 1), self.mib * MIB, key=needed)
        if not fitting:
            what = "one scale" if isinstance(stages, Pyramid) else "one line"
            raise UserError(
                f"budget: {self.mib:.4g} MiB are not enough for {what} of {rows} sequences (pictures, twice with "
                f"guidance), which takes {needed(1) / MIB:.4g} MiB; choose more, or draw fewer pictures at once."
            )
        return keeping(fitting)

    def lines(self, grid: Grid) -> int:
        """Lines of image tokens that each head has room for: the budget and the line being written.

        Policies under which heads keep unequal numbers get room for HEADROOM times the budget.
        """
        kept = self.budget * (HEADROOM if self.policy in UNEVEN else 1)
        return grid.rows if self.policy == "full" else min(kept + 1, grid.rows)

    def ends(self, grid: Grid, row: int) -> list[int]:
        """After how many tokens of line `row` room is made for the next ones: at its end, and perhaps before.

        Slots of the line that is being written stand empty until their token comes. With a budget of 1 line that is a
        quarter of all slots at any time, and half of them when a line begins. So `fold` makes room in parts there: for
        the next quarter of a line with 1 or 2 lines, half of one with 3. That takes no more memory, and up to five
        times the time of 4 lines' one end (docs/speed.md). Other policies read the queries of a whole line.
        """
        parts = 1
        if self.policy == self.release == "fold" and row > self.budget:  # before that, there are unused slots
            parts = PARTS.get(self.budget, 1)
        size = -(-grid.cols // parts)
        return [*range(size, grid.cols, size), grid.stride]

    def evicts(self, grid: Grid) -> bool:
        """Whether the picture has more lines than the budget and the line being written."""
        return self.policy != "full" and self.budget + 1 < grid.rows

    def ratio(self, stages: Stages) -> float:
        """The budget as a share of what a full cache holds, as papers state it: 4 of 24 lines is 1/6."""
        if self.policy == "full":
            return 1.0
        rows = LINES if isinstance(stages, Pyramid) else stages.rows
        return min(self.share or self.budget / rows, 1.0)

    def protected(self, stages: Stages) -> int:
        """First image tokens that are never evicted: the anchors; of a pyramid, the scales that hold them.

        Where victims of a pyramid are folded, only the scales within the anchors: nothing is lost of what is folded,
        and whatever stays takes room from it.
        """
        if not isinstance(stages, Pyramid):
            return self.anchors
        return stages.within(self.anchors) if self.release == "fold" else stages.whole(self.anchors)

    def keeps(self, pyramid: Pyramid) -> int:
        """Tokens that each head keeps, on average: a share of all scales but the last, which nobody reads."""
        return min(max(1, pyramid.size(0), round(self.ratio(pyramid) * pyramid.kept)), pyramid.kept)

    def sure_slots(self, pyramid: Pyramid, stages: int = 0) -> int:
        """Slots of working memory for each head of a layer that any layer needs: the budget and the last scale drawn.

        Where heads keep unequal numbers, they are rounded up to parts of the budget.
        """
        keeps = self.keeps(pyramid)
        room = -(-keeps // ROOMS) if self.uneven and self.policy not in ACROSS_LAYERS else 0
        return min(keeps + room, pyramid.kept) + pyramid.size((stages or pyramid.stages) - 1)

    def work_slots(self, pyramid: Pyramid, stages: int = 0) -> int:
        """The same for the layer that needs most: with a budget that layers share, at most what one of them may keep.

        stages  scales that are drawn; 0: all
        """
        sure, keeps = self.sure_slots(pyramid, stages), self.keeps(pyramid)
        if self.policy not in ACROSS_LAYERS:
            return sure
        return sure - keeps + (pyramid.kept if self.policy in WHOLE else min(keeps * HEADROOM, pyramid.kept))

    def check_scales(self, pyramid: Pyramid) -> None:
        """Raise UserError if the plan does not suit a picture drawn in scales, or the first scales exceed its share."""
        if self.release == "lazy":
            raise UserError(
                "release: lazy victims stay until the next line overwrites them, and this model draws in scales; "
                "choose strict or fold."
            )
        keeps, protected = self.keeps(pyramid), self.protected(pyramid)
        if keeps < min(protected, pyramid.kept):
            least = next(n for n in range(1, 100) if round(n / 100 * pyramid.kept) >= protected)
            raise UserError(
                f"share: {self.ratio(pyramid):.3g} of {pyramid.kept} tokens are {keeps}, but the first scales hold "
                f"{protected}, which are never evicted; choose {least / 100:g} or more, or fewer anchors."
            )

    def check(self, grid: Grid) -> None:
        """Raise UserError if the policy needs scales, or the protected tokens alone exceed the budget on this grid."""
        if self.policy in ONLY_SCALES:
            raise UserError(
                f"policy: {self.policy} weighs scales, and this model draws in lines; choose fold, or a model that "
                "draws in scales."
            )
        protected = self.anchors + self.recent * grid.stride
        if self.evicts(grid) and protected > self.budget * grid.stride:
            raise UserError(
                f"budget: {self.budget} lines hold {self.budget * grid.stride} tokens, but {self.anchors} anchors and "
                f"{self.recent} recent lines protect {protected}; raise the budget or lower anchors or recent."
            )


def parse_budget(text: str) -> dict[str, Any]:
    """The setting of CachePlan that a budget in the user's words means: "4" or "4 lines", "1/6", "0.17" or "15 %",
    "300 MiB" or "2 GiB". Raises UserError for anything else.
    """
    words = text.strip().lower()
    if found := re.fullmatch(r"(-?[0-9]{1,9})( ?lines?)?", words):
        return {"budget": int(found[1])}
    if found := re.fullmatch(r"([0-9]{1,12}(?:\.[0-9]*)?|\.[0-9]+) ?([kmg]i?b)", words):
        if mib := float(found[1]) * UNITS[found[2]] / MIB:
            return {"mib": mib}
    else:
        with suppress(ValueError, ArithmeticError):
            return {"share": parse_share(words)}
    raise UserError(
        f"budget: {quoted(text)} is not a budget; write lines (4), a share of the full cache (1/6 or 15%) or memory "
        "(300MiB or 2GiB)."
    )


def parse_share(text: str) -> float:
    """A share such as "1/6", "15 %" or "0.17". Raises ValueError or ArithmeticError for anything else, 0 included."""
    above, _, below = text.strip().partition("/")
    if above.endswith("%") and not below:
        above, below = above.removesuffix("%"), "100"
    if share := float(above) / float(below or 1):
        return share
    raise ValueError(f"{text} is nothing")


def parse_seeds(text: str) -> tuple[int, ...]:
    """Seeds such as "3, 7, 100-103", between commas, spaces or line breaks. Raises UserError for anything else."""
    seeds: list[int] = []
    for part in re.split(r"[\s,;]+", text.strip()) if text.strip() else ():
        found = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", part)
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise UserError(f"seeds: {quoted(part)} is not a seed; write whole numbers or ranges, such as 3, 7, 10-13.")
        if len(seeds) + last - first >= MAX_SEEDS:
            raise UserError(f"seeds: {quoted(part)} makes more than {MAX_SEEDS} seeds; give one for each image.")
        seeds += range(first, last + 1)
    return tuple(seeds)


PRESETS = {
    "Balanced": CachePlan("fold", budget=4, recent=0),
    "Small": CachePlan("fold", budget=3, recent=0),
    "Smallest": CachePlan("fold", budget=2, recent=0),
    "Tiny": CachePlan("fold", share=1 / 20, recent=0),  # for large pyramids
    "Compact": CachePlan("fold", budget=2, recent=0, storage="int8"),
    "LineAR": CachePlan("line", budget=4, recent=2),  # as published
    "Full": CachePlan(policy="full"),
}


@dataclass(frozen=True)
class SamplePlan:
    """How tokens are sampled. Raises UserError naming the setting that is out of range.

    seed               image i of a batch uses seed + i, whatever the batch
    guidance           classifier-free guidance scale; 1 or less: none, at half the cost
    guidance_interval  image tokens after which guidance ends and its half of the batch is dropped; -1: never. The same
                       number as LlamaGen's cfg_interval.
    temperature        0: greedy
    top_k              sample from the most likely codes only; 0: all
    top_p              sample from the smallest set of codes with this probability; 1: all
    drafts             tokens that one forward pass checks: the newest one and guesses behind it, with the same codes as
                       without (`loop/drafts.py`). 0: none; -1: by itself, where they were measured to win
    smooth             models that draw in scales: each place gets a mixture of codes around the one that is sampled.
                       Published as "more smooth", for looks; the picture is then more than its tokens
    seeds              a seed for each image, in place of seed + i. A batch may then be split in any way over processes
                       or machines, and the images stay the same
    """

    seed: int = 0
    guidance: float = 4.0
    guidance_interval: int = -1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    drafts: int = 0
    smooth: bool = False
    seeds: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.guidance >= 0 or self.guidance > 1000:
            raise UserError(f"guidance: {self.guidance} is out of range; choose 0 to 1000 (1 means none).")
        if not 0 <= self.temperature <= 100:
            raise UserError(f"temperature: {self.temperature} is out of range; choose 0 (greedy) to 100.")
        if self.top_k < 0:
            raise UserError(f"top-k: {self.top_k} is negative; choose 0 for all codes, or 1 or more.")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top-p: {self.top_p} is out of range; choose more than 0 and at most 1 (all codes).")
        if self.guidance_interval < -1:
            raise UserError(
                f"guidance interval: {self.guidance_interval} is out of range; choose -1 (the whole image) or more."
            )
        if self.drafts < AUTO:
            raise UserError(f"drafts: {self.drafts} is out of range; choose 0 (none) or more, or -1 (automatic).")
        for seed in self.seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"seeds: {seed} is out of range; choose 0 to {MAX_SEED}.")

    def image_seeds(self, images: int) -> tuple[int, ...]:
        """The seed of each image. Raises UserError if there is not one for each."""
        if len(self.seeds) not in (0, images):
            raise UserError(
                f"seeds: there are {len(self.seeds)}, but {images} images are drawn; give one for each, or none."
            )
        return self.seeds or tuple(self.seed + i for i in range(images))

    def select(self, rows: Sequence[int]) -> SamplePlan:
        """The plan for the images with these numbers, which keep their seeds."""
        if self.seeds:
            seeds = tuple(self.seeds[i] for i in rows)
        elif list(rows) == list(range(rows[0], rows[0] + len(rows))):
            return replace(self, seed=self.seed + rows[0])
        else:
            seeds = tuple(self.seed + i for i in rows)
        return replace(self, seed=seeds[0], seeds=seeds if len(seeds) > 1 else ())

    @property
    def guided(self) -> bool:
        """Whether there is guidance at all."""
        return self.guidance > 1

    def guides(self, token: int) -> bool:
        """Whether image token number `token` is sampled with guidance. LlamaGen counts from the second token."""
        return self.guided and (self.guidance_interval < 0 or token - 1 <= self.guidance_interval)


@dataclass(frozen=True)
class PrunePlan:
    """Tokens that are not computed at the last scales (`models/pruning.py`). Raises UserError for what cannot be.

    ratios  share of a scale's tokens that is left out, for the last scales that are drawn, coarse to fine
    first   number of the first layer that leaves any out
    last    number of the last one; -1: the model's last
    """

    ratios: tuple[float, ...]
    first: int = 0
    last: int = -1

    def __post_init__(self) -> None:
        if not self.ratios or not all(0 <= ratio < 1 for ratio in self.ratios):
            raise UserError("prune: each share has to be 0 or more and less than 1; write it as 0.4,0.5.")
        if self.first < 0 or self.last < -1 or 0 <= self.last < self.first:
            raise UserError(f"prune layers: {self.first} to {self.last} are no layers; write them as 3-27.")

    def layer(self, number: int) -> bool:
        """Whether this layer leaves tokens out."""
        return self.first <= number and (self.last < 0 or number <= self.last)

    def check(self, stages: int, layers: int) -> None:
        """Raise UserError if a run of so many scales, or a model of so many layers, cannot do that."""
        if len(self.ratios) >= stages:
            raise UserError(
                f"prune: {len(self.ratios)} of {stages} scales leave no scale to be computed whole; name fewer shares."
            )
        if self.first >= layers or self.last >= layers:
            raise UserError(f"prune layers: the model's layers are 0 to {layers - 1}.")


@dataclass(frozen=True)
class CacheShape:
    """The sizes that decide a cache's memory; each model states its own."""

    layers: int
    heads: int  # key heads
    head_dim: int
    prompt: int  # slots of the prompt
    bytes_per_element: int
    group: int = 1  # query heads that share a key head; does not change the cache, but what a line's end takes
    state: int = 0  # numbers that a layer carries from scale to scale instead of a cache, for each sequence

    def state_bytes(self, rows: int) -> int:
        """What is carried from scale to scale for `rows` sequences, in float32 or better; 0: there is a cache."""
        return self.layers * rows * self.state * max(self.bytes_per_element, 4)

    def line_bytes(self, grid: Grid, rows: int) -> int:
        """Keys and values of one line for `rows` sequences (images, twice with guidance)."""
        return 2 * self.layers * rows * self.heads * self.head_dim * grid.stride * self.bytes_per_element

    def scales_bytes(self, pyramid: Pyramid, plan: CachePlan, rows: int, stages: int = 0) -> int:
        """Keys and values over the scales for `rows` sequences: every layer's budget and one working memory.

        Exact, but for policies that divide a budget among layers: while a scale is drawn, the earlier layers may have
        grown before the later ones shrink. Then it is the most there can be. Without a cache, the state that joins the
        scales, whatever the plan.

        stages  scales that are drawn; 0: all
        """
        if self.state:
            return self.state_bytes(rows)
        heads = 2 * rows * self.heads
        slot = self.slot_bytes(plan.storage, 4)
        held = self.layers * heads * plan.keeps(pyramid) * slot
        if plan.policy in ACROSS_LAYERS and plan.keeps(pyramid) < pyramid.kept:
            held += held if plan.policy in WHOLE else held * (HEADROOM - 1) // 2
        return held + heads * plan.work_slots(pyramid, stages) * self.head_dim * self.bytes_per_element

    def cache_bytes(self, stages: Stages, plan: CachePlan, rows: int) -> int:
        """Keys and values of the whole cache for `rows` sequences, whether they are drawn in lines or in scales."""
        if isinstance(stages, Pyramid):
            return self.scales_bytes(stages, plan, rows)
        return self.bytes(stages, plan.in_lines(stages), rows)

    def bytes(self, grid: Grid, plan: CachePlan, rows: int) -> int:
        """Keys and values of the whole cache for `rows` sequences, as allocated before the first token."""
        slots = self.prompt + plan.lines(grid) * grid.stride
        heads = 2 * self.layers * rows * self.heads  # keys and values
        return heads * slots * self.slot_bytes(plan.storage, self.bytes_per_element)

    def slot_bytes(self, storage: str, scale: int) -> int:
        """A key, or a value, of one head, with a scale of so many bytes where the storage has one."""
        if storage == "full":
            return self.head_dim * self.bytes_per_element
        if storage == "int8":
            return self.head_dim + scale
        return self.head_dim // 2 + 2 * ceil(self.head_dim / 16) + scale  # a floor and a step for 16 elements

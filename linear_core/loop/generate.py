"""The loop: from a prompt to one Line per row. Whatever is not done per token is done once per line."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.line_cache import LineCache, Window
from ..cache.look_ahead import Rotate, by_matrices
from ..cache.view import View
from ..errors import UserError
from ..events import Line, Stage, Step, totals
from ..grid import Grid
from ..plan import CachePlan, CacheShape, SamplePlan
from ..policies import Policy, choose, get_policy
from .drafts import Check, Drafts, Passes, check, window_size
from .memory import fold_pairs, layers_at_once
from .redraw import DRAW, check_kept, merged, pieces
from .sampling import Noise, apply_guidance, filter_logits, not_finite, sample_codes


class Decoder(Protocol):
    """What `generate` needs of a model. Shapes are those of models.raster.Raster."""

    grid: Grid
    codes: int
    dtype: torch.dtype
    device: torch.device

    def cache_shape(self, prompt: int) -> CacheShape: ...  # for a prompt of this length
    def with_unconditional(self, prompt: Any) -> Any: ...
    def prefill(self, prompt: Any, cache: LineCache) -> Tensor: ...
    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor: ...
    def feed(
        self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache, all_logits: bool = False
    ) -> Tensor: ...
    def peek(  # with drafts only
        self, tokens: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache
    ) -> tuple[Tensor, Window]: ...
    def rotate_ahead(self, grid: Grid, queries: Tensor, lines: int, columns: int) -> Tensor: ...


Forward = Callable[[Tensor, Tensor, Tensor, Tensor, LineCache], Tensor]
Evict = Callable[[LineCache, Policy, int, Rotate], None]


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompt: Any,
    plan: CachePlan,
    sample: SamplePlan,
    *,
    step: Forward | None = None,
    line_end: Evict | None = None,
    check_drafts: Check | None = None,
    static: bool = False,
    above: Tensor | None = None,
    kept: Tensor | None = None,
    name: str = "the model",
) -> Iterator[Line]:
    """Draw one image for each row of `prompt`; yields a Line when a row of tokens is finished.

    plan      what the cache keeps
    sample    how tokens are sampled
    step          replaces the decoder's own (compiled, captured)
    line_end      replaces `evict` (captured)
    check_drafts  replaces `check` (captured)
    static        every step has the same shape, at the price of reading slots that are still empty
    above         codes B rows cols, or one image's for all: lines that exist already. They are fed a line at a time,
                  with the same eviction at every line's end, so the cache is as if they had been drawn; drawing goes on
                  below
    kept      codes B rows cols, or one image's for all, of pictures that exist already, DRAW (-1) where to draw anew.
                  Kept codes are fed in their turn, with the same eviction; those that are drawn see what is kept above
                  them and to their left, and nothing below
    name          what error messages call the model

    Raises UserError before anything is allocated if the settings do not fit the model, and at the end of a line whose
    logits are not finite. Dropping the iterator frees all memory.
    """
    policy = get_policy(plan.policy)
    image_grid = prompt.grid or decoder.grid
    images, device = prompt.rows, decoder.device
    if images < 1:
        raise UserError("prompt: it is empty; give at least one class or text.")
    known = check_kept(kept, _check_above(above, images, image_grid, decoder.codes), images, image_grid, decoder.codes)
    given = [known is not None and bool((known[:, row] != DRAW).all()) for row in range(image_grid.rows)]
    first = given.index(False)
    every = [(column, column + 1) for column in range(image_grid.cols)]
    window = window_size(decoder, sample, images, image_grid)
    seeds = sample.image_seeds(images)
    prompt = prompt.to(device)
    rows = decoder.with_unconditional(prompt) if sample.guided else prompt
    grid = image_grid.after(rows.length)
    shape = decoder.cache_shape(rows.length)
    plan = plan.resolve(shape, grid, rows.rows)
    plan.check(grid)
    reads = policy.reads | ({"ahead"} if plan.release == "fold" else set())
    cache = LineCache(shape, rows.rows, grid, plan, dtype=decoder.dtype, device=device, reads=reads, static=static)
    rotate = partial(decoder.rotate_ahead, grid)
    step = step or decoder.step
    noise = Noise(seeds, images, decoder.codes, device)
    index = torch.arange(grid.prompt, grid.prompt + grid.tokens, device=device)
    columns = torch.arange(grid.stride, device=device)
    pad = rows.pad
    drafts = Drafts(decoder, cache, sample, noise, pad, images, window, known) if window else None
    make_room = partial(room_after, cache, policy, rotate, evict=line_end or evict)
    non_finite = torch.zeros((), device=device)  # NaN once a logit is not finite; read at a line's end only

    started = time.perf_counter()
    logits = decoder.prefill(rows, cache)
    cache.extend()
    for row in range(grid.rows):
        tokens, passes = torch.empty(images, grid.cols, dtype=torch.int64, device=device), Passes()
        line, spans = None if known is None else known[:, row], every
        ends = plan.ends(grid, row)
        if line is not None:
            tokens.copy_(line)
            spans = pieces(line != DRAW, ends)
        if drafts and row >= first:
            if row == first:  # later lines begin with a code that is known
                non_finite += logits.sum() * 0
                code = draw(logits, row * grid.stride, images, sample, noise)
                drafts.begin(row * grid.stride, code if line is None else merged(tokens[:, 0], code))
            passes, spans = drafts.draw_line(row, check_drafts or check, ends, make_room), []
            non_finite += drafts.non_finite
            tokens.copy_(drafts.codes[:, row * grid.stride :][:, : grid.cols])
        for column, end in spans:
            number = row * grid.stride + column
            if line is None or (line[:, column] == DRAW).any():
                non_finite += logits.sum() * 0  # NaN and infinity times 0 are NaN
                token = draw(logits, number, images, sample, noise)
                tokens[:, column] = token if line is None else merged(tokens[:, column], token)
            fed = end - column - 1 + grid.tokens_fed(end - 1)  # the end-of-line token is known, so it needs no logits
            if number + fed == grid.tokens:
                break  # it is the last
            if cache.rows > images and not sample.guides(number + fed):
                cache.keep_rows(images)
                pad = pad[:images]
            fed_index, fed_columns = index[number : number + fed], columns[column : column + fed]
            if fed == 1:
                logits = step(tokens[:, column].repeat(cache.rows // images), fed_index, pad, fed_columns, cache)
            else:
                codes = tokens[:, column:end]
                codes = F.pad(codes, (0, column + fed - end), value=0 if grid.eol is None else grid.eol)
                logits = decoder.feed(codes.repeat(cache.rows // images, 1), fed_index, pad, fed_columns, cache)
            if end in ends[:-1]:
                make_room(row, end)
        if row + 1 < grid.rows:
            make_room(row, grid.stride)
        share, by_head, stands = cache.share_held(images), cache.held_by_head(0), cache.stands_for(images)
        held = round(float(share.sum()) / images, 3)
        tokens_now = tokens.cpu()  # the only point in a line where the host waits for the device
        if non_finite != 0:
            raise UserError(not_finite(name, decoder.dtype, f"line {row + 1} of {grid.rows}"))
        now = time.perf_counter()
        yield Line(
            row, grid.rows, tokens_now, share.cpu(), held, now - started, cache.nbytes, by_head.cpu(), given[row],
            None if stands is None else stands.cpu(), passes.count, passes.accepted,
        )  # fmt: skip
        started = time.perf_counter()


def draw(logits: Tensor, number: int, images: int, sample: SamplePlan, noise: Noise) -> Tensor:
    """Sample image token `number` of each image from the logits of all sequences, (2 B) V if guided: int64 B."""
    return sample_codes(scores(logits, number, images, sample), noise.exponential(number), sample.temperature)


def scores(logits: Tensor, number: int, images: int, sample: SamplePlan) -> Tensor:
    """Guided logits of image token `number` of each image, -inf for codes that may not be drawn: B V."""
    guided = apply_guidance(logits, images, sample.guidance) if sample.guides(number) else logits[:images]
    return filter_logits(guided, sample.top_k, sample.top_p, sample.temperature)


def _check_above(above: Tensor | None, images: int, grid: Grid, codes: int) -> Tensor:
    """`above` for every image: int64 B rows cols. Raises UserError if it does not fit the grid or the codebook."""
    if above is None or above.shape[1] == 0:
        return torch.empty(images, 0, grid.cols, dtype=torch.int64)
    count, rows, cols = above.shape
    if cols != grid.cols or rows >= grid.rows:
        raise UserError(
            f"tokens: there are {rows} lines of {cols}, but the model draws {grid.rows} lines of {grid.cols}; give at "
            f"most {grid.rows - 1} lines of {grid.cols} tokens."
        )
    if count not in (1, images):
        raise UserError(
            f"tokens: there are {count} pictures, but {images} are drawn; give one, or one for each (see batch_size)."
        )
    if int(above.min()) < 0 or int(above.max()) >= codes:
        raise UserError(
            f"tokens: code {int(above.max())} is not one of the model's {codes} codes; give tokens of this model."
        )
    return above.expand(images, -1, -1)


def evict(cache: LineCache, policy: Policy, row: int | Tensor, rotate: Rotate) -> None:
    """Evict from a full cache as many tokens as its next part has; they overwrite the victims.

    The work is the same for every line, so it can be captured in a CUDA graph (`graph.py`); `row` is then a tensor of
    one element on the device. The first eviction of a cache also runs the policy's survey and cannot be captured.
    """
    plan, rotate, (first, last) = cache.plan, by_matrices(rotate), cache.part
    layers = layers_at_once(cache.shape, cache.extent, cache.rows, last - first < cache.grid.stride)
    views: Iterable[View] = (
        cache.view(row, slice(layer, layer + layers), rotate, cache.part)
        for layer in range(0, cache.shape.layers, layers)
    )
    if policy.survey is not None and cache.survey is None:
        views = list(views)
        cache.survey = torch.cat([policy.survey(view) for view in views])
        views = [replace(view, survey=cache.survey) for view in views]
    if plan.release == "fold":  # compares all pairs of slots, which takes too much memory for all rows at once
        pairs = fold_pairs(cache.index.device.type)
        views = (part for view in views for part in view.parts(pairs))
    for view in views:
        scores = policy.score(view)
        keep = None if policy.keep is None else policy.keep(view, scores, plan)
        victims = choose(
            scores, view, view.released, anchors=plan.anchors, recent=plan.recent, prompt_slots=cache.shape.prompt,
            keep=keep,
        )  # fmt: skip
        cache.release(view, victims)


def room_after(cache: LineCache, policy: Policy, rotate: Rotate, row: int, column: int, evict: Evict = evict) -> None:
    """Decide where the tokens are written that follow the first `column` tokens of line `row`.

    A part of a line (`CachePlan.ends`) or a line has ended there. The next is written to unused slots, or over the
    victims of `evict`.
    """
    plan, grid = cache.plan, cache.grid
    if plan.evicts(grid) and row >= plan.budget:
        down, first = divmod(column, grid.stride)
        cache.part = (first, next(end for end in plan.ends(grid, row + down) if end > first))
        # Larger than now if heads keep unequal numbers: some use the extra room from here on.
        cache.extent = cache.slots
        evict(cache, policy, row, rotate)
        return
    if cache.mass is not None:
        for layer in range(cache.shape.layers):
            cache.view(row, slice(layer, layer + 1))  # adds the line's attention to mass
    cache.extend()


class Run:
    """The lines of one run, and totals over them."""

    def __init__(self) -> None:
        self.lines: list[Any] = []  # of Line, of Stage, or of Step

    def add(self, line: Line | Stage | Step) -> None:
        if not isinstance(line, Step):
            line = replace(line, by_head=None)  # large, and only of interest while the run goes on
        self.lines.append(line)

    @property
    def tokens(self) -> Tensor:
        """Codes so far, on the CPU: int64 B rows cols, or B N of all scales."""
        return (torch.cat if self.canvas is not None else torch.stack)([line.tokens for line in self.lines], 1)

    @property
    def images(self) -> int:
        """Pictures of the batch."""
        return len(self.tokens if self.latents is None else self.latents)

    @property
    def canvas(self) -> Tensor | None:
        """The running picture B Z h w of a model that draws in scales; None for others."""
        return self.lines[-1].canvas if self.lines and isinstance(self.lines[-1], Stage) else None

    @property
    def latents(self) -> Tensor | None:
        """What a masked model has drawn so far, B Z h w with NaN in the gaps; None for others."""
        return self.lines[-1].latents if self.lines and isinstance(self.lines[-1], Step) else None

    @property
    def shares(self) -> Tensor:
        """Share of layers and heads that held each token after each line: float32 B lines rows cols, or B scales N."""
        return torch.stack([line.share for line in self.lines], 1)

    @property
    def seconds(self) -> float:
        """Of all lines."""
        return sum(line.seconds for line in self.lines)

    @property
    def tokens_per_second(self) -> float:
        """Of all images together, without lines that were given."""
        drawn = [line for line in self.lines if not line.replayed]
        return sum(line.tokens.numel() for line in drawn) / max(sum(line.seconds for line in drawn), 1e-9)

    @property
    def passes(self) -> float:
        """Forward passes of the lines drawn with drafts; 0 without drafts."""
        return totals(self.lines)[0]

    @property
    def accepted(self) -> float:
        """Share of the checked drafts that were right; 0 without drafts."""
        return totals(self.lines)[1]

    @property
    def tokens_per_pass(self) -> float:
        """Codes of each image that a pass with drafts gave, on average; 0 without drafts."""
        drawn = sum(line.tokens.shape[1] for line in self.lines if line.passes)
        return drawn / self.passes if drawn else 0.0

    @property
    def held(self) -> float:
        """The most image tokens held per head between two lines."""
        return max((line.held for line in self.lines if line.row + 1 < line.rows), default=0.0)

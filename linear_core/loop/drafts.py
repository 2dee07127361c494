"""Drafts: tokens guessed ahead and checked in one forward pass. They change no code of the picture.

Noise is addressed by (seed, token, code), so a code is a function of the codes before it. A pass feeds a window: the
newest token that is known, and guesses behind it. A code is sampled after each. A guess that equals the code sampled in
front of it is right if all guesses before it are right; the first that differs is replaced by the sampled code, which
is right all the same. What was sampled further on are the next pass's guesses (Jacobi iteration). So every pass fixes
at least one token, and the codes are those of drawing one token after another, whatever the window.

In floating point, logits depend on the number of tokens in a pass, in their last digits. Where two codes are nearly
tied, the other one may then win, as it may in a batch of another size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.line_cache import LineCache, Window
from ..errors import UserError
from ..grid import Grid
from ..plan import AUTO, SamplePlan
from .redraw import DRAW, merged
from .sampling import Noise, apply_guidance, filter_logits, sample_codes

AUTO_WINDOW = 8  # tokens: the best by the clock for one image on a CPU. Fewer passes, as with 24, do not pay there


class Peeks(Protocol):
    """What drafts need of a model. Shapes are those of models.raster.Raster."""

    dtype: torch.dtype
    device: torch.device

    def peek(
        self, tokens: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache
    ) -> tuple[Tensor, Window]: ...


def window_size(decoder: Peeks, sample: SamplePlan, images: int, grid: Grid) -> int:
    """Tokens of a window; 0: one token after another. Raises UserError if the model or its grid does not allow it.

    By itself a window is used where it was measured to win and nothing but rounding in float32 can differ: for a
    single image on a CPU.
    """
    size = sample.drafts
    if size == AUTO:
        wins = images == 1 and decoder.device.type == "cpu" and decoder.dtype == torch.float32
        size = min(AUTO_WINDOW, 2 * grid.stride) if wins and hasattr(decoder, "peek") else 0
    if size > 2 * grid.stride:
        raise UserError(
            f"drafts: {size} tokens are more than two lines of {grid.stride}; choose at most {2 * grid.stride}."
        )
    if size and not hasattr(decoder, "peek"):
        raise UserError("drafts: this model cannot check several tokens in one pass; set drafts to 0.")
    return size


@dataclass
class Passes:
    """How many passes there were, and how many drafts were checked in them and right."""

    count: int = 0
    checked: int = 0
    right: int = 0

    def add(self, before: list[int], after: list[int], most: list[int]) -> None:
        """A pass that took each image from one number to the next, where `most` would have been possible."""
        self.count += 1
        for first, last, limit in zip(before, after, most, strict=True):
            if limit:  # the image did not wait
                self.right += last - first - 1
                self.checked += min(last - first, limit - 1)

    @property
    def accepted(self) -> float:
        """Share of the checked drafts that were right."""
        return self.right / self.checked if self.checked else 0.0


class Drafts:
    """The codes of a batch's images, known and guessed.

    Every image has its own place in the line. Those that are ahead wait at the line's end, or where guidance ends.

    codes       int64 B N, all tokens of the image, end-of-line tokens included; guesses behind the known ones
    kept        int64 B N, codes that exist already, and DRAW elsewhere; None: none does. They are their own drafts
    number      int64 B, each image's newest known token: the next to be fed
    non_finite  NaN once a logit of a known token is not finite

    All are updated in place, so that a pass can be captured in a CUDA graph.
    """

    def __init__(
        self,
        decoder: Peeks,
        cache: LineCache,
        sample: SamplePlan,
        noise: Noise,
        pad: Tensor,
        images: int,
        size: int,
        kept: Tensor | None = None,
    ):
        self.decoder, self.cache, self.sample, self.noise = decoder, cache, sample, noise
        self.pad, self.images, self.size = pad, images, size
        device = cache.index.device
        self.codes = torch.zeros(images, cache.grid.tokens, dtype=torch.int64, device=device)
        self.number = torch.zeros(images, dtype=torch.int64, device=device)
        self.non_finite = torch.zeros((), device=device)
        self.kept: Tensor | None = None
        if kept is not None:  # B rows cols
            ends = cache.grid.stride - cache.grid.cols
            self.kept = F.pad(kept, (0, ends), value=DRAW).flatten(1).to(device)

    def begin(self, number: int, code: Tensor) -> None:
        """Token `number` of each image is known: `code` B. Those behind it are guessed to equal it."""
        self.number.fill_(number)
        self.guess(self.number, code[:, None])

    def guess(self, number: Tensor, codes: Tensor) -> None:
        """`codes` B T stand from token `number` B on. Tokens behind them repeat the last; ends of lines are known."""
        grid, token = self.cache.grid, torch.arange(self.cache.grid.tokens, device=number.device)
        place = token - number[:, None]
        found = torch.where(place < 0, self.codes, codes.gather(1, place.clamp(0, codes.shape[1] - 1)))
        if grid.eol is not None:
            found = found.masked_fill(token % grid.stride == grid.cols, grid.eol)
        self.codes.copy_(found if self.kept is None else merged(self.kept, found))

    def draw_line(self, row: int, check: Check, ends: list[int], make_room: Callable[[int, int], None]) -> Passes:
        """Draw line `row`, whose first code is known, and feed it. The host waits for the device once a pass.

        `make_room` is called with row and column at each of `ends` but the last.
        """
        grid, cache, sample = self.cache.grid, self.cache, self.sample
        number = row * grid.stride
        end = number + (grid.stride if row + 1 < grid.rows else grid.cols - 1)  # the last code is not fed
        passes = Passes()
        numbers = [number] * self.images
        while number < end:
            column = next(n for n in ends if number < row * grid.stride + n)
            stop = part = min(row * grid.stride + column, end)
            if cache.rows > self.images and not sample.guides(number + 1):
                cache.keep_rows(self.images)
            elif cache.rows > self.images and sample.guidance_interval >= 0:
                stop = min(part, sample.guidance_interval + 1)  # from here on the unconditional rows are dropped
            while number < stop:
                check(self, stop)
                before, numbers = numbers, self.number.tolist()
                number = min(numbers)
                passes.add(before, numbers, [min(self.size, stop - first) for first in before])
            if number == row * grid.stride + column and column in ends[:-1]:
                make_room(row, column)
        return passes


Check = Callable[[Drafts, int | Tensor], None]


def check(drafts: Drafts, stop: int | Tensor) -> None:
    """One pass over a window of each image: sample, accept, and guess anew. No image goes beyond token `stop`.

    Logits of tokens behind `stop` are guesses at best: they come from before the line's eviction.
    """
    cache, sample, images, number = drafts.cache, drafts.sample, drafts.images, drafts.number
    grid, repeat = cache.grid, cache.rows // images
    window = torch.arange(drafts.size, device=number.device)
    token = number[:, None] + window
    fed = drafts.codes.gather(1, token.clamp(max=grid.tokens - 1))
    column, index = (number % grid.stride).repeat(repeat), (number + grid.prompt).repeat(repeat)
    pad = drafts.pad[: cache.rows]
    logits, peeked = drafts.decoder.peek(fed.repeat(repeat, 1), index, pad, column, cache)
    scores = apply_guidance(logits, images, sample.guidance) if repeat > 1 else logits
    scores = filter_logits(scores, sample.top_k, sample.top_p, sample.temperature)
    codes = sample_codes(scores, drafts.noise.exponential(token + 1), sample.temperature)
    if grid.eol is not None:
        codes = codes.masked_fill((token + 1) % grid.stride == grid.cols, grid.eol)
    if drafts.kept is not None:
        codes = merged(drafts.kept.gather(1, (token + 1).clamp(max=grid.tokens - 1)), codes)
    right = (fed[:, 1:] == codes[:, :-1]).cumprod(1).sum(1)
    accepted = torch.minimum(right + 1, stop - number).clamp(min=0)
    kept = accepted.repeat(repeat)
    drafts.non_finite += (logits.sum(-1) * 0).masked_fill(window >= kept[:, None], 0.0).sum()
    cache.accept(peeked, index, column, kept)
    drafts.guess(number + 1, codes)
    drafts.number += accepted

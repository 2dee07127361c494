"""View: what a policy may look at when a line has ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..grid import Grid
from .attention import line_probabilities
from .outlook import LINES, Outlook, look_ahead, wide

SPARE = 0.1


@dataclass(frozen=True)
class View:
    """The cache at a line's end, read only. L layers, B rows of the batch, H key heads, S slots, C tokens a line.

    The loop shows one layer after the other, each as a view with L = 1, so that what a policy computes stays small.

    keys, values  L B H S D, keys rotated to their true positions
    bias          L B H S, ln of how many tokens a slot stands for; -inf: nothing there
    index         int32 L B H S, which token of the sequence; -1: nothing there
    queries       L B H C D of the finished line, rotated; None unless the policy reads "queries" or "ahead"
    mass          L B H S, attention received so far, summed over all queries; None unless the policy reads "mass"
    row           the line that has just finished. Where a line's end is recorded (`graph.py`) a tensor of one number,
                  which is fit for arithmetic and to be compared with tensors, and for nothing else
    layer         number of the first layer shown
    turn          turns queries as if they stood so many lines later: the model's rotation; None unless the policy reads
                  "ahead"
    first         number of the first row shown
    survey        all layers B ..., what the policy's survey found at the first eviction; None unless it has one
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    index: Tensor
    queries: Tensor | None
    mass: Tensor | None
    grid: Grid
    row: int | Tensor
    layer: int = 0
    turn: Callable[[Tensor, int], Tensor] | None = None
    survey: Tensor | None = None
    first: int = 0
    _outlooks: dict[tuple[int, ...], Outlook] = field(default_factory=dict, init=False, repr=False, compare=False)

    def parts(self, pairs: int) -> Iterator[View]:
        """The same, so many rows at a time that they have at most `pairs` pairs of slots, or one by one."""
        count = max(1, pairs // (self.index.shape[2] * self.index.shape[3] ** 2))
        for first in range(0, self.index.shape[1], count):
            cut = slice(first, first + count)
            shown: dict[str, Any] = {
                name: None if (held := getattr(self, name)) is None else held[:, cut]
                for name in ("keys", "values", "bias", "index", "queries", "mass", "survey")
            }
            yield replace(self, **shown, first=first)

    @property
    def newest(self) -> int | Tensor:
        """Index of the newest token held."""
        return self.grid.index(self.row + 1) - 1

    def attention(
        self, reduce: Callable[[Tensor], Tensor], last: int | None = None, image_only: bool = False
    ) -> Tensor:
        """Attention of the finished line's queries, or of its `last` few, over all that is held: softmax, causal.

        `image_only` leaves the prompt out of the softmax.
        `reduce` turns one layer's float32 B H C S into B H S; layers are taken one at a time to bound memory.
        Returns L B H S.
        """
        assert self.queries is not None, "the policy does not declare that it reads queries"
        count = self.queries.shape[3] if last is None else min(last, self.queries.shape[3])
        bias = self.bias.masked_fill(~self.candidates(), float("-inf")) if image_only else self.bias
        layers = zip(self.queries[:, :, :, -count:], self.keys, bias, self.index, strict=True)
        return torch.stack([reduce(line_probabilities(q, k, b, i, self.newest + 1 - count)) for q, k, b, i in layers])

    def outlook(self, lines: tuple[int, ...] = LINES) -> Outlook:
        """What the lines that come so much later will look at. Computed once; asked for by scores and by folding."""
        assert self.queries is not None and self.turn is not None, "the policy does not declare that it reads ahead"
        if lines not in self._outlooks:
            queries = torch.cat([self.turn(self.queries, n) for n in lines], 3)
            self._outlooks[lines] = look_ahead(queries, self.keys, self.bias)
        return self._outlooks[lines]

    def strength(self) -> Tensor:
        """How much each slot counts for the coming lines, L B H S: the attention foreseen, and a tenth of what an image
        token draws on average for each token in it, as the forecast may be wrong about one that it gives nothing. 0 for
        what is empty."""
        mass = self.outlook().mass
        weight = wide(self.bias).exp()
        image = weight * self.candidates()
        mean = (mass * self.candidates()).sum(-1, keepdim=True) / image.sum(-1, keepdim=True).clamp(min=1)
        return mass + SPARE * mean * weight

    def candidates(self) -> Tensor:
        """Bool L B H S: image tokens, the only ones that can be evicted."""
        return self.index >= self.grid.prompt

    def by_index(self, scores: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `smooth` along the sequence: slots are in no order, neighbours in the image are neighbours by index."""
        order = self.index.argsort(dim=-1, stable=True)
        smoothed = smooth(scores.gather(-1, order))
        return torch.empty_like(scores).scatter_(-1, order, smoothed)

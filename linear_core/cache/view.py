"""View: what a policy can read at the end of a line."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..plan import pairs_of_head
from ..pyramid import Pyramid, Stages
from .attention import attention_weights, stack_groups
from .look_ahead import HORIZONS, LookAhead, Rotate, has_fast_bfloat16, upcast

FLOOR = 0.1  # of the mean importance of an image token
SCALES_FLOOR = 1.0  # the same over scales, whose queries are harder to foresee
VALUES = 0.3  # spread of values by that of keys in distances, where little is kept; over scales they are equal


@dataclass(frozen=True)
class View:
    """The cache at a line's end, read only. L layers, B rows of the batch, H key heads, S slots, C tokens a line.

    The loop passes a few layers at a time, one if it draws many images, which keeps a policy's temporaries small.

    keys, values  L B H S D, keys rotated to their true positions
    bias          L B H S, ln of the slot's weight; -inf: empty
    index         int32 L B H S, index of the slot's token in the sequence; -1: empty
    queries       L B Q C D of the finished line, rotated; None unless the policy reads "queries", "mass" or "ahead".
                  Q query heads: as many for each key head, next to each other
    mass          L B H S, attention received so far, summed over all tokens; None unless the policy reads "mass"
    row           the line that has just finished. When a line's end is captured as a CUDA graph (`loop/graph.py`), this
                  is a tensor of one element: use it only in arithmetic and in comparisons with tensors
    layer         number of the first layer in the view
    rotate        rotates queries to so many lines further down and columns to the right, with the model's RoPE; for
                  policies that read "ahead"
    first         number of the first row of the batch in the view
    survey        all layers B ..., result of the policy's survey at the first eviction; None unless it has one
    keeps         image tokens that each head will keep, on average; 0: all but a line
    rows, heads   numbers of the rows and heads that are shown, int64, as one index of x B H ...: x[rows, heads]. None:
                  all, in order
    first_head    number of the first head in the view
    protected     first image tokens that no head will lose, whatever their score; 0: not told
    prompt_slots  slots at the front that belong to the prompt; 0: not told
    coming        tokens that room is made for; 0: those of a line
    missing       tokens of the line that have not come yet, where room is made within it (`CachePlan.ends`). At their
                  columns, queries are those of the line above

    A picture drawn in scales (`Pyramid`) is shown at the end of a layer's pass over a scale: "line" above is then
    "scale", C is some of its queries, evenly spread, and every query sees the whole scale.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    index: Tensor
    queries: Tensor | None
    mass: Tensor | None
    grid: Stages
    row: int | Tensor
    layer: int = 0
    rotate: Rotate | None = None
    survey: Tensor | None = None
    first: int = 0
    keeps: int = 0
    rows: Tensor | None = None
    heads: Tensor | None = None
    first_head: int = 0
    protected: int = 0
    prompt_slots: int = 0
    coming: int = 0
    missing: int = 0
    _look_aheads: dict[tuple[int, ...], LookAhead] = field(default_factory=dict, init=False, repr=False, compare=False)

    def parts(self, pairs: int) -> Iterator[View]:
        """The view split by rows: each part has at most `pairs` pairs of slots, but at least one row.

        Where slots are few, their vectors count instead (`pairs_of_head`). Over scales, where a head may have thousands
        of slots, the view is also split by heads: a part then has at least one head.
        """
        heads, slots = self.index.shape[2:]
        each = slots**2 if isinstance(self.grid, Pyramid) else pairs_of_head(slots, self.keys.shape[-1], self.in_parts)
        count = max(1, pairs // (heads * each))
        if isinstance(self.grid, Pyramid):
            yield from self._parts_of_rows_and_heads(count, max(1, pairs // self.index.shape[3] ** 2))
            return
        total = self.index.shape[1]
        count = -(-total // -(-total // count))  # parts of nearly equal size
        for first in range(0, total, count):
            rows = slice(first, first + count)
            shown: dict[str, Any] = {
                name: None if (tensor := getattr(self, name)) is None else tensor[:, rows]
                for name in ("keys", "values", "bias", "index", "queries", "mass", "survey")
            }
            yield replace(self, **shown, first=first)

    def _parts_of_rows_and_heads(self, rows: int, heads: int) -> Iterator[View]:
        """At most so many rows, and heads, at a time. What the survey found is not split: see `own`."""
        count = self.index.shape[1:3]
        if rows >= count[0] and heads >= count[1]:
            yield self
            return
        all_rows, all_heads = self.rows, self.heads
        if all_rows is None or all_heads is None:
            all_rows, all_heads = (torch.arange(n, device=self.index.device) for n in count)
            all_rows, all_heads = all_rows[:, None], all_heads[None]
        for first in range(0, count[0], rows):
            for first_head in range(0, count[1], heads):
                cut = slice(first, first + rows), slice(first_head, first_head + heads)
                shown: dict[str, Any] = {
                    name: None if (tensor := getattr(self, name)) is None else tensor[(slice(None), *cut)]
                    for name in ("keys", "values", "bias", "index", "queries", "mass")
                }
                own_rows, own_heads = (x.expand(count)[cut] for x in (all_rows, all_heads))
                yield replace(self, **shown, first=first, first_head=first_head, rows=own_rows, heads=own_heads)

    def own(self, found: Tensor) -> Tensor:
        """What a survey found, all layers B H ..., for the layers, rows and heads of the view: L B H ..."""
        layers = found[self.layer :][: len(self.index)]
        return layers if self.rows is None else layers[:, self.rows, self.heads]

    @property
    def newest(self) -> int | Tensor:
        """Index of the newest token in the cache."""
        return self.first_of(1) - 1 - self.missing

    def first_of(self, stages: int) -> int | Tensor:
        """Index of the first token of the line or scale so many further on: 0 is the finished one."""
        if isinstance(self.grid, Pyramid):
            return self.grid.index(max(int(self.row) + stages, 0))
        return self.grid.index(self.row + stages)

    def staying(self) -> Tensor:
        """Image tokens that each head will keep, on average: L B H 1."""
        held = self.candidates().sum(-1, keepdim=True)
        return held.clamp(max=self.keeps) if isinstance(self.grid, Pyramid) else held - self.released

    @property
    def released(self) -> int:
        """Tokens that each head releases, on average."""
        if isinstance(self.grid, Pyramid):
            return self.index.shape[-1] - self.keeps
        return self.coming or self.grid.stride

    @property
    def in_parts(self) -> bool:
        """Whether room is made in parts of a line, so little is kept: then what folds is looked at more closely."""
        return not isinstance(self.grid, Pyramid) and 0 < self.coming < self.grid.stride

    def age(self) -> Tensor:
        """How many queries have seen each slot's token: L B H S, at least 1."""
        if not isinstance(self.grid, Pyramid):
            return (self.newest + 1 - self.index).clamp(min=1)
        first = torch.zeros_like(self.index)
        for stage in range(1, int(self.row) + 1):
            first = first.masked_fill(self.index >= self.grid.index(stage), self.grid.index(stage))
        return self.newest + 1 - first

    def attention(
        self,
        reduce: Callable[[Tensor], Tensor],
        last: int | None = None,
        image_only: bool = False,
        apart: bool = False,
    ) -> Tensor:
        """Causal softmax of the finished line's queries, or of its `last` few, over all slots, reduced to L B H S.

        Of query heads that share a key head, the mean: what a token receives from the whole group.

        reduce      maps one layer's float32 B H C S to B H S; layers are computed one at a time to bound memory
        image_only  leaves the prompt out of the softmax
        apart       shows `reduce` each of the G query heads that share a key head, B H G C S, instead of their mean
        """
        assert self.queries is not None, 'the policy does not declare that it reads "queries"'
        count = self.queries.shape[3] if last is None else min(last, self.queries.shape[3])
        bias = self.bias.masked_fill(~self.candidates(), float("-inf")) if image_only else self.bias
        keys, first = self.keys, self.newest + 1 - count
        if isinstance(self.grid, Pyramid):  # a scale's queries see all of it; products of unit keys need float32
            keys, first = upcast(keys), self.newest
        layers = zip(self.queries[:, :, :, -count:], keys, bias, self.index, strict=True)
        return torch.stack([reduce(attention_weights(q, k, b, i, first, apart)) for q, k, b, i in layers])

    def look_ahead(self, lines: tuple[int, ...] = ()) -> LookAhead:
        """Predicted attention of the lines `lines` further down. Computed once, for scoring and folding alike.

        By default of several, HORIZONS: all queries are rotated to the first of them, because a query looks right above
        itself, and to each of the others every third one is. Where little is kept (`in_parts`), all are also rotated to
        the next line and one column aside, right and left in turn, because content moves from column to column. Of a
        pyramid only of the next scale.
        """
        lines = (1,) if isinstance(self.grid, Pyramid) else lines
        assert self.queries is not None and self.rotate is not None, 'the policy does not declare that it reads "ahead"'
        if lines not in self._look_aheads:
            first, *further = HORIZONS
            queries, every = upcast(self.queries) * self.queries.shape[-1] ** -0.5, slice(None)
            places = [(first, 0, every)] + [(n, 0, slice(start, None, len(further))) for start, n in enumerate(further)]
            if self.in_parts:
                places += [(first, 1, slice(0, None, 2)), (first, -1, slice(1, None, 2))]
            places = [(n, 0, every) for n in lines] or places
            queries = torch.cat([self.rotate(queries[:, :, :, some], n, aside) for n, aside, some in places], 3)
            queries = stack_groups(queries, queries.shape[2] // self.keys.shape[2])
            # Not float16, where products overflow; nor over scales, whose models may have keys of length 1 and few
            # differences between scores.
            half = self.keys.dtype == torch.bfloat16 and not isinstance(self.grid, Pyramid)
            keys = self.keys if half and has_fast_bfloat16(self.keys.device) else self.upcast_keys
            self._look_aheads[lines] = LookAhead.of(queries, keys, self.bias)
        return self._look_aheads[lines]

    @cached_property
    def upcast_keys(self) -> Tensor:
        """The keys as float32 or wider."""
        return upcast(self.keys)

    @cached_property
    def points(self) -> tuple[Tensor, Tensor]:
        """What distances are taken between: points L B H S N in float32 or wider, and their squared lengths, L B H S.

        The slots' keys as they are, of which no copy is made; a matrix product (`least_squares`) gives their distances
        to about a millionth of a squared key. Over scales behind each its value, in units in which the values spread as
        much as the keys, by the attention foreseen, and where little is kept (`in_parts`) VALUES of that, all less
        their mean.
        """
        if not isinstance(self.grid, Pyramid) and not self.in_parts:
            keys = self.upcast_keys
            return keys, torch.linalg.vector_norm(keys, dim=-1).square()  # in one pass
        share = self.look_ahead().mass[..., None, :]
        share = share / share.sum(-1, keepdim=True)
        keys, values = (x - share @ x for x in (self.upcast_keys, upcast(self.values)))
        squares = [torch.linalg.vector_norm(x, dim=-1).square() for x in (keys, values)]
        key_spread, value_spread = ((share @ x[..., None])[..., 0] for x in squares)
        unit = (key_spread / value_spread).nan_to_num(0.0, posinf=0.0)  # values that do not spread say nothing
        unit = unit * (VALUES if self.in_parts else 1.0)
        return torch.cat([keys, values * unit.sqrt()[..., None]], -1), squares[0] + squares[1] * unit

    def importance(self) -> Tensor:
        """Importance of each slot for the coming lines, L B H S; 0 for empty slots. Computed once.

        The attention mass that look-ahead predicts, plus a floor for every token in the slot: a tenth of what an image
        token receives on average, over scales all of it. The prediction may be wrong about a token to which it gives
        nothing.
        """
        return self._importance

    @cached_property
    def _importance(self) -> Tensor:
        mass = self.look_ahead().mass
        weight = upcast(self.bias).exp()
        image = weight * self.candidates()
        mean = (mass * self.candidates()).sum(-1, keepdim=True) / image.sum(-1, keepdim=True).clamp(min=1)
        return mass + (SCALES_FLOOR if isinstance(self.grid, Pyramid) else FLOOR) * mean * weight

    def candidates(self) -> Tensor:
        """Bool L B H S: image tokens, the only ones that can be evicted. Computed once."""
        return self._candidates

    @cached_property
    def _candidates(self) -> Tensor:
        return self.index >= self.grid.prompt

    def by_index(self, scores: Tensor, smooth: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply `smooth` along the sequence: slots are unordered, so neighbours in the image are found by index."""
        order = self.index.argsort(dim=-1, stable=True)
        smoothed = smooth(scores.gather(-1, order))
        return torch.empty_like(scores).scatter_(-1, order, smoothed)

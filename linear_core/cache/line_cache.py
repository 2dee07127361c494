"""LineCache: slots that are written, read, viewed and released.

Softmax does not depend on the order of slots, so the cache is never compacted: the slots of a line's victims become the
slots of the next line. Every buffer is allocated before the first token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..grid import Grid
from ..plan import CachePlan, CacheShape
from .attention import attend, attention_weights, kernel
from .fold import fold
from .look_ahead import Rotate
from .storage import STORAGE, first_places
from .view import View

Window = tuple[Tensor, Tensor, Tensor]  # queries, keys and values of tokens that were not written: L B H T D


class LineCache:
    """Keys and values of `rows` sequences: the prompt's slots, then slots for the plan's lines.

    Within a line, `advance` opens one slot per layer, row and head for the next token, `write` fills it and `read`
    returns what a query sees. At a line's end, `extend` (while there are unused lines) or `release` (which overwrites
    victims) decides where the next line is written.
    """

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        grid: Grid,
        plan: CachePlan,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        reads: frozenset[str] = frozenset(),
        static: bool = False,
    ):
        self.kernel = kernel(device, dtype, rows)  # for single queries; None: PyTorch's attention
        self.static = static  # read all slots from the first token on, so that every step has the same shape
        self.shape, self.rows, self.grid, self.plan = shape, rows, grid, plan
        layers, heads, head_dim, stride = shape.layers, shape.heads, shape.head_dim, grid.stride
        self.slots = shape.prompt + plan.lines(grid) * stride
        slots = (layers, rows, heads, self.slots)
        self.keys, self.values = (
            STORAGE[plan.storage](slots[:3], self.slots, head_dim, dtype, device) for _ in range(2)
        )
        self.nbytes = self.keys.nbytes + self.values.nbytes  # as allocated; does not shrink with keep_rows
        self.bias = torch.full(slots, float("-inf"), dtype=dtype, device=device)
        self.index = torch.full(slots, -1, dtype=torch.int32, device=device)
        self.queries: Tensor | None = None
        self.causal: dict[int, Tensor] = {}  # by number of tokens; kept, as captured graphs read them
        self.mass: Tensor | None = None
        self.count: Tensor | None = None
        self.survey: Tensor | None = None
        if reads & {"queries", "mass", "ahead"}:
            # L B Q C D, stored by token: written once per token, read once per line.
            by_token = torch.zeros(layers, stride, rows, heads * shape.group, head_dim, dtype=dtype, device=device)
            self.queries = by_token.permute(0, 2, 3, 1, 4)
        if "mass" in reads:
            self.mass = torch.zeros(slots, dtype=torch.float32, device=device)
        if plan.release == "fold":
            self.count = torch.ones(slots, dtype=torch.float32, device=device)  # tokens in a slot
        # The slot that the line's token at a column is written to, for every layer, row and head.
        self.target = torch.zeros(layers, rows, heads, stride, dtype=torch.int64, device=device)
        self.first = first_places((rows, heads, self.slots), device)
        self.extent = shape.prompt  # slots from here on were never used; a number on the host, constant within a line
        self.part = (0, stride)  # columns of the line that `target` has slots for; numbers on the host

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"kernel": None}  # which belongs to this machine

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.kernel = kernel(self.bias.device, self.bias.dtype, self.bias.shape[1])

    @property
    def full(self) -> bool:
        """Whether the next line has to overwrite slots."""
        return self.extent == self.slots

    @property
    def end(self) -> int:
        """Number of slots that a token reads."""
        return self.slots if self.static else self.extent

    # -- a prompt ----------------------------------------------------------------------------------------------------

    def write_prompt(self, layer: int, k: Tensor, v: Tensor, weight: Tensor) -> None:
        """Write k, v B H P D to the prompt's P slots. `weight` B P: tokens that each slot stands for, 0 for padding."""
        end = self.shape.prompt
        self.keys.write_prompt(layer, k)
        self.values.write_prompt(layer, v)
        self.bias[layer, :, :, :end] = weight.log().to(self.bias.dtype)[:, None]
        index = torch.arange(end, dtype=torch.int32, device=self.index.device)
        self.index[layer, :, :, :end] = torch.where(weight > 0, index, -1)[:, None]

    # -- a token -----------------------------------------------------------------------------------------------------

    def advance(self, index: Tensor, column: Tensor) -> None:
        """Make the slots of the tokens at `index` and `column` (int64, equally many) visible in all layers."""
        slot = self.target.index_select(3, column)
        self.bias.scatter_(3, slot, 0.0)
        self.index.scatter_(3, slot, index.to(torch.int32).expand_as(slot))

    def write(self, layer: int, column: Tensor, k: Tensor, v: Tensor, q: Tensor) -> None:
        """Write k, v B H T D and q B Q T D of the tokens at `column` (int64 T)."""
        place = self.target[layer].index_select(2, column).add_(self.first).view(-1)
        self.keys.write(layer, place, k)
        self.values.write(layer, place, v)
        if self.queries is not None:
            self.queries[layer].index_copy_(2, column, q)

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys B H S D, values B H S D and bias B H S of the slots in use; of all slots if static."""
        end = self.end
        return self.keys.read(layer, end), self.values.read(layer, end), self.bias[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """Attention of queries B Q T D over what `read` returns, the same for all of them: B Q T D."""
        if self.kernel is None or q.shape[2] > 1:
            return attend(q, *self.read(layer))
        end = self.end
        return self.kernel(q, self.keys.raw(layer, end), self.values.raw(layer, end), self.bias[layer, :, :, :end])

    def feed(self, layer: int, columns: Tensor, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v B H T D and q B Q T D of several tokens of a line at once, and return what each query sees.

        Equivalent to feeding the tokens one by one: a query sees the slots that were visible before, except those that
        the line has overwritten up to it, and then the line up to itself. Call `advance` after all layers.

        Returns keys and values B H S+T D, bias B H T S+T.
        """
        seen = self.peek(layer, columns[:1], k, v)
        self.write(layer, columns, k, v, q)
        return seen

    def peek(self, layer: int, column: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`feed` without writing anything: what the queries of T tokens see. The first is at `column` B, or 1 for all.

        Tokens beyond the line's end see the cache as it is at the line's last token.
        """
        end, count = self.end, k.shape[2]
        keys = torch.cat([self.keys.read(layer, end), self.keys.stored(k)], 2)
        values = torch.cat([self.values.read(layer, end), self.values.stored(v)], 2)
        before = self.bias[layer, :, :, None, :end].expand(-1, -1, count, -1)
        if self.plan.release == "lazy":  # each token of the line hides the victim that it overwrites
            target, order = self.target[layer], torch.arange(count, device=column.device)
            token = torch.arange(target.shape[2], device=column.device) - column[:, None]
            token = token.masked_fill(token < 0, count)  # these are in the cache already
            slots = torch.full_like(before[:, :, 0], count, dtype=token.dtype)
            overwritten = slots.scatter_(2, target, token[:, None].expand_as(target))
            before = before.masked_fill(overwritten[:, :, None] <= order[:, None], float("-inf"))
        own = self._own(count).expand(*before.shape[:2], -1, -1)
        return keys, values, torch.cat([before, own], -1)

    def _own(self, count: int) -> Tensor:
        """What `count` tokens in a row see of each other, as a bias: T T."""
        if count not in self.causal:
            order = torch.arange(count, device=self.bias.device)
            seen = torch.zeros(count, count, dtype=self.bias.dtype, device=self.bias.device)
            self.causal[count] = seen.masked_fill_(order > order[:, None], float("-inf"))
        return self.causal[count]

    def accept(self, window: Window, index: Tensor, column: Tensor, count: Tensor) -> None:
        """Write the first `count` B tokens of a window that `peek` was asked about, as if they had been fed.

        window         queries, keys and values L B H T D
        index, column  int64 B, of the window's first token. All tokens that are written belong to this part of the line
        """
        part = slice(*self.part)
        columns, target = torch.arange(*self.part, device=column.device), self.target[..., part]
        token = columns - column[:, None]  # B C: the token of the window that belongs at each column
        accepted = (token >= 0) & (token < count[:, None])

        def by_column(x: Tensor) -> Tensor:
            """Tokens L B H T D of the window at the part's columns, where they belong: L B H C D."""
            size = x.shape[3]
            first = torch.arange(0, x[..., 0].numel(), size, device=x.device).view(*x.shape[:3], 1)
            row = (first + token.clamp(0, size - 1)[:, None]).view(-1)
            return x.reshape(-1, x.shape[-1]).index_select(0, row).view(*x.shape[:3], -1, x.shape[-1])

        q, k, v = map(by_column, window)
        chosen = accepted[:, None, :, None]
        self.keys.write_some(target, k, chosen)
        self.values.write_some(target, v, chosen)
        if self.queries is not None:
            queries = self.queries[..., part, :]
            queries.copy_(torch.where(chosen, q, queries))
        shown = accepted[:, None].expand_as(target)
        bias, old = self.bias.gather(3, target), self.index.gather(3, target)
        new = ((index - column)[:, None] + columns).to(old.dtype)[:, None]
        self.bias.scatter_(3, target, bias.masked_fill(shown, 0.0))
        self.index.scatter_(3, target, torch.where(shown, new, old))

    # -- a line ------------------------------------------------------------------------------------------------------

    def extend(self) -> None:
        """Put the next line into slots that were never used."""
        stride = self.grid.stride
        self.target.copy_(torch.arange(self.extent, self.extent + stride, device=self.target.device))
        self.extent += stride

    def view(
        self,
        row: int | Tensor,
        layers: slice,
        rotate: Rotate | None = None,
        part: tuple[int, int] | None = None,
    ) -> View:
        """The contents of some layers once line `row` is complete. `rotate` is passed on to the view.

        part  columns that room is made for, of the next line if they begin at 0, else of this one. None: all

        Also adds the line's attention to `mass`, so call it once per line.
        """
        first, last = part or (0, self.grid.stride)
        end = self.extent
        keys, values = self.keys.read(layers, end), self.values.read(layers, end)
        bias, index = self.bias[layers, ..., :end], self.index[layers, ..., :end]
        queries = None if self.queries is None else self.queries[layers]
        mass = None
        if self.mass is not None and queries is not None:
            mass = self.mass[layers, ..., :end]
            for sums, q, k, b, i in zip(mass, queries, keys, bias, index, strict=True):
                sums += attention_weights(q, k, b, i, self.grid.index(row)).sum(2)
        protected = self.plan.anchors + self.plan.recent * self.grid.stride + (first if self.plan.recent else 0)
        return View(
            keys, values, bias, index, queries, mass, self.grid, row, layers.start, rotate, self.survey,
            protected=protected, prompt_slots=self.shape.prompt, coming=last - first,
            missing=self.grid.stride - first if first else 0,
        )  # fmt: skip

    def release(self, view: View, victims: Tensor) -> None:
        """Release `victims` (slots, int64 L B H V, least useful first; -1: none) in the layers and rows of `view`.

        The last of them are the slots of the columns of `part`, which come next. "strict": all are invisible from now
        on. "lazy": those of the next line stay visible until they are overwritten. "fold": each is merged into the kept
        slot with the nearest key.
        """
        end, count, (layers, batch) = self.extent, view.released, view.index.shape[:2]
        rows = slice(view.first, view.first + batch)
        some = slice(view.layer, view.layer + layers), rows
        released = _mark(victims, end)
        if self.count is not None:
            folded = fold(view, victims.clamp(min=0), self.count[some][..., :end])
            places = (folded.slot + self.first[rows]).flatten(1)
            for layer, place in enumerate(places):
                self.keys.write(view.layer + layer, place, folded.keys[layer])
                self.values.write(view.layer + layer, place, folded.values[layer])
            self.bias[some].scatter_(3, folded.slot, folded.bias.to(self.bias.dtype))
            self.count[some].scatter_(3, folded.slot, folded.count.to(self.count.dtype))
            self.count[some][..., :end].masked_fill_(released, 1.0)  # for the token that is written there next
        self.target[some][..., slice(*self.part)] = victims[..., -count:]
        if self.mass is not None:
            self.mass[some][..., :end].masked_fill_(released, 0.0)
        hidden = _mark(victims[..., :-count], end) if self.plan.release == "lazy" else released
        self.bias[some][..., :end].masked_fill_(hidden, float("-inf"))
        self.index[some][..., :end].masked_fill_(hidden, -1)

    # -- the batch ---------------------------------------------------------------------------------------------------

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` sequences, when guidance has ended. Saves computation, not memory."""
        self.rows = rows
        self.keys.keep_rows(rows)
        self.values.keep_rows(rows)
        self.first = self.first[:rows]
        for name in ("bias", "index", "queries", "mass", "count", "survey", "target"):
            if (buffer := getattr(self, name)) is not None:
                setattr(self, name, buffer[:, :rows])

    def share_held(self, images: int) -> Tensor:
        """Share of layers and heads that hold each image token, for the first `images` rows: float32 B rows cols."""
        ones = torch.ones(1, 1, 1, 1, device=self.index.device).expand_as(self.index)
        return self._by_cell(ones, images) / (self.shape.layers * self.shape.heads)

    def stands_for(self, images: int) -> Tensor | None:
        """How many tokens each image token's slot stands for, mean over the layers and heads that hold it: B rows cols.

        0 for a token that none holds. None unless victims are folded.
        """
        if self.count is None:
            return None
        holders = self.share_held(images) * (self.shape.layers * self.shape.heads)
        return self._by_cell(self.count, images) / holders.clamp(min=1)

    def _by_cell(self, x: Tensor, images: int) -> Tensor:
        """Sum of x L B H S over the layers and heads that hold each image token: B rows cols."""
        grid, index = self.grid, self.index[:, :images].long()
        cell = (index - grid.prompt).clamp(min=-1) + 1  # cell 0 collects the prompt and empty slots
        sums = torch.zeros(images, grid.tokens + 1, device=index.device)
        cell, x = (t.transpose(0, 1).reshape(images, -1) for t in (cell, x[:, :images]))
        sums.scatter_add_(1, cell, x)
        return sums[:, 1:].view(images, grid.rows, grid.stride)[..., : grid.cols]

    def held_by_head(self, row: int) -> Tensor:
        """Which image tokens each layer and head holds, for one row of the batch: bool L H rows*stride."""
        cell = (self.index[:, row].long() - self.grid.prompt).clamp(min=-1) + 1
        held = cell.new_zeros(*cell.shape[:2], self.grid.tokens + 1, dtype=torch.bool)
        return held.scatter_(2, cell, True)[..., 1:]


def _mark(victims: Tensor, slots: int) -> Tensor:
    """Bool ... S: which of `slots` slots are among `victims` ... V; -1 is none of them."""
    marks = torch.zeros(*victims.shape[:-1], slots + 1, dtype=torch.bool, device=victims.device)
    return marks.scatter_(-1, victims + 1, True)[..., 1:]

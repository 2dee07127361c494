"""LineCache: slots that are written, read, viewed and released.

Softmax does not care about the order of slots, so there is no compaction: the slots of a line's victims are the next
line's write slots. Every buffer is allocated before the first token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..grid import Grid
from ..plan import CachePlan, CacheShape
from .attention import attend, attention_weights, kernel
from .fold import fold
from .storage import STORAGE
from .view import View


class LineCache:
    """Keys and values of `rows` sequences: the prompt's slots, then room for the plan's lines.

    Within a line `advance` opens one slot per layer, row and head for the token that comes; `write` fills it and
    `read` returns what a query may see. At a line's end either `extend` (there are unused lines) or `release` (the
    chosen slots are written over) says where the next line goes.
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
        self.kernel = kernel(device, dtype)  # for one query; None: PyTorch's attention
        self.static = static  # read all slots from the first token on, so that a step has one shape for the image
        self.shape, self.rows, self.grid, self.plan = shape, rows, grid, plan
        layers, heads, dim, stride = shape.layers, shape.heads, shape.head_dim, grid.stride
        self.slots = shape.prompt + plan.lines(grid) * stride
        held = (layers, rows, heads, self.slots)
        self.keys, self.values = (
            STORAGE[plan.storage](held[:3], self.slots, stride, dim, dtype, device) for _ in range(2)
        )
        self.nbytes = self.keys.nbytes + self.values.nbytes  # as allocated, whatever rows are kept later
        self.bias = torch.full(held, float("-inf"), dtype=dtype, device=device)
        self.index = torch.full(held, -1, dtype=torch.int32, device=device)
        self.queries: Tensor | None = None
        self.mass: Tensor | None = None
        self.count: Tensor | None = None
        self.survey: Tensor | None = None
        if reads & {"queries", "mass", "ahead"}:
            # L B H C D; a token's lie together, as they are written for each and read once a line.
            by_token = torch.zeros(layers, stride, rows, heads, dim, dtype=dtype, device=device)
            self.queries = by_token.permute(0, 2, 3, 1, 4)
        if "mass" in reads:
            self.mass = torch.zeros(held, dtype=torch.float32, device=device)
        if plan.release == "fold":
            self.count = torch.ones(held, dtype=torch.float32, device=device)  # tokens that a slot stands for
        # Where the line's token at a column goes: one slot for every layer, row and head.
        self.target = torch.zeros(layers, rows, heads, stride, dtype=torch.int64, device=device)
        self.extent = shape.prompt  # slots from here on have never been used; a host number, constant within a line

    @property
    def full(self) -> bool:
        """Whether the next line has to overwrite something."""
        return self.extent == self.slots

    @property
    def end(self) -> int:
        """Slots that a token reads: those from here on are left out."""
        return self.slots if self.static else self.extent

    # -- a prompt ----------------------------------------------------------------------------------------------------

    def write_prompt(self, layer: int, k: Tensor, v: Tensor, weight: Tensor) -> None:
        """k, v B H P D into the prompt's P slots; `weight` B P tokens each, 0 for padding."""
        end = self.shape.prompt
        self.keys.write_prompt(layer, k)
        self.values.write_prompt(layer, v)
        self.bias[layer, :, :, :end] = weight.log().to(self.bias.dtype)[:, None]
        places = torch.arange(end, dtype=torch.int32, device=self.index.device)
        self.index[layer, :, :, :end] = torch.where(weight > 0, places, -1)[:, None]

    # -- a token -----------------------------------------------------------------------------------------------------

    def advance(self, index: Tensor, column: Tensor) -> None:
        """Make the slots of the tokens at `index` and `column` (int64, as many of each) visible, in all layers."""
        slot = self.target.index_select(3, column)
        self.bias.scatter_(3, slot, 0.0)
        self.index.scatter_(3, slot, index.to(torch.int32).expand_as(slot))

    def write(self, layer: int, column: Tensor, k: Tensor, v: Tensor, q: Tensor) -> None:
        """k, v, q B H T D of the tokens at `column`."""
        slot = self.target[layer].index_select(2, column)
        self.keys.write(layer, slot, column, k)
        self.values.write(layer, slot, column, v)
        if self.queries is not None:
            self.queries[layer].index_copy_(2, column, q)

    def read(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Keys B H S D, values B H S D and bias B H S of everything written so far; of all slots where static."""
        end = self.end
        return self.keys.read(layer, end), self.values.read(layer, end), self.bias[layer, :, :, :end]

    def attend(self, layer: int, q: Tensor) -> Tensor:
        """What queries B H T D, which all see the same, find in what `read` returns: B H T D."""
        if self.kernel is None or q.shape[2] > 1:
            return attend(q, *self.read(layer))
        end = self.end
        return self.kernel(q, self.keys.raw(layer, end), self.values.raw(layer, end), self.bias[layer, :, :, :end])

    def feed(self, layer: int, columns: Tensor, k: Tensor, v: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Write k, v, q B H T D of a line's tokens at once and return what each of these queries sees.

        As if they had come one by one: a query sees what was visible before, less what the line has overwritten up to
        it, then the line up to itself. Keys and values B H S+T D, bias B H T S+T. `advance` comes after all layers.
        """
        end, count = self.end, columns.shape[0]
        keys = torch.cat([self.keys.read(layer, end), k], 2)
        values = torch.cat([self.values.read(layer, end), v], 2)
        old = self.bias[layer, :, :, :end]
        order = torch.arange(count, device=old.device)
        slot = self.target[layer].index_select(2, columns)
        overwritten = torch.full(old.shape, count, device=old.device).scatter_(2, slot, order.expand_as(slot))
        gone = overwritten[:, :, None] <= order[:, None]  # B H T S
        before = old[:, :, None].expand(gone.shape).masked_fill(gone, float("-inf"))
        own = old.new_zeros(count, count).masked_fill(order[None] > order[:, None], float("-inf"))
        self.write(layer, columns, k, v, q)
        return keys, values, torch.cat([before, own.expand(*slot.shape[:2], -1, -1)], -1)

    # -- a line ------------------------------------------------------------------------------------------------------

    def extend(self) -> None:
        """The next line goes to slots never used before."""
        stride = self.grid.stride
        if self.extent > self.shape.prompt:  # there was a line before this one
            for layer in range(self.shape.layers):
                self._finish_line(layer)
        self.target.copy_(torch.arange(self.extent, self.extent + stride, device=self.target.device))
        self.extent += stride
        for layer in range(self.shape.layers):
            self._start_line(layer)

    def view(self, row: int | Tensor, layer: int, rotate: Callable[[Tensor, int], Tensor] | None = None) -> View:
        """What one layer holds now that line `row` is complete: a view with L = 1.

        Brings attention mass up to date, so call it once a line. `turn`: see View.
        """
        self._finish_line(layer)
        end, one = self.extent, slice(layer, layer + 1)
        keys, values = self.keys.read(layer, end)[None], self.values.read(layer, end)[None]
        bias, index = self.bias[one, ..., :end], self.index[one, ..., :end]
        queries = None if self.queries is None else self.queries[one]
        mass = None
        if self.mass is not None and queries is not None:
            mass = self.mass[one, ..., :end]
            mass += attention_weights(queries[0], keys[0], bias[0], index[0], self.grid.index(row)).sum(2)
        return View(keys, values, bias, index, queries, mass, self.grid, row, layer, rotate, self.survey)

    def release(self, view: View, victims: Tensor) -> None:
        """`victims` int64 1 B H V, least useful first, are let go in the layer and rows that `view` shows; -1: none.

        The last of them are the slots of the next line. Strict: all are invisible from now on. Lazy: each of those
        stays visible until it is overwritten. Fold: each goes on in the kept slot nearest to it.
        """
        end, stride, rows = self.extent, self.grid.stride, slice(view.first, view.first + view.index.shape[1])
        one = slice(view.layer, view.layer + 1), rows
        leaving = _mark(victims, end)
        if self.count is not None:
            folded = fold(view, victims.clamp(min=0), self.count[one][..., :end])
            slot = folded.slot[0]
            self.keys.overwrite(view.layer, rows, slot, folded.keys[0])
            self.values.overwrite(view.layer, rows, slot, folded.values[0])
            self.bias[view.layer, rows].scatter_(2, slot, folded.bias[0].to(self.bias.dtype))
            self.count[view.layer, rows].scatter_(2, slot, folded.count[0].to(self.count.dtype))
            self.count[one][..., :end].masked_fill_(leaving, 1.0)  # what comes there stands for itself
        self.target[one] = victims[..., -stride:]
        self._start_line(view.layer)
        if self.mass is not None:
            self.mass[one][..., :end].masked_fill_(leaving, 0.0)
        hidden = _mark(victims[..., :-stride], end) if self.plan.release == "lazy" else leaving
        self.bias[one][..., :end].masked_fill_(hidden, float("-inf"))
        self.index[one][..., :end].masked_fill_(hidden, -1)

    def _finish_line(self, layer: int) -> None:
        for stored in (self.keys, self.values):
            stored.finish_line(layer, self.target[layer])

    def _start_line(self, layer: int) -> None:
        for stored in (self.keys, self.values):
            stored.start_line(layer, self.target[layer])

    # -- the batch ---------------------------------------------------------------------------------------------------

    def keep_rows(self, rows: int) -> None:
        """Go on with the first `rows` sequences only: guidance has ended. Saves work; the memory stays taken."""
        self.rows = rows
        self.keys.keep_rows(rows)
        self.values.keep_rows(rows)
        for name in ("bias", "index", "queries", "mass", "count", "survey", "target"):
            if (buffer := getattr(self, name)) is not None:
                setattr(self, name, buffer[:, :rows])

    def share_held(self, images: int) -> Tensor:
        """Share of layers and heads in which each image token is visible, for the first `images` rows: B rows cols."""
        slots = torch.ones(1, 1, 1, 1, device=self.index.device).expand_as(self.index)
        return self._by_cell(slots, images) / (self.shape.layers * self.shape.heads)

    def stands_for(self, images: int) -> Tensor | None:
        """How many tokens each image token stands for where it is held, mean over those layers and heads: B rows cols.

        0 where nobody holds it. None unless victims are folded.
        """
        if self.count is None:
            return None
        holders = self.share_held(images) * (self.shape.layers * self.shape.heads)
        return self._by_cell(self.count, images) / holders.clamp(min=1)

    def _by_cell(self, numbers: Tensor, images: int) -> Tensor:
        """Numbers of slots L B H S, summed over the layers and heads of each image token: B rows cols."""
        grid, index = self.grid, self.index[:, :images].long()
        place = (index - grid.prompt).clamp(min=-1) + 1  # 0 collects the prompt and empty slots
        sums = torch.zeros(images, grid.tokens + 1, device=index.device)
        place, numbers = (x.transpose(0, 1).reshape(images, -1) for x in (place, numbers[:, :images]))
        sums.scatter_add_(1, place, numbers)
        return sums[:, 1:].view(images, grid.rows, grid.stride)[..., : grid.cols]

    def held_by_head(self, row: int) -> Tensor:
        """Whether each layer and head of one row of the batch sees each image token: bool L H rows*stride."""
        place = (self.index[:, row].long() - self.grid.prompt).clamp(min=-1) + 1
        held = place.new_zeros(*place.shape[:2], self.grid.tokens + 1, dtype=torch.bool)
        return held.scatter_(2, place, True)[..., 1:]


def _mark(victims: Tensor, slots: int) -> Tensor:
    """Which of so many slots are named by `victims` ... V, -1 naming none: bool ... S."""
    marks = torch.zeros(*victims.shape[:-1], slots + 1, dtype=torch.bool, device=victims.device)
    return marks.scatter_(-1, victims + 1, True)[..., 1:]

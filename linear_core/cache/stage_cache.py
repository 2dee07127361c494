"""StageCache: keys and values of a next-scale model, settled layer by layer within the pass that overflows them.

A scale is drawn in one pass, so a cache that waited for its end would have to hold the whole new scale in every layer.
Here each layer attends, keeps what fits its budget, and hands its working memory on to the next layer. What is ever
held is the sum of the budgets and one layer's working memory. Nothing is drawn after the last scale, so it is never
stored.

Heads that hold unequal numbers are grouped by room, a multiple of a quarter of the budget: each group attends at once,
and nobody is padded to the fullest head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import ROOMS, CachePlan, CacheShape
from ..pyramid import Pyramid
from .attention import attention_weights
from .fold import fold
from .look_ahead import upcast
from .storage import STORAGE, Packed
from .view import View

LOOKS = (
    64  # queries of a scale, evenly spread, that policies see: the scores of thousands would cost more than they save
)


@dataclass
class Group:
    """Heads of a layer that have equal room. G H' are rows and heads: all of them, or those of unequal numbers, H' 1.

    rows, heads  their numbers, int64 G 1; None: all rows and heads, in order
    start        int64 G H', where each head begins in the layer's data
    index        int32 G H' S, index of each slot's token; -1: empty. Slots are counted from the head's start
    bias         G H' S, ln of the slot's weight; -inf: empty
    count        G H' S, tokens in the slot; None unless victims fold
    mass         G H' S, attention received so far; None unless the policy reads it
    padded       whether some of its slots are empty
    """

    start: Tensor
    index: Tensor
    bias: Tensor
    count: Tensor | None = None
    mass: Tensor | None = None
    rows: Tensor | None = None
    heads: Tensor | None = None
    padded: bool = False

    @property
    def slots(self) -> int:
        return self.index.shape[-1]

    def of(self, x: Tensor) -> Tensor:
        """Its part of x R H ...: G H' ..."""
        return x if self.rows is None else x[self.rows, self.heads]

    def put(self, x: Tensor, part: Tensor) -> None:
        """Write its part of x R H ..."""
        if self.rows is None:
            x.copy_(part)
        else:
            x[self.rows, self.heads] = part

    def select(self, order: Tensor) -> None:
        """Keep the slots `order`, int64 G H' N, of what is said about them."""
        for name in ("index", "bias", "count", "mass"):
            if (x := getattr(self, name)) is not None:
                setattr(self, name, x.gather(-1, order))

    def first_rows(self, rows: int) -> Group:
        """The heads of the first `rows` rows."""
        own = slice(rows) if self.rows is None else self.rows[:, 0] < rows
        parts: dict[str, Any] = {f.name: x[own] for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}
        return replace(self, **parts)


class Layer:
    """What one layer holds between two stages.

    data    keys and values, 2 N D, in the storage format: the heads of all rows one after the other
    scale   2 N 1, factors of packed data; None: not packed
    groups  its heads, by room
    """

    data: Tensor
    scale: Tensor | None
    groups: list[Group]

    @property
    def slots(self) -> int:
        """Slots of the fullest head."""
        return max(group.slots for group in self.groups)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


class StageCache:
    """Keys and values of `rows` sequences over the scales of a pyramid.

    Before each scale `begin` is called, then `attend` once for every layer, in order.

    settle  is given the views of a layer that holds more than its budget, one for each group of heads, and calls
            `release`
    survey  is given the view of each layer after the last scale before the first overflow; its results are the views'
            `survey`. None: the policy needs none
    found   what the survey would find, layers rows heads ..., if that is known beforehand: then there is no survey
    reads   what views show besides keys and values: "queries", "mass", "ahead"
    stages  scales that are drawn, so that the last one of them need not be stored; 0: all
    """

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        pyramid: Pyramid,
        plan: CachePlan,
        settle: Callable[[StageCache, list[View]], None],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        reads: frozenset[str] = frozenset(),
        survey: Callable[[View], Tensor] | None = None,
        found: Tensor | None = None,
        rotate: Callable[[int, Tensor], Tensor] = lambda stage, queries: queries,
        stages: int = 0,
    ):
        self.shape, self.rows, self.pyramid, self.plan = shape, rows, pyramid, plan
        self.settle, self.rotate, self.reads = settle, rotate, reads
        self.surveyor, self.survey = (survey if found is None else None), found
        self.keeps, self.protected, self.stages = plan.keeps(pyramid), plan.protected(pyramid), stages or pyramid.stages
        storage = STORAGE[plan.storage]
        self.packed = cast(type[Packed], storage) if issubclass(storage, Packed) else None
        self.fits = max((n for n in range(pyramid.stages) if pyramid.index(n + 1) <= self.keeps), default=-1)
        self._surveys: list[Tensor] = []
        self.stage = -1
        self.dtype, self.device = dtype, device
        self.work = torch.empty(0, dtype=dtype, device=device)
        self._reserve(2 * rows * shape.heads * plan.sure_slots(pyramid, self.stages) * shape.head_dim)
        self.layers = [self._empty() for _ in range(shape.layers)]
        self.peak = self.nbytes

    def _empty(self) -> Layer:
        layer, device, heads = Layer(), self.device, (self.rows, self.shape.heads)
        self._allocate(layer, self.rows * self.shape.heads * self.keeps)
        bias = torch.empty(*heads, 0, dtype=torch.promote_types(self.dtype, torch.float32), device=device)
        layer.groups = [
            Group(
                start=torch.arange(self.rows * self.shape.heads, device=device).view(heads) * self.keeps,
                index=torch.empty(*heads, 0, dtype=torch.int32, device=device),
                bias=bias,
                count=bias.clone() if self.plan.release == "fold" else None,
                mass=bias.clone() if "mass" in self.reads else None,
            )
        ]
        return layer

    def _allocate(self, layer: Layer, slots: int) -> None:
        """Room for `slots` keys and values; the old contents are lost."""
        size = self.shape.head_dim
        layer.data = layer.scale = torch.empty(0)  # frees the old ones first
        if self.packed is None:
            layer.data, layer.scale = torch.zeros(2, slots, size, dtype=self.dtype, device=self.device), None
        else:
            empty = self.packed.pack(torch.zeros(size, device=self.device))
            layer.data, layer.scale = (x.expand(2, slots, -1).contiguous() for x in empty)

    def _reserve(self, numbers: int) -> None:
        """Room for so many numbers in working memory; the old contents are lost."""
        if numbers > self.work.numel():
            self.work = self.work.new_empty(0)  # frees the old one first
            self.work = torch.empty(numbers, dtype=self.dtype, device=self.device)

    @property
    def nbytes(self) -> int:
        """Keys and values, as allocated now."""
        return self.work.nbytes + sum(layer.nbytes for layer in self.layers)

    # -- a stage -------------------------------------------------------------------------------------------------------

    def begin(self, stage: int) -> None:
        """The next calls are for scale `stage`."""
        self.stage = stage

    @property
    def stores(self) -> bool:
        """Whether this scale is stored: the last one is not."""
        return self.stage + 1 < self.stages

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None = None) -> Tensor:
        """Attention of a scale's queries over everything held and the scale itself, in layer `number`: R H n D.

        q, k and v R H n D; q is scaled so that q k / sqrt(D) is the model's score. Stores the scale, and settles the
        layer if that exceeds its budget.

        places  int64 R n, which tokens of the scale these are, if some were left out; None: all, in order
        """
        layer, new = self.layers[number], q.shape[2]
        fits = self.stage <= self.fits and self.stores
        held = [self._append(layer, k, v)] if fits and self.packed is None else self._load(layer, k, v)
        out = q.new_empty(q.shape[0], new, q.shape[1] * q.shape[3])
        for group, kv in zip(layer.groups, held, strict=True):
            bias = None
            if group.padded or (self.plan.release == "fold" and self.stage > self.fits + 1):
                bias = F.pad(group.bias, (0, new)).to(q.dtype)[:, :, None]
            part = F.scaled_dot_product_attention(group.of(q), kv[0], kv[1], attn_mask=bias)
            group.put(out.unflatten(2, (self.shape.heads, -1)).transpose(1, 2), part)
            del part  # else the next group would be computed beside it
        out = out.unflatten(2, (self.shape.heads, -1)).transpose(1, 2)
        if not self.stores:
            return out
        views = []
        for group, kv in zip(layer.groups, held, strict=True):
            self._describe(group, new, places)
            views.append(self._view(number, group, kv, q))
        if fits:
            if self.packed is not None:
                self._save(layer, held)
            if self.stage == self.fits and self.surveyor is not None:
                self._surveys.append(self.surveyor(views[0]))
                if number + 1 == self.shape.layers:
                    self.survey = torch.cat(self._surveys)
            return out
        if self.plan.uneven or layer.slots > self.keeps:
            self.settle(self, views)
        self._save(layer, held)
        self.peak = max(self.peak, self.nbytes)
        return out

    def _append(self, layer: Layer, k: Tensor, v: Tensor) -> Tensor:
        """Write behind what is held, in place; returns all of it, 2 R H S D."""
        held, end = layer.slots, layer.slots + k.shape[2]
        heads = self.rows, self.shape.heads  # fewer rows than at first once guidance has ended
        data = layer.data[:, : heads[0] * heads[1] * self.keeps].view(2, *heads, self.keeps, -1)
        data[0, :, :, held:end], data[1, :, :, held:end] = k, v
        return data[:, :, :, :end]

    def _load(self, layer: Layer, k: Tensor, v: Tensor) -> list[Tensor]:
        """What each group holds, and behind it the new keys and values, in working memory: 2 G H' S D each."""
        new, size = k.shape[2:]
        shapes = [torch.Size((2, *group.start.shape, group.slots + new, size)) for group in layer.groups]
        self._reserve(sum(shape.numel() for shape in shapes))
        begin, held = 0, []
        for group, shape in zip(layer.groups, shapes, strict=True):
            kv = self.work[begin : begin + shape.numel()].view(shape)
            begin += shape.numel()
            row = group.start[..., None] + torch.arange(group.slots, device=group.start.device)
            row.clamp_(max=layer.data.shape[1] - 1)  # behind the last head there may be nothing to fill its room with
            for part, fresh in enumerate((k, v)):
                stored = layer.data[part].index_select(0, row.view(-1))
                if self.packed is not None and layer.scale is not None:
                    stored = self.packed.unpack(stored, layer.scale[part].index_select(0, row.view(-1)), size)
                kv[part, :, :, : group.slots] = stored.view(*row.shape, size)
                kv[part, :, :, group.slots :] = group.of(fresh)
            held.append(kv)
        return held

    def _describe(self, group: Group, new: int, places: Tensor | None) -> None:
        """Name the slots of a new scale's tokens."""
        first, heads = self.pyramid.index(self.stage), group.index.shape[:2]
        index = torch.arange(first, first + new, dtype=torch.int32, device=group.index.device).expand(*heads, new)
        if places is not None:
            index = group.of((first + places.int())[:, None].expand(-1, self.shape.heads, -1))
        group.index = torch.cat([group.index, index], -1)
        group.bias = F.pad(group.bias, (0, new))
        group.count = None if group.count is None else F.pad(group.count, (0, new), value=1.0)
        group.mass = None if group.mass is None else F.pad(group.mass, (0, new))

    def _view(self, number: int, group: Group, kv: Tensor, q: Tensor) -> View:
        queries = None
        if self.reads & {"queries", "mass", "ahead"}:
            looks = min(LOOKS, q.shape[2])
            queries = group.of(q[:, :, torch.arange(looks, device=q.device) * q.shape[2] // looks])
        mass = None
        if group.mass is not None and queries is not None:
            newest = self.pyramid.index(self.stage + 1) - 1  # every query sees all of its scale
            received = attention_weights(upcast(queries), upcast(kv[0]), group.bias, group.index, newest)
            group.mass += received.sum(2) * (q.shape[2] / queries.shape[2])
            mass = group.mass[None]
        return View(
            kv[0][None], kv[1][None], group.bias[None], group.index[None],
            None if queries is None else upcast(queries)[None], mass, self.pyramid, self.stage, number,
            lambda queries, *_: self.rotate(self.stage, queries), self.survey, keeps=self.keeps, rows=group.rows,
            heads=group.heads, protected=self.protected,
        )  # fmt: skip

    def whole(self, views: list[View]) -> View:
        """The views of a layer's groups as one of all its rows and heads, without keys, values, queries and mass."""
        if len(views) == 1 and views[0].rows is None:
            return views[0]
        layer = self.layers[views[0].layer]
        index = self._padded(layer, [group.index for group in layer.groups], -1)
        bias = self._padded(layer, [group.bias for group in layer.groups], float("-inf"))
        nothing = views[0].keys.new_empty(1, self.rows, self.shape.heads, 0, self.shape.head_dim)
        return View(
            nothing, nothing, bias[None], index[None], None, None, self.pyramid, self.stage, views[0].layer, None,
            self.survey, keeps=self.keeps, protected=self.protected,
        )  # fmt: skip

    def release(self, number: int, view: View, victims: Tensor) -> None:
        """Release `victims` (slots, int64 1 G H' V; -1: none) of a view of group `number`: dropped, or folded."""
        group = self.layers[view.layer].groups[number]
        own = tuple(
            slice(first, first + count)
            for first, count in zip((view.first, view.first_head), view.index.shape[1:3], strict=True)
        )
        slots = group.slots
        released = torch.zeros(*victims.shape[1:-1], slots + 1, dtype=torch.bool, device=victims.device)
        released = released.scatter_(-1, victims[0] + 1, True)[..., 1:]
        if group.count is not None:
            # A victim that is none points to a slot that is kept; folding it there would count it twice.
            none = victims < 0
            safe = torch.where(none, victims.amax(-1, keepdim=True).clamp(min=0), victims)
            folded = fold(view, safe, group.count[own][None], none)
            slot = folded.slot[0]
            vectors = slot[..., None].expand(*slot.shape, view.keys.shape[-1])
            view.keys[0].scatter_(2, vectors, folded.keys[0].to(view.keys.dtype))
            view.values[0].scatter_(2, vectors, folded.values[0].to(view.values.dtype))
            group.bias[own].scatter_(2, slot, folded.bias[0].to(group.bias.dtype))
            group.count[own].scatter_(2, slot, folded.count[0].to(group.count.dtype))
        group.bias[own].masked_fill_(released, float("-inf"))
        group.index[own].masked_fill_(released, -1)

    def _save(self, layer: Layer, held: list[Tensor]) -> None:
        """Store the slots of working memory that are not empty."""
        if self.plan.uneven:
            rows = self._regroup(layer, held)
            if len(rows[0]) != layer.data.shape[1]:
                self._allocate(layer, len(rows[0]))
        else:
            (group,), (kv,) = layer.groups, held
            order = _filled(group.index, min(self.keeps, group.slots))
            number = torch.arange(group.start.numel(), device=order.device).view(group.start.shape)
            group.start = number * order.shape[-1]
            group.select(order)
            places = _places(kv)[:, :, :, :1] + order
            rows = places[0].view(-1), places[1].view(-1)
        vectors = self.work[: self.work.numel() // self.shape.head_dim * self.shape.head_dim]
        vectors = vectors.view(-1, self.shape.head_dim)
        for part, row in enumerate(rows):
            into = layer.data[part, : len(row)]
            if self.packed is None or layer.scale is None:
                torch.index_select(vectors, 0, row, out=into)
            else:
                into[:], layer.scale[part, : len(row)] = self.packed.pack(vectors.index_select(0, row).float())

    def _regroup(self, layer: Layer, held: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Group the heads by how many slots of each are not empty, rounded up to a part of the budget.

        Returns where in working memory the keys and the values of these slots are, one head after the other.
        """
        index = self._padded(layer, [group.index for group in layer.groups], -1)
        told = {"bias": self._padded(layer, [group.bias for group in layer.groups], float("-inf"))}
        for name in ("count", "mass"):
            if getattr(layer.groups[0], name) is not None:
                told[name] = self._padded(layer, [getattr(group, name) for group in layer.groups], 0)
        filled = index >= 0
        places = [_places(kv) for kv in held]
        keys, values = (self._padded(layer, [one[part] for one in places], -1)[filled] for part in range(2))
        lengths = filled.sum(-1)
        start = (lengths.view(-1).cumsum(0) - lengths.view(-1)).view(lengths.shape)
        rooms = -(-lengths // -(-self.keeps // ROOMS))
        layer.groups = []
        for room in rooms.unique().tolist():
            rows, heads = (rooms == room).nonzero(as_tuple=True)
            whole = len(rows) == lengths.numel()
            own = (rows.view(lengths.shape), heads.view(lengths.shape)) if whole else (rows[:, None], heads[:, None])
            order = _filled(index[own], int(lengths[own].max()))
            group = Group(start[own], index[own].gather(-1, order), told["bias"][own].gather(-1, order))
            for name in set(told) - {"bias"}:
                setattr(group, name, told[name][own].gather(-1, order))
            if not whole:
                group.rows, group.heads = own
            group.padded = bool((group.index < 0).any())
            layer.groups.append(group)
        return keys, values

    def _padded(self, layer: Layer, parts: list[Tensor], empty: float) -> Tensor:
        """What is said about each group's slots, G H' S, for all rows and heads, R H S: `empty` behind a group's."""
        if layer.groups[0].rows is None:
            return parts[0]
        found = parts[0].new_full((self.rows, self.shape.heads, max(part.shape[-1] for part in parts)), empty)
        for group, part in zip(layer.groups, parts, strict=True):
            found[group.rows, group.heads, : part.shape[-1]] = part
        return found

    # -- the batch -----------------------------------------------------------------------------------------------------

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` sequences, when guidance has ended. Saves computation, not memory."""
        self.rows = rows
        if self.survey is not None:
            self.survey = self.survey[:, :rows]
        for layer in self.layers:
            layer.groups = [own for group in layer.groups if len((own := group.first_rows(rows)).index)]

    def held_by_head(self, row: int) -> Tensor:
        """Which tokens each layer and head holds, for one row of the batch: bool L H tokens."""
        return torch.stack([self._cells(layer, row + 1)[row] > 0 for layer in self.layers])

    def share_held(self, images: int) -> Tensor:
        """Share of layers and heads that hold each token, for the first `images` rows: float32 B tokens."""
        sums = sum(self._cells(layer, images).sum(1) for layer in self.layers)
        assert isinstance(sums, Tensor)
        return sums.float() / (self.shape.layers * self.shape.heads)

    def stands_for(self, images: int) -> Tensor | None:
        """How many tokens each token's slot stands for, mean over the layers and heads that hold it: float32 B tokens.

        0 for a token that none holds. None unless victims are folded.
        """
        if self.plan.release != "fold":
            return None
        sums = sum(self._cells(layer, images, counts=True).sum(1) for layer in self.layers)
        assert isinstance(sums, Tensor)
        holders = self.share_held(images) * (self.shape.layers * self.shape.heads)
        return sums.float() / holders.clamp(min=1)

    def _cells(self, layer: Layer, rows: int, counts: bool = False) -> Tensor:
        """1 for each token that a head of the first `rows` rows holds, or how many it stands for: R H tokens."""
        cells = layer.groups[0].bias.new_zeros(rows, self.shape.heads, self.pyramid.tokens)
        for group in layer.groups:
            own = group.first_rows(rows)
            index = own.index.long() + 1  # place 0 collects empty slots
            x = own.count if counts and own.count is not None else torch.ones_like(own.bias)
            found = x.new_zeros(*index.shape[:2], self.pyramid.tokens + 1).scatter_(2, index, x)
            own.put(cells, found[..., 1:])
        return cells


def _places(kv: Tensor) -> Tensor:
    """Which vectors of working memory these keys and values are: 2 G H' S D -> int64 2 G H' S."""
    first = kv.storage_offset() // kv.shape[-1]
    return first + torch.arange(kv[..., 0].numel(), device=kv.device).view(kv.shape[:-1])


def _filled(index: Tensor, count: int) -> Tensor:
    """The first `count` slots of each head, those that hold something in front: int64 ... count."""
    return (index < 0).to(torch.uint8).argsort(dim=-1, stable=True)[..., :count]

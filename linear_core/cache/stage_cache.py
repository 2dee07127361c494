"""StageCache: keys and values of a next-scale model, settled layer by layer within the pass that overflows them.

A scale is drawn in one pass, so a cache that waited for its end would have to hold the whole new scale in every layer.
Here each layer attends, keeps what fits its budget, and hands its working memory on to the next layer. What is ever
held is the sum of the budgets and one layer's working memory. Nothing is drawn after the last scale, so it is never
stored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..plan import CachePlan, CacheShape
from ..pyramid import Pyramid
from .attention import attention_weights
from .fold import fold
from .look_ahead import upcast
from .storage import quantize
from .view import View

LOOKS = (
    64  # queries of a scale, evenly spread, that policies see: the scores of thousands would cost more than they save
)


class Layer:
    """What one layer holds between two stages.

    data    keys and values, 2 N D, in the storage format: the heads of all rows one after the other, each from `start`
    scale   2 N 1, factors of 8-bit data; None: not quantized
    start   int64 R H, where each head begins
    index   int32 R H S, index of each slot's token; -1: empty. Slots are counted from the head's start
    bias    R H S, ln of the slot's weight; -inf: empty
    count   R H S, tokens in the slot; None unless victims fold
    mass    R H S, attention received so far; None unless the policy reads it
    ragged  whether heads hold unequal numbers
    """

    data: Tensor
    scale: Tensor | None
    start: Tensor
    index: Tensor
    bias: Tensor
    count: Tensor | None
    mass: Tensor | None
    ragged = False

    @property
    def slots(self) -> int:
        """Slots of the fullest head."""
        return self.index.shape[-1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)


class StageCache:
    """Keys and values of `rows` sequences over the scales of a pyramid.

    Before each scale `begin` is called, then `attend` once for every layer, in order.

    settle  is given the view of a layer that holds more than its budget, and calls `release`
    survey  is given the view of each layer after the last scale before the first overflow; its results are the views'
            `survey`. None: the policy needs none
    reads   what views show besides keys and values: "queries", "mass", "ahead"
    """

    def __init__(
        self,
        shape: CacheShape,
        rows: int,
        pyramid: Pyramid,
        plan: CachePlan,
        settle: Callable[[StageCache, View], None],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        reads: frozenset[str] = frozenset(),
        survey: Callable[[View], Tensor] | None = None,
        rotate: Callable[[int, Tensor], Tensor] = lambda stage, queries: queries,
    ):
        self.shape, self.rows, self.pyramid, self.plan = shape, rows, pyramid, plan
        self.settle, self.surveyor, self.rotate, self.reads = settle, survey, rotate, reads
        self.keeps = plan.keeps(pyramid)
        self.int8 = plan.storage == "int8"
        self.fits = max((n for n in range(pyramid.stages) if pyramid.index(n + 1) <= self.keeps), default=-1)
        self.survey: Tensor | None = None
        self._surveys: list[Tensor] = []
        self.stage = -1
        self.dtype, self.device = dtype, device
        self.work = torch.empty(
            2, rows, shape.heads, plan.work_slots(pyramid), shape.head_dim, dtype=dtype, device=device
        )
        self.layers = [self._empty() for _ in range(shape.layers)]
        self.peak = self.nbytes

    def _empty(self) -> Layer:
        layer, device, heads = Layer(), self.device, (self.rows, self.shape.heads)
        layer.start = torch.arange(self.rows * self.shape.heads, device=device).view(heads) * self.keeps
        self._allocate(layer, self.rows * self.shape.heads * self.keeps)
        layer.index = torch.empty(*heads, 0, dtype=torch.int32, device=device)
        layer.bias = torch.empty(*heads, 0, dtype=torch.promote_types(self.dtype, torch.float32), device=device)
        layer.count = torch.empty_like(layer.bias) if self.plan.release == "fold" else None
        layer.mass = torch.empty_like(layer.bias) if "mass" in self.reads else None
        return layer

    def _allocate(self, layer: Layer, slots: int) -> None:
        """Room for `slots` keys and values; the old contents are lost."""
        size = self.shape.head_dim
        layer.data = layer.scale = torch.empty(0)  # frees the old ones first
        layer.data = torch.zeros(2, slots, size, dtype=torch.int8 if self.int8 else self.dtype, device=self.device)
        layer.scale = torch.empty(2, slots, 1, dtype=torch.float32, device=self.device) if self.int8 else None

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
        return self.stage + 1 < self.pyramid.stages

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a scale's queries over everything held and the scale itself, in layer `number`: R H n D.

        q, k and v R H n D; q is scaled so that q k / sqrt(D) is the model's score. Stores the scale, and settles the
        layer if that exceeds its budget.
        """
        layer, new = self.layers[number], q.shape[2]
        held = layer.slots
        fits = self.stage <= self.fits and self.stores
        if fits and not self.int8:
            kv = self._append(layer, k, v)
        else:
            kv = self._load(layer, held + new)
            kv[0, :, :, held:], kv[1, :, :, held:] = k, v
        bias = None
        if layer.ragged or (self.plan.release == "fold" and self.stage > self.fits + 1):
            bias = F.pad(layer.bias, (0, new)).to(q.dtype)[:, :, None]
        out = F.scaled_dot_product_attention(q, kv[0], kv[1], attn_mask=bias)
        if not self.stores:
            return out
        self._describe(layer, new)
        view = self._view(number, kv, q)
        if fits:
            if self.int8:
                self._save(layer, kv)
            if self.stage == self.fits and self.surveyor is not None:
                self._surveys.append(self.surveyor(view))
                if number + 1 == self.shape.layers:
                    self.survey = torch.cat(self._surveys)
            return out
        self.settle(self, view)
        self._save(layer, kv)
        self.peak = max(self.peak, self.nbytes)
        return out

    def _append(self, layer: Layer, k: Tensor, v: Tensor) -> Tensor:
        """Write behind what is held, in place; returns all of it, 2 R H S D."""
        held, end = layer.slots, layer.slots + k.shape[2]
        heads = self.rows, self.shape.heads  # fewer rows than at first once guidance has ended
        data = layer.data[:, : heads[0] * heads[1] * self.keeps].view(2, *heads, self.keeps, -1)
        data[0, :, :, held:end], data[1, :, :, held:end] = k, v
        return data[:, :, :, :end]

    def _load(self, layer: Layer, slots: int) -> Tensor:
        """What is held at the front of working memory of `slots` slots a head: 2 R H S D."""
        size = (2, self.rows, self.shape.heads, slots, self.shape.head_dim)
        kv = self.work.view(-1)[: torch.Size(size).numel()].view(size)
        row = (layer.start[..., None] + torch.arange(slots, device=layer.start.device)).clamp_(
            max=layer.data.shape[1] - 1
        )
        for part in range(2):
            into = kv[part].view(-1, size[-1])
            if layer.scale is None:
                torch.index_select(layer.data[part], 0, row.view(-1), out=into)
            else:
                into.copy_(layer.data[part].index_select(0, row.view(-1)))
                into.mul_(layer.scale[part].index_select(0, row.view(-1)).to(into.dtype))
        return kv

    def _describe(self, layer: Layer, new: int) -> None:
        """Name the slots of a new scale's tokens."""
        first = self.pyramid.index(self.stage)
        index = torch.arange(first, first + new, dtype=torch.int32, device=layer.index.device)
        layer.index = torch.cat([layer.index, index.expand(*layer.index.shape[:2], new)], -1)
        layer.bias = F.pad(layer.bias, (0, new))
        layer.count = None if layer.count is None else F.pad(layer.count, (0, new), value=1.0)
        layer.mass = None if layer.mass is None else F.pad(layer.mass, (0, new))

    def _view(self, number: int, kv: Tensor, q: Tensor) -> View:
        layer, queries = self.layers[number], None
        if self.reads & {"queries", "mass", "ahead"}:
            looks = min(LOOKS, q.shape[2])
            queries = q[:, :, torch.arange(looks, device=q.device) * q.shape[2] // looks]
        mass = None
        if layer.mass is not None and queries is not None:
            newest = self.pyramid.index(self.stage + 1) - 1  # every query sees all of its scale
            received = attention_weights(upcast(queries), upcast(kv[0]), layer.bias, layer.index, newest)
            layer.mass += received.sum(2) * (q.shape[2] / queries.shape[2])
            mass = layer.mass[None]
        return View(
            kv[0][None], kv[1][None], layer.bias[None], layer.index[None],
            None if queries is None else upcast(queries)[None], mass, self.pyramid, self.stage, number,
            lambda queries, stages: self.rotate(self.stage, queries), self.survey, keeps=self.keeps,
            protected=self.plan.protected(self.pyramid),
        )  # fmt: skip

    def release(self, view: View, victims: Tensor) -> None:
        """Release `victims` (slots, int64 1 R' H V; -1: none) in the rows of `view`: dropped, or folded."""
        layer, rows = self.layers[view.layer], slice(view.first, view.first + view.index.shape[1])
        slots = layer.slots
        released = torch.zeros(*victims.shape[1:-1], slots + 1, dtype=torch.bool, device=victims.device)
        released = released.scatter_(-1, victims[0] + 1, True)[..., 1:]
        if layer.count is not None:
            # A victim that is none points to a slot that is kept; folding it there would count it twice.
            none = victims < 0
            safe = torch.where(none, victims.amax(-1, keepdim=True).clamp(min=0), victims)
            folded = fold(view, safe, layer.count[rows][None], none)
            slot = folded.slot[0]
            vectors = slot[..., None].expand(*slot.shape, view.keys.shape[-1])
            view.keys[0].scatter_(2, vectors, folded.keys[0].to(view.keys.dtype))
            view.values[0].scatter_(2, vectors, folded.values[0].to(view.values.dtype))
            layer.bias[rows].scatter_(2, slot, folded.bias[0].to(layer.bias.dtype))
            layer.count[rows].scatter_(2, slot, folded.count[0].to(layer.count.dtype))
        layer.bias[rows].masked_fill_(released, float("-inf"))
        layer.index[rows].masked_fill_(released, -1)

    def _save(self, layer: Layer, kv: Tensor) -> None:
        """Store the slots of working memory that are not empty."""
        held = layer.index >= 0
        heads, width = held.shape[:2], kv.shape[3]
        offset = torch.arange(heads.numel(), device=held.device).view(*heads, 1) * width
        kept = min(self.keeps, self.pyramid.index(self.stage + 1))
        if not self.plan.uneven or not bool((held.sum(-1) != kept).any()):
            order = (~held).to(torch.uint8).argsort(dim=-1, stable=True)[..., :kept]
            row = (offset + order).view(-1)
            layer.start = torch.arange(heads.numel(), device=held.device).view(heads) * kept
            layer.ragged = False
        else:
            lengths = held.sum(-1)
            order = (~held).to(torch.uint8).argsort(dim=-1, stable=True)[..., : int(lengths.max())]
            row = held.view(-1).nonzero()[:, 0]
            layer.start = (lengths.view(-1).cumsum(0) - lengths.view(-1)).view(heads)
            layer.ragged = True
        for name in ("index", "bias", "count", "mass"):
            if (x := getattr(layer, name)) is not None:
                setattr(layer, name, x.gather(-1, order))
        if len(row) > layer.data.shape[1] or (layer.ragged and len(row) < layer.data.shape[1]):
            self._allocate(layer, len(row))
        for part in range(2):
            vectors = kv[part].reshape(-1, kv.shape[-1])
            into = layer.data[part, : len(row)]
            if layer.scale is None:
                torch.index_select(vectors, 0, row, out=into)
            else:
                into[:], layer.scale[part, : len(row)] = quantize(vectors.index_select(0, row), torch.float32)

    # -- the batch -----------------------------------------------------------------------------------------------------

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` sequences, when guidance has ended. Saves computation, not memory."""
        self.rows = rows
        if self.survey is not None:
            self.survey = self.survey[:, :rows]
        for layer in self.layers:
            for name in ("start", "index", "bias", "count", "mass"):
                if (x := getattr(layer, name)) is not None:
                    setattr(layer, name, x[:rows])

    def held_by_head(self, row: int) -> Tensor:
        """Which tokens each layer and head holds, for one row of the batch: bool L H tokens."""
        return torch.stack(
            [self._cells(layer, torch.ones_like(layer.bias), slice(row, row + 1))[0] > 0 for layer in self.layers]
        )

    def share_held(self, images: int) -> Tensor:
        """Share of layers and heads that hold each token, for the first `images` rows: float32 B tokens."""
        sums = sum(self._cells(layer, torch.ones_like(layer.bias), slice(images)).sum(1) for layer in self.layers)
        assert isinstance(sums, Tensor)
        return sums.float() / (self.shape.layers * self.shape.heads)

    def stands_for(self, images: int) -> Tensor | None:
        """How many tokens each token's slot stands for, mean over the layers and heads that hold it: float32 B tokens.

        0 for a token that none holds. None unless victims are folded.
        """
        if self.plan.release != "fold":
            return None
        sums = sum(
            self._cells(layer, layer.count, slice(images)).sum(1) for layer in self.layers if layer.count is not None
        )
        assert isinstance(sums, Tensor)
        holders = self.share_held(images) * (self.shape.layers * self.shape.heads)
        return sums.float() / holders.clamp(min=1)

    def _cells(self, layer: Layer, x: Tensor, rows: slice) -> Tensor:
        """x R H S of the slots, put at their tokens' places: R H tokens."""
        index = layer.index[rows].long() + 1  # place 0 collects empty slots
        cells = x.new_zeros(*index.shape[:2], self.pyramid.tokens + 1)
        return cells.scatter_(2, index, x[rows])[..., 1:]

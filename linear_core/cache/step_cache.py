"""StepCache: keys and values of a masked model from step to step.

Such a model has no order: with every token that becomes known, the keys and values of all others change a little. A
step computes those of some slots and uses the others as they were computed last. So this cache does not save memory; it
takes some, and saves time.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..steps import StepCacheShape

Rows = slice | Tensor  # slots of a pass: a range, or int64 B n, one list for each image


def take(x: Tensor, rows: Rows, dim: int = 1) -> Tensor:
    """The slots `rows` of x, whose dimension 0 is images, once or twice, and whose dimension `dim` is slots."""
    if isinstance(rows, slice):
        return x.narrow(dim, rows.start, rows.stop - rows.start)
    return x.gather(dim, _index(x, rows, dim))


def put(x: Tensor, rows: Rows, new: Tensor, dim: int = 1) -> None:
    """Write `new` over the slots `rows` of x."""
    if isinstance(rows, slice):
        x.narrow(dim, rows.start, rows.stop - rows.start).copy_(new)
    else:
        x.scatter_(dim, _index(x, rows, dim), new)


def _index(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """`rows` B n in the shape that gather and scatter ask for."""
    index = rows.repeat(len(x) // len(rows), 1)
    shape = [*x.shape]
    shape[dim] = rows.shape[1]
    view = [1] * x.ndim
    view[0], view[dim] = len(x), rows.shape[1]
    return index.view(view).expand(shape)


class StepCache:
    """Keys and values of all layers, encoder first, for R rows of B images. Slots are in the order of drawing.

    There is one slot more than there are: where images compute different numbers of slots, what is too much goes there.

    age   steps since each slot was computed: int64 B S
    mass  attention that each slot received from the tokens drawn last, mean over the decoder's layers, its heads and
          both rows of an image: float32 B S. None unless `looks`
    """

    def __init__(
        self, shape: StepCacheShape, images: int, rows: int, *, dtype: torch.dtype, device: torch.device, looks: bool
    ):
        self.shape, self.spare = shape, shape.slots
        layers = shape.encoder_layers + shape.decoder_layers
        size = (layers, 2, rows, shape.heads, shape.slots + 1, shape.head_dim)
        self.held = torch.zeros(size, dtype=dtype, device=device)
        self.age = torch.zeros(images, shape.slots, dtype=torch.int64, device=device)
        self.mass = torch.zeros(images, shape.slots, device=device) if looks else None

    @property
    def bytes(self) -> int:
        """Keys and values, as allocated."""
        return self.held.nbytes

    def begin(self, rows: Rows) -> None:
        """A step that computes the slots `rows`."""
        self.age += 1
        put(self.age, rows, torch.zeros_like(take(self.age, rows)))
        if self.mass is not None:
            self.mass.zero_()

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Rows, known: int = 0, look: slice | None = None
    ) -> Tensor:
        """Keep k and v R H n D of the slots `rows`, then attend to all slots, or the first `known`: R H m D.

        look  which of the queries say how much attention each slot receives
        """
        held = self.held[layer]
        for kept, new in zip(held, (k, v), strict=True):
            put(kept, rows, new, 2)
        keys, values = held[:, :, :, : known or self.shape.slots]
        if self.mass is not None and look is not None:
            scores = (q[:, :, look] @ keys.transpose(-1, -2)).float() / q.shape[-1] ** 0.5
            received = scores.softmax(-1).mean((1, 2)).unflatten(0, (-1, len(self.mass))).mean(0)
            self.mass += received / self.shape.decoder_layers
        return F.scaled_dot_product_attention(q, keys, values)

    def moved(self, layer: int, v: Tensor) -> Tensor:
        """How far the values v R H S D of all slots are from those kept: 1 - cosine, mean over heads: float32 B S."""
        kept = self.held[layer, 1, :, :, : self.shape.slots]
        cosine = F.cosine_similarity(v.float(), kept.float(), dim=-1).mean(1)
        return 1 - cosine.unflatten(0, (-1, len(self.age))).mean(0)

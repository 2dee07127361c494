"""CarriedState: what joins the scales of a model that keeps no cache. It is as large after the last scale as before."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import CacheShape
from ..pyramid import Pyramid


class CarriedState:
    """A state for every layer and each of `rows` sequences, which the model itself reads and writes.

    It takes a StageCache's place in the loop, and answers as one that holds no token. There is nothing to evict.

    sizes  of the tensors that a layer carries for each sequence
    state  float32 or better, one tensor L R … for each of the sizes; zeros before the first scale
    """

    def __init__(
        self,
        shape: CacheShape,
        sizes: tuple[tuple[int, ...], ...],
        rows: int,
        pyramid: Pyramid,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        self.shape, self.rows, self.pyramid = shape, rows, pyramid
        # Half precision would lose what a long decay adds up to.
        dtype = torch.promote_types(dtype, torch.float32)
        self.state = [torch.zeros(shape.layers, rows, *size, dtype=dtype, device=device) for size in sizes]
        self.peak = self.nbytes

    @property
    def nbytes(self) -> int:
        """As allocated, the whole run long."""
        return sum(part.nbytes for part in self.state)

    def begin(self, stage: int) -> None:
        """The next calls are for scale `stage`."""

    def layer(self, number: int) -> list[Tensor]:
        """What layer `number` carries, R … each, to be written in place."""
        return [part[number] for part in self.state]

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` sequences, when guidance has ended. Saves computation, not memory."""
        self.rows = rows
        self.state = [part[:, :rows] for part in self.state]

    # -- what is held: no token ----------------------------------------------------------------------------------------

    def held_by_head(self, row: int) -> Tensor:
        """bool L H tokens."""
        return torch.zeros(self.shape.layers, self.shape.heads, self.pyramid.tokens, dtype=torch.bool)

    def share_held(self, images: int) -> Tensor:
        """float32 B tokens."""
        return torch.zeros(images, self.pyramid.tokens)

    def stands_for(self, images: int) -> None:
        """Nothing is folded."""

"""Storage formats for the keys or values of slots.

L layers, B rows of the batch, H heads, S slots, T tokens, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Device = torch.device | str


class RawSlots(NamedTuple):
    """Keys or values of a layer's slots in their storage format, for a kernel that reads them directly.

    data    B H S D
    scale   B H S 1, factor for each slot's data; None: none
    fresh   B H T D, the line being written, which replaces the data at `target`; None: it is in `data` already
    target  int64 B H T, slots
    """

    data: Tensor
    scale: Tensor | None = None
    fresh: Tensor | None = None
    target: Tensor | None = None


class Full:
    """Keys or values in the dtype they were computed in."""

    def __init__(
        self,
        batch_shape: tuple[int, int, int],
        slots: int,
        stride: int,
        head_dim: int,
        dtype: torch.dtype,
        device: Device,
    ):
        self.data = torch.zeros(*batch_shape, slots, head_dim, dtype=dtype, device=device)
        self.table = self.data.view(-1, head_dim)  # all slots; `first` is the row of each head's first one
        self.first = torch.arange(0, len(self.table), slots, device=device).view(*batch_shape, 1)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def read(self, layer: int, end: int) -> Tensor:
        """The first `end` slots, B H S D."""
        return self.data[layer, :, :, :end]

    def raw(self, layer: int, end: int) -> RawSlots:
        """The first `end` slots in their storage format."""
        return RawSlots(self.data[layer, :, :, :end])

    def write(self, layer: int, slot: Tensor, column: Tensor, x: Tensor) -> None:
        """Write x B H T D, the line's tokens at `column`, to slots `slot` B H T."""
        _write_slots(self.data[layer], slot, x)

    def write_some(self, slot: Tensor, x: Tensor, chosen: Tensor) -> None:
        """Write x L B H C D, a whole line in all layers, to slots `slot` L B H C where `chosen` B 1 C 1.

        The other slots stay as they are.
        """
        row = (self.first + slot).view(-1)
        old = self.table.index_select(0, row)
        self.table.index_copy_(0, row, torch.where(chosen, x, old.view_as(x)).view_as(old))

    def write_prompt(self, layer: int, x: Tensor) -> None:
        """Write x B H P D to the first P slots."""
        self.data[layer, :, :, : x.shape[2]] = x

    def overwrite(self, layer: int, rows: slice, slot: Tensor, x: Tensor) -> None:
        """Write x B H T D to slots `slot` B H T of these rows, in complete lines."""
        _write_slots(self.data[layer, rows], slot, x.to(self.data.dtype))

    def finish_line(self, layer: int, target: Tensor) -> None:
        """The line written to `target` (slots, B H C) is complete."""

    def start_line(self, layer: int, target: Tensor) -> None:
        """The next line goes to `target`. Old contents stay readable until they are overwritten."""

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` of the batch."""
        self.data, self.first = self.data[:, :rows], self.first[:, :rows]


class Int8(Full):
    """Complete lines in 8 bits with one scale for each head and slot; the line being written stays as it was computed.

    A complete line no longer changes, so it is quantized once, to 255 steps of its largest element (and once more for a
    slot that something is folded into). In half precision this takes D + 2 bytes where Full takes 2 D.
    """

    def __init__(
        self,
        batch_shape: tuple[int, int, int],
        slots: int,
        stride: int,
        head_dim: int,
        dtype: torch.dtype,
        device: Device,
    ):
        self.data = torch.zeros(*batch_shape, slots, head_dim, dtype=torch.int8, device=device)
        self.scale = torch.zeros(*batch_shape, slots, 1, dtype=dtype, device=device)
        self.fresh = torch.zeros(*batch_shape, stride, head_dim, dtype=dtype, device=device)
        self.target = torch.zeros(*batch_shape, stride, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.fresh.nbytes

    def read(self, layer: int, end: int) -> Tensor:
        stored = self._dequantize(self.data[layer, :, :, :end], self.scale[layer, :, :, :end])
        slot = self.target[layer][..., None].expand_as(self.fresh[layer])
        return stored.scatter(2, slot, self.fresh[layer])

    def raw(self, layer: int, end: int) -> RawSlots:
        data, scale = (x[layer, :, :, :end] for x in (self.data, self.scale))
        return RawSlots(data, scale, self.fresh[layer], self.target[layer])

    def write(self, layer: int, slot: Tensor, column: Tensor, x: Tensor) -> None:
        self.fresh[layer].index_copy_(2, column, x)

    def write_some(self, slot: Tensor, x: Tensor, chosen: Tensor) -> None:
        self.fresh.copy_(torch.where(chosen, x, self.fresh))

    def write_prompt(self, layer: int, x: Tensor) -> None:
        end = x.shape[2]
        self.data[layer, :, :, :end], self.scale[layer, :, :, :end] = quantize(x, self.scale.dtype)

    def overwrite(self, layer: int, rows: slice, slot: Tensor, x: Tensor) -> None:
        data, scale = quantize(x, self.scale.dtype)
        _write_slots(self.data[layer, rows], slot, data)
        _write_slots(self.scale[layer, rows], slot, scale)

    def finish_line(self, layer: int, target: Tensor) -> None:
        data, scale = quantize(self.fresh[layer], self.scale.dtype)
        _write_slots(self.data[layer], target, data)
        _write_slots(self.scale[layer], target, scale)

    def start_line(self, layer: int, target: Tensor) -> None:
        self.target[layer] = target
        slot = target[..., None]
        data = self.data[layer].gather(2, slot.expand_as(self.fresh[layer]))
        self.fresh[layer] = self._dequantize(data, self.scale[layer].gather(2, slot))

    def keep_rows(self, rows: int) -> None:
        for name in ("data", "scale", "fresh", "target"):
            setattr(self, name, getattr(self, name)[:, :rows])

    def _dequantize(self, data: Tensor, scale: Tensor) -> Tensor:
        dtype = self.fresh.dtype
        return data.to(dtype) * scale.to(dtype)


def _write_slots(stored: Tensor, slot: Tensor, x: Tensor) -> None:
    """Write x B H T N to slots `slot` B H T of `stored` B H S N.

    Written as rows of one long table: on CPUs, scattering into half precision copies all of `stored`, twice.
    """
    first = torch.arange(0, stored[..., 0].numel(), stored.shape[2], device=stored.device).view(*stored.shape[:2], 1)
    stored.view(-1, stored.shape[-1]).index_copy_(0, (first + slot).view(-1), x.reshape(-1, x.shape[-1]))


def quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x ... D as int8, and the scale of each vector as `dtype`: ... 1."""
    x = x.float()
    # Slightly larger, so that the largest element stays within 127 steps however the scale is rounded.
    scale = (x.abs().amax(-1, keepdim=True) / 127 * (1 + torch.finfo(dtype).eps)).to(dtype)
    return (x / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8), scale


STORAGE = {"full": Full, "int8": Int8}

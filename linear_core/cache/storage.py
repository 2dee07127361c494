"""Storage: how the numbers of slots are kept. L layers, B rows of the batch, H heads, S slots, T tokens, D numbers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Device = torch.device | str


class RawSlots(NamedTuple):
    """Keys, or values, of a layer's slots where they lie, for a kernel that reads them so.

    numbers  B H S D
    scale    B H S 1 that each slot's numbers are to be multiplied by; None: as they are
    fresh    B H T D that are seen in place of what lies at `target`: the line being written; None: nothing is
    target   int64 B H T, slots
    """

    data: Tensor
    scale: Tensor | None = None
    fresh: Tensor | None = None
    target: Tensor | None = None


class Full:
    """Keys, or values, as they were computed."""

    def __init__(
        self, lead: tuple[int, int, int], slots: int, stride: int, dim: int, dtype: torch.dtype, device: Device
    ):
        self.data = torch.zeros(*lead, slots, dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def read(self, layer: int, end: int) -> Tensor:
        """B H S D of the first `end` slots."""
        return self.data[layer, :, :, :end]

    def raw(self, layer: int, end: int) -> RawSlots:
        """The same where it lies."""
        return RawSlots(self.data[layer, :, :, :end])

    def write(self, layer: int, slot: Tensor, column: Tensor, x: Tensor) -> None:
        """x B H T D of the line's tokens at `column` into `slot` B H T."""
        _write_slots(self.data[layer], slot, x)

    def write_prompt(self, layer: int, x: Tensor) -> None:
        """x B H P D into the first P slots."""
        self.data[layer, :, :, : x.shape[2]] = x

    def overwrite(self, layer: int, rows: slice, slot: Tensor, x: Tensor) -> None:
        """x B H T D of these rows into `slot` B H T."""
        _write_slots(self.data[layer, rows], slot, x.to(self.data.dtype))

    def finish_line(self, layer: int, target: Tensor) -> None:
        """The line that went to `target` (B H C slots) is complete."""

    def start_line(self, layer: int, target: Tensor) -> None:
        """The next line will go to `target`; what lies there may be read until it is written over."""

    def keep_rows(self, rows: int) -> None:
        """Only the first rows of the batch from now on."""
        self.data = self.data[:, :rows]


class Int8(Full):
    """Eight bits a number and a scale for each head's slot; the line that is being written stays as it was computed.

    A complete line no longer changes, so it is rounded once, to the nearest of 255 steps of its greatest number (and
    again where something is folded into it). In half precision it takes D + 2 bytes where Full takes 2 D.
    """

    def __init__(
        self, lead: tuple[int, int, int], slots: int, stride: int, dim: int, dtype: torch.dtype, device: Device
    ):
        self.data = torch.zeros(*lead, slots, dim, dtype=torch.int8, device=device)
        self.scale = torch.zeros(*lead, slots, 1, dtype=dtype, device=device)
        self.fresh = torch.zeros(*lead, stride, dim, dtype=dtype, device=device)
        self.target = torch.zeros(*lead, stride, dtype=torch.int64, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes + self.fresh.nbytes

    def read(self, layer: int, end: int) -> Tensor:
        held = self._dequantize(self.data[layer, :, :, :end], self.scale[layer, :, :, :end])
        slot = self.target[layer][..., None].expand_as(self.fresh[layer])
        return held.scatter(2, slot, self.fresh[layer])

    def raw(self, layer: int, end: int) -> RawSlots:
        data, scale = (x[layer, :, :, :end] for x in (self.data, self.scale))
        return RawSlots(data, scale, self.fresh[layer], self.target[layer])

    def write(self, layer: int, slot: Tensor, column: Tensor, x: Tensor) -> None:
        self.fresh[layer].index_copy_(2, column, x)

    def write_prompt(self, layer: int, x: Tensor) -> None:
        end = x.shape[2]
        self.data[layer, :, :, :end], self.scale[layer, :, :, :end] = _quantize(x, self.scale.dtype)

    def overwrite(self, layer: int, rows: slice, slot: Tensor, x: Tensor) -> None:
        data, scale = _quantize(x, self.scale.dtype)
        _write_slots(self.data[layer, rows], slot, data)
        _write_slots(self.scale[layer, rows], slot, scale)

    def finish_line(self, layer: int, target: Tensor) -> None:
        data, scale = _quantize(self.fresh[layer], self.scale.dtype)
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


def _write_slots(held: Tensor, slot: Tensor, x: Tensor) -> None:
    """x B H T N into the places `slot` B H T of `held` B H S N.

    As rows of one long table: scattering into half precision copies all of `held`, twice, on CPUs.
    """
    first = torch.arange(0, held[..., 0].numel(), held.shape[2], device=held.device).view(*held.shape[:2], 1)
    held.view(-1, held.shape[-1]).index_copy_(0, (first + slot).view(-1), x.reshape(-1, x.shape[-1]))


def _quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x ... D as int8 and one scale of `dtype` each: ... 1."""
    x = x.float()
    # A little more, so that the greatest number stays within 127 steps however the scale is rounded.
    scale = (x.abs().amax(-1, keepdim=True) / 127 * (1 + torch.finfo(dtype).eps)).to(dtype)
    return (x / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8), scale


STORAGE = {"full": Full, "int8": Int8}

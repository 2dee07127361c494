"""Storage formats for the keys or values of slots.

L layers, B rows of the batch, H heads, S slots, T tokens, D head size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Device = torch.device | str
GROUP = 16  # elements of a vector that share a floor and a step in 4 bits


class RawSlots(NamedTuple):
    """Keys or values of a layer's slots in their storage format, for a kernel that reads them directly.

    data   B H S N, what a slot's D elements are stored as
    scale  B H S 1, factor for each slot's data; None: none
    """

    data: Tensor
    scale: Tensor | None = None


class Full:
    """Keys or values in the dtype they were computed in."""

    def __init__(
        self, batch_shape: tuple[int, int, int], slots: int, head_dim: int, dtype: torch.dtype, device: Device
    ):
        self.data = torch.zeros(*batch_shape, slots, head_dim, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def read(self, layers: int | slice, end: int) -> Tensor:
        """The first `end` slots of a layer, B H S D, or of several, L B H S D."""
        return self.data[layers, ..., :end, :]

    def raw(self, layer: int, end: int) -> RawSlots:
        """The first `end` slots in their storage format."""
        return RawSlots(self.data[layer, :, :, :end])

    def stored(self, x: Tensor) -> Tensor:
        """x ... D as it is read once it has been written."""
        return x

    def write(self, layer: int, place: Tensor, x: Tensor) -> None:
        """Write x B H T D to rows `place` (int64 B*H*T, see `first_places`) of the layer's table of vectors."""
        _write_vectors(self.data[layer], place, x.to(self.data.dtype))

    def write_some(self, slot: Tensor, x: Tensor, chosen: Tensor) -> None:
        """Write x L B H C D, a whole line in all layers, to slots `slot` L B H C where `chosen` B 1 C 1.

        The other slots stay as they are.
        """
        _write_chosen(self.data, slot, x, chosen)

    def write_prompt(self, layer: int, x: Tensor) -> None:
        """Write x B H P D to the first P slots."""
        self.data[layer, :, :, : x.shape[2]] = x

    def keep_rows(self, rows: int) -> None:
        """Drop all but the first `rows` of the batch."""
        self.data = self.data[:, :rows]


class Packed(Full):
    """Keys or values in fewer bits, with a scale for each head and slot.

    A token is packed once, when it is written, and once more if something is folded into it.
    """

    def __init__(
        self, batch_shape: tuple[int, int, int], slots: int, head_dim: int, dtype: torch.dtype, device: Device
    ):
        empty = self.pack(torch.zeros(head_dim, dtype=dtype, device=device))
        self.data, self.scale = (x.expand(*batch_shape, slots, -1).contiguous() for x in empty)
        self.size = head_dim

    @staticmethod
    def pack(x: Tensor) -> tuple[Tensor, Tensor]:
        """x ... D as data ... N and, in x's dtype, a scale ... 1."""
        raise NotImplementedError

    @staticmethod
    def unpack(data: Tensor, scale: Tensor, size: int) -> Tensor:
        """What `pack` stored, ... D in the dtype of `scale`. `size` is D."""
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + self.scale.nbytes

    def read(self, layers: int | slice, end: int) -> Tensor:
        return self.unpack(self.data[layers, ..., :end, :], self.scale[layers, ..., :end, :], self.size)

    def raw(self, layer: int, end: int) -> RawSlots:
        return RawSlots(self.data[layer, :, :, :end], self.scale[layer, :, :, :end])

    def stored(self, x: Tensor) -> Tensor:
        return self.unpack(*self.pack(x), self.size)

    def write(self, layer: int, place: Tensor, x: Tensor) -> None:
        data, scale = self.pack(x.to(self.scale.dtype))
        _write_vectors(self.data[layer], place, data)
        _write_vectors(self.scale[layer], place, scale)

    def write_some(self, slot: Tensor, x: Tensor, chosen: Tensor) -> None:
        data, scale = self.pack(x)
        _write_chosen(self.data, slot, data, chosen)
        _write_chosen(self.scale, slot, scale, chosen)

    def write_prompt(self, layer: int, x: Tensor) -> None:
        end = x.shape[2]
        self.data[layer, :, :, :end], self.scale[layer, :, :, :end] = self.pack(x)

    def keep_rows(self, rows: int) -> None:
        self.data, self.scale = self.data[:, :rows], self.scale[:, :rows]


class Int8(Packed):
    """Keys or values in 8 bits: 255 steps of a vector's largest element. D bytes and a scale for each slot."""

    @staticmethod
    def pack(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, x = x.dtype, x.float()
        # Slightly larger, so that the largest element stays within 127 steps however the scale is rounded.
        scale = (x.abs().amax(-1, keepdim=True) / 127 * (1 + torch.finfo(dtype).eps)).to(dtype)
        return (x / scale.float().clamp(min=1e-8)).round().clamp(-127, 127).to(torch.int8), scale

    @staticmethod
    def unpack(data: Tensor, scale: Tensor, size: int) -> Tensor:
        return data.to(scale.dtype) * scale


class Int4(Packed):
    """Keys or values in 4 bits. Every GROUP elements of a vector have 16 levels of their own, from a floor upwards.

    With a floor, channels that are far from 0 in every token, as keys have them, take no levels from the others. Floor
    and step are stored in 8 bits, as parts of the vector's largest element: 5/8 D bytes and a scale for each slot.

    A slot's data are D/2 bytes with two elements each, d and d + D/2; then the floors of all groups, then their steps.
    """

    @staticmethod
    def pack(x: Tensor) -> tuple[Tensor, Tensor]:
        dtype, size = x.dtype, x.shape[-1]
        x = x.float()
        largest = (x.abs().amax(-1, keepdim=True) * (1 + torch.finfo(dtype).eps)).to(dtype)
        x = x / largest.float().clamp(min=1e-8)  # -1 to 1
        x = torch.cat([x, x[..., -1:].expand(*x.shape[:-1], -size % GROUP)], -1).unflatten(-1, (-1, GROUP))
        floor = ((x.amin(-1) + 1) * 127.5).floor().clamp(0, 255)
        low = (floor / 127.5 - 1)[..., None]
        step = ((x.amax(-1) - low[..., 0]) * 127.5).ceil().clamp(1, 255)  # of 15 levels together
        level = ((x - low) * (15 * 127.5) / step[..., None]).round().clamp(0, 15).to(torch.uint8).flatten(-2)
        first, second = level[..., : size // 2], level[..., size // 2 : size]
        return torch.cat([first | second << 4, floor.to(torch.uint8), step.to(torch.uint8)], -1), largest

    @staticmethod
    def unpack(data: Tensor, scale: Tensor, size: int) -> Tensor:
        pairs, groups = data[..., : size // 2], -(-size // GROUP)
        level = F.pad(torch.cat([pairs & 15, pairs >> 4], -1), (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
        floor, step = (x.to(scale.dtype)[..., None] for x in data[..., size // 2 :].split(groups, -1))
        factor = scale[..., None] / 127.5
        return torch.addcmul(floor * factor - scale[..., None], level.to(scale.dtype), step * (factor / 15)).flatten(
            -2
        )[..., :size]


def first_places(shape: tuple[int, int, int], device: Device) -> Tensor:
    """Where each row's and head's slots begin in a layer's table of vectors: int64 B H 1, for a `shape` of B H S.

    A slot's place in the table is its head's first place plus its own number. On CPUs, scattering into half precision
    copies all that is stored, twice; writing rows of a table does not.
    """
    rows, heads, slots = shape
    return torch.arange(0, rows * heads * slots, slots, device=device).view(rows, heads, 1)


def _write_vectors(stored: Tensor, place: Tensor, x: Tensor) -> None:
    """Write x B H T N to `place` int64 B*H*T of `stored` B H S N."""
    size = stored.shape[-1]
    stored.view(-1, size).index_copy_(0, place, x.reshape(-1, size))


def _write_chosen(stored: Tensor, slot: Tensor, x: Tensor, chosen: Tensor) -> None:
    """Write x L B H C N to slots `slot` L B H C of `stored` L B H S N where `chosen` B 1 C 1.

    Also as rows of one long table, which holds all rows of the batch, those dropped included.
    """
    size, (layers, rows, heads) = stored.shape[-1], stored.shape[:3]
    table = stored.as_strided((layers * stored.stride(0) // size, size), (size, 1))
    first = torch.zeros(1, dtype=torch.int64, device=slot.device)
    for count, stride in zip((layers, rows, heads), stored.stride()[:3], strict=True):
        first = first[..., None] + torch.arange(count, device=slot.device) * (stride // size)
    row = (first.view(layers, rows, heads, 1) + slot).view(-1)
    old = table.index_select(0, row)
    table.index_copy_(0, row, torch.where(chosen, x, old.view_as(x)).view_as(old))


STORAGE = {"full": Full, "int8": Int8, "int4": Int4}

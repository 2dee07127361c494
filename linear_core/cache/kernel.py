"""Attention of one query over the slots of a cache in a single pass: a Triton kernel for NVIDIA GPUs.

Importing this module needs Triton. `attention.kernel` says when the kernel is used. B batch, H heads, S slots, D head
size; Q query heads, as many for each key head. Programs of a group run side by side, so that all
but one of them find its keys in the cache of the GPU.

The softmax is computed online (Milakov and Gimelshein, arXiv 1805.02867), in float32. If B Q programs are too few to
fill a GPU, a head's slots are split among several programs and their partial results are reduced afterwards
(Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import GROUP as PER_GROUP
from .storage import RawSlots

TILE = 4096  # elements of keys, and of values, that a program holds at a time: 32 per thread of four warps
FILL = 256  # programs that fill a GPU, about two per multiprocessor


def attend_one(q: Tensor, keys: RawSlots, values: RawSlots, bias: Tensor) -> Tensor:
    """`attention.attend` for queries B Q 1 D and bias B H S, with keys and values in their storage format.

    Keys and values share one layout, and the last dimension of every tensor is contiguous. A query that sees nothing
    gets zeros. The split of slots follows from the shapes alone, so equal shapes give equal results.

    The kernel can be captured in a CUDA graph: it asks the device for no value, all memory is PyTorch's, and grid and
    arguments follow from shapes. It is compiled at the first call with such shapes, so before the capture.
    """
    (rows, heads, _, head_dim), slots = q.shape, bias.shape[2]
    strides = _strides(keys)
    assert strides == _strides(values) and bias.stride(2) == q.stride(3) == 1
    width = triton.next_power_of_2(head_dim)
    block = min(max(TILE // width, 16), 128)
    blocks = triton.cdiv(slots, block)
    wanted = min(triton.cdiv(FILL, rows * heads), triton.cdiv(blocks, 2))  # fewer than two blocks each do not pay
    split_size = triton.cdiv(blocks, wanted) * block
    splits = triton.cdiv(slots, split_size)
    out = q.new_empty(rows, heads, 1, head_dim)
    # Per split: the maximum score, the sum of exponentials, and the values weighted by them.
    partial = q.new_empty(rows, heads, splits, head_dim + 2, dtype=torch.float32) if splits > 1 else None
    bits = 0 if keys.scale is None else 8 if keys.data.dtype == torch.int8 else 4
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton launches on the current device
        _attend[(heads, rows, splits)](
            out, partial, q, *keys, *values, bias, head_dim**-0.5, slots, split_size,
            *q.stride()[:2], *strides, *bias.stride()[:2],
            GROUP=heads // bias.shape[1], DIM=head_dim, WIDTH=width, BLOCK=block, BITS=bits, PER_GROUP=PER_GROUP,
        )  # fmt: skip
        if partial is not None:
            _reduce_splits[(heads, rows)](
                out, partial, splits, DIM=head_dim, WIDTH=width, SPLITS_WIDTH=triton.next_power_of_2(splits)
            )
    return out


def _strides(raw: RawSlots) -> list[int]:
    """Strides of rows, heads and slots; of rows and heads for the scale, whose slots are contiguous."""
    tensors = [(raw.data, 3), (raw.scale, 2)]
    assert all(x is None or x.stride(n) == 1 for x, n in tensors)
    return [x.stride(i) if x is not None else 0 for x, n in tensors for i in range(n)]


@triton.jit(do_not_specialize=["slots", "split_size"])
def _attend(
    out, partial, q, k, k_scale, v, v_scale, bias, factor, slots, split_size,
    q_row, q_head, data_row, data_head, data_slot, scale_row, scale_head, bias_row, bias_head,
    GROUP: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, BITS: tl.constexpr,
    PER_GROUP: tl.constexpr,
):  # fmt: skip
    """One head's query over `split_size` of its slots, which are in 8 or 4 bits (BITS) or as they were computed (0)."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # a layer may have over 2^31 elements
    split, splits = tl.program_id(2), tl.num_programs(2)
    d = tl.arange(0, WIDTH)
    in_head = d < DIM
    query = tl.load(q + row * q_row + head * q_head + d, mask=in_head, other=0.0).to(tl.float32) * factor
    row_head = row * tl.num_programs(0) + head  # of the result
    head = head // GROUP  # from here on that of the keys
    data_offset = row * data_row + head * data_head
    k += data_offset
    v += data_offset
    bias += row * bias_row + head * bias_head
    if BITS:
        k_scale += row * scale_row + head * scale_head
        v_scale += row * scale_row + head * scale_head
    max_score, sum_exp, acc = float("-inf"), 0.0, tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum((split + 1) * split_size, slots)
    for first in range(split * split_size, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        in_split = slot < end
        offset = slot[:, None] * data_slot
        mask = in_split[:, None] & in_head[None, :]
        if BITS == 4:
            keys = _four_bits(k + offset, d[None, :], mask, DIM, PER_GROUP)
            values = _four_bits(v + offset, d[None, :], mask, DIM, PER_GROUP)
        else:
            keys = tl.load(k + offset + d[None, :], mask=mask, other=0).to(tl.float32)
            values = tl.load(v + offset + d[None, :], mask=mask, other=0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], 1)
        slot_bias = tl.load(bias + slot, mask=in_split, other=float("-inf")).to(tl.float32)
        if BITS:
            scores *= tl.load(k_scale + slot, mask=in_split, other=0.0).to(tl.float32)
            values *= tl.load(v_scale + slot, mask=in_split, other=0.0).to(tl.float32)[:, None]
        max_score, sum_exp, acc = _online_softmax(max_score, sum_exp, acc, scores + slot_bias, values)
    if partial is None:
        tl.store(out + row_head * DIM + d, acc / tl.where(sum_exp == 0, 1.0, sum_exp), mask=in_head)
    else:
        partial += (row_head * splits + split) * (DIM + 2)
        tl.store(partial, max_score)
        tl.store(partial + 1, sum_exp)
        tl.store(partial + 2 + d, acc, mask=in_head)


@triton.jit
def _four_bits(data, d, mask, DIM: tl.constexpr, PER_GROUP: tl.constexpr):
    """Elements d of slots in `storage.Int4`'s format, without the slots' scale. Bytes that two elements share come
    from the GPU's cache the second time."""
    half: tl.constexpr = DIM // 2
    level = (tl.load(data + d % half, mask=mask, other=0).to(tl.int32) >> tl.where(d < half, 0, 4)) & 15
    group = half + d // PER_GROUP
    floor = tl.load(data + group, mask=mask, other=0).to(tl.float32)
    step = tl.load(data + group + (DIM + PER_GROUP - 1) // PER_GROUP, mask=mask, other=0).to(tl.float32)
    return floor / 127.5 - 1 + level * (step / (15 * 127.5))


@triton.jit
def _online_softmax(max_score, sum_exp, acc, scores, values):
    """Update the running softmax with scores BLOCK and values BLOCK WIDTH."""
    new_max = tl.maximum(max_score, tl.max(scores, 0))
    base = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing visible yet: -inf minus -inf would be NaN
    rescale, weights = tl.exp(max_score - base), tl.exp(scores - base)
    return new_max, sum_exp * rescale + tl.sum(weights, 0), acc * rescale + tl.sum(weights[:, None] * values, 0)


@triton.jit
def _reduce_splits(
    out, partial, splits, DIM: tl.constexpr, WIDTH: tl.constexpr, SPLITS_WIDTH: tl.constexpr
):  # fmt: skip
    """Combine the partial results of a head's splits."""
    row_head = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    split, d = tl.arange(0, SPLITS_WIDTH), tl.arange(0, WIDTH)
    valid, in_head = split < splits, d < DIM
    partial += row_head * splits * (DIM + 2) + split * (DIM + 2)
    max_score = tl.load(partial, mask=valid, other=float("-inf"))
    sum_exp = tl.load(partial + 1, mask=valid, other=0.0)
    acc = tl.load(partial[:, None] + 2 + d[None, :], mask=valid[:, None] & in_head[None, :], other=0.0)
    new_max = tl.max(max_score, 0)
    weights = tl.exp(max_score - tl.where(new_max == float("-inf"), 0.0, new_max))
    total = tl.sum(weights * sum_exp, 0)
    mean = tl.sum(weights[:, None] * acc, 0) / tl.where(total == 0, 1.0, total)
    tl.store(out + row_head * DIM + d, mean, mask=in_head)

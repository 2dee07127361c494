"""One query over the slots of a cache in one pass: a kernel for NVIDIA GPUs in Triton, without which this module cannot
be imported. `attention.kernel` says when it is taken.

B batch, H heads, S slots, D numbers a head, C tokens a line. Softmax goes along with the slots (Milakov and Gimelshein,
arXiv 1805.02867), in float32. Where B H is too small to fill a GPU, several programs share the slots of a head, and
what they found is put together afterwards (Flash-Decoding, Dao et al. 2023).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

from .storage import RawSlots

TILE = 4096  # numbers that a program holds of keys, and of values, at a time: 32 for each thread of four warps
FILL = 256  # programs that fill a GPU, about two for each of its processors


def attend_one(q: Tensor, keys: RawSlots, values: RawSlots, bias: Tensor) -> Tensor:
    """`attention.attend` for queries B H 1 D and bias B H S, with keys and values as they lie.

    Keys and values have the same layout, and the last dimension of everything lies together. Queries that see nothing
    get zeros. The same shapes give the same numbers: they alone decide how slots are shared.

    Can be recorded as a CUDA graph: nothing is asked of the device, all memory is PyTorch's, and grids and arguments
    follow from shapes. What is compiled, at the first call with shapes of its kind, is so before the recording starts.
    """
    (rows, heads, _, dim), slots = q.shape, bias.shape[2]
    layout = _layout(keys)
    assert layout == _layout(values) and bias.stride(2) == q.stride(3) == 1
    width = triton.next_power_of_2(dim)
    block = min(max(TILE // width, 16), 128)
    blocks = triton.cdiv(slots, block)
    wanted = min(triton.cdiv(FILL, rows * heads), triton.cdiv(blocks, 2))  # two blocks each, or it is not worth it
    share = triton.cdiv(blocks, wanted) * block
    parts = triton.cdiv(slots, share)
    out = q.new_empty(rows, heads, 1, dim)
    # Of each part: the greatest score, the sum of weights, and values by weights.
    found = q.new_empty(rows, heads, parts, dim + 2, dtype=torch.float32) if parts > 1 else None
    line = 0 if keys.target is None else keys.target.shape[2]
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # Triton starts on the current one
        _attend[(heads, rows, parts)](
            out, found, q, *keys[:3], *values[:3], keys.target, bias, dim**-0.5, slots, share,
            *q.stride()[:2], *layout, *bias.stride()[:2],
            DIM=dim, WIDTH=width, BLOCK=block, LINE=line, LINE_WIDTH=triton.next_power_of_2(max(line, 1)),
        )  # fmt: skip
        if found is not None:
            _reduce_parts[(heads, rows)](
                out, found, parts, DIM=dim, WIDTH=width, PARTS_WIDTH=triton.next_power_of_2(parts)
            )
    return out


def _layout(held: RawSlots) -> list[int]:
    """Strides of rows, heads and slots; of scale and target, whose slots lie together, of rows and heads."""
    given = [(held.data, 3), (held.scale, 2), (held.fresh, 3), (held.target, 2)]
    assert all(x is None or x.stride(n) == 1 for x, n in given)
    return [x.stride(i) if x is not None else 0 for x, n in given for i in range(n)]


@triton.jit(do_not_specialize=["slots", "share"])
def _attend(
    out, found, q, k, k_scale, k_fresh, v, v_scale, v_fresh, target, bias, factor, slots, share,
    q_row, q_head, held_row, held_head, held_slot, scale_row, scale_head, fresh_row, fresh_head, fresh_token,
    target_row, target_head, bias_row, bias_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, LINE: tl.constexpr, LINE_WIDTH: tl.constexpr,
):  # fmt: skip
    """One head's query over `share` of its slots. The last part also takes the line being written, of LINE tokens; with
    0 there is none, and numbers are as computed."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)  # a layer may have more than 2^31 numbers
    part, parts = tl.program_id(2), tl.num_programs(2)
    n = tl.arange(0, WIDTH)
    there = n < DIM
    query = tl.load(q + row * q_row + head * q_head + n, mask=there, other=0.0).to(tl.float32) * factor
    first_held = row * held_row + head * held_head
    k += first_held
    v += first_held
    bias += row * bias_row + head * bias_head
    if LINE:
        k_scale += row * scale_row + head * scale_head
        v_scale += row * scale_row + head * scale_head
        target += row * target_row + head * target_head
        line = tl.arange(0, LINE_WIDTH)
        targets = tl.load(target + line, mask=line < LINE, other=-1)
    most, total, mixed = float("-inf"), 0.0, tl.zeros((WIDTH,), tl.float32)
    end = tl.minimum((part + 1) * share, slots)
    for first in range(part * share, end, BLOCK):
        slot = first + tl.arange(0, BLOCK)
        inside = slot < end
        place = slot[:, None] * held_slot + n[None, :]
        both = inside[:, None] & there[None, :]
        keys = tl.load(k + place, mask=both, other=0).to(tl.float32)
        values = tl.load(v + place, mask=both, other=0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], 1)
        seen = tl.load(bias + slot, mask=inside, other=float("-inf")).to(tl.float32)
        if LINE:
            scores *= tl.load(k_scale + slot, mask=inside, other=0.0).to(tl.float32)
            values *= tl.load(v_scale + slot, mask=inside, other=0.0).to(tl.float32)[:, None]
            replaced = tl.max((slot[:, None] == targets[None, :]).to(tl.int32), 1)
            seen = tl.where(replaced > 0, float("-inf"), seen)
        most, total, mixed = _add(most, total, mixed, scores + seen, values)
    if LINE:
        first_fresh = row * fresh_row + head * fresh_head
        k_fresh += first_fresh
        v_fresh += first_fresh
        for first in range(0, tl.where(part == parts - 1, LINE, 0), BLOCK):
            token = first + tl.arange(0, BLOCK)
            inside = token < LINE
            place = token[:, None] * fresh_token + n[None, :]
            both = inside[:, None] & there[None, :]
            keys = tl.load(k_fresh + place, mask=both, other=0.0).to(tl.float32)
            values = tl.load(v_fresh + place, mask=both, other=0.0).to(tl.float32)
            slot = tl.load(target + token, mask=inside, other=0)
            seen = tl.load(bias + slot, mask=inside, other=float("-inf")).to(tl.float32)
            scores = tl.sum(keys * query[None, :], 1) + seen
            most, total, mixed = _add(most, total, mixed, scores, values)
    place = row * tl.num_programs(0) + head
    if found is None:
        tl.store(out + place * DIM + n, mixed / tl.where(total == 0, 1.0, total), mask=there)
    else:
        found += (place * parts + part) * (DIM + 2)
        tl.store(found, most)
        tl.store(found + 1, total)
        tl.store(found + 2 + n, mixed, mask=there)


@triton.jit
def _add(most, total, mixed, scores, values):
    """Softmax so far, and what more scores BLOCK and values BLOCK WIDTH make of it."""
    higher = tl.maximum(most, tl.max(scores, 0))
    base = tl.where(higher == float("-inf"), 0.0, higher)  # nothing seen yet: infinity less infinity is no number
    before, weights = tl.exp(most - base), tl.exp(scores - base)
    return higher, total * before + tl.sum(weights, 0), mixed * before + tl.sum(weights[:, None] * values, 0)


@triton.jit
def _reduce_parts(
    out, found, parts, DIM: tl.constexpr, WIDTH: tl.constexpr, PARTS_WIDTH: tl.constexpr
):  # fmt: skip
    """What all parts of a head's slots found."""
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    part, n = tl.arange(0, PARTS_WIDTH), tl.arange(0, WIDTH)
    inside, there = part < parts, n < DIM
    found += place * parts * (DIM + 2) + part * (DIM + 2)
    most = tl.load(found, mask=inside, other=float("-inf"))
    total = tl.load(found + 1, mask=inside, other=0.0)
    mixed = tl.load(found[:, None] + 2 + n[None, :], mask=inside[:, None] & there[None, :], other=0.0)
    higher = tl.max(most, 0)
    weights = tl.exp(most - tl.where(higher == float("-inf"), 0.0, higher))
    total = tl.sum(weights * total, 0)
    tl.store(out + place * DIM + n, tl.sum(weights[:, None] * mixed, 0) / tl.where(total == 0, 1.0, total), mask=there)

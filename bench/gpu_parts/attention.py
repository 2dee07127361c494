"""Attention of one query by our kernel and by PyTorch, over sizes and storage formats: where does each win?

Every call is recorded in a graph with its like over other slots, so that neither launches nor the GPU's cache decide.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.gpu import Ask
from bench.gpu_parts.common import DTYPE, Result, attempts, bandwidth_of, on_gpu, recorded, seconds_of, why_no_kernel
from linear_core.cache.attention import attend
from linear_core.cache.storage import STORAGE

HEADS = {"LlamaGen-XL": (20, 64), "Janus-Pro-7B": (32, 128)}
SLOTS = (97, 121, 169, 289, 577, 1153, 2305, 4160)
BATCHES = (1, 4, 16, 64, 256, 512)  # images, each of them twice with guidance
COLD = 2**28  # bytes of slots that calls take turns over: more than any GPU's cache
MOST = 12 * 2**30  # bytes of one size's slots


@torch.inference_mode()
def run(ask: Ask) -> Iterator[Result]:
    bandwidth, works = bandwidth_of(ask), []
    for name, (heads, dim) in HEADS.items():
        for storage in STORAGE:
            for slots in (97, 160) if ask.dry else SLOTS:
                for images in (1,) if ask.dry else BATCHES:
                    if 4 * images * heads * slots * dim * DTYPE.itemsize <= MOST:
                        called = {"heads": name, "storage": storage, "slots": slots, "images": images}
                        cell = partial(
                            compare, ask, bandwidth, storage, 2 * images, 2 if ask.dry else heads, dim, slots
                        )
                        works.append((called, cell))
    # Coarse first: if time runs out, every region has been seen.
    yield from attempts(ask, [work for start in (0, 2, 1, 3) for work in works[start::4]])


def compare(ask: Ask, bandwidth: float, storage: str, rows: int, heads: int, dim: int, slots: int) -> Result:
    filled = [[fill(ask, storage, rows, heads, dim, slots) for _ in range(2)]]
    one = sum(stored.nbytes for stored in filled[0])
    copies = 1 if ask.dry else max(1, min(16, COLD // one))
    filled += [[fill(ask, storage, rows, heads, dim, slots) for _ in range(2)] for _ in range(copies - 1)]
    q = torch.randn(rows, heads, 1, dim, dtype=DTYPE, device=ask.device)
    bias = torch.zeros(rows, heads, slots, dtype=DTYPE, device=ask.device)
    contenders: dict[str, Any] = {"sdpa": through_sdpa}
    if why := why_no_kernel(ask):
        if on_gpu(ask):
            raise RuntimeError(f"the kernel cannot be used because {why}")
    else:
        contenders["kernel"] = through_kernel
    told: Result = {"bytes": one, "bound_us": 1e6 * one / bandwidth}
    seen: dict[str, Tensor] = {}
    for name, attention in contenders.items():

        def all_of_them(attention=attention) -> None:
            for keys, values in filled:
                attention(q, keys, values, bias, slots)

        taken = seconds_of(ask, recorded(ask, all_of_them), 5) / copies
        told |= {f"{name}_us": 1e6 * taken, f"{name}_of_copy_bandwidth": round(one / taken / bandwidth, 4)}
        seen[name] = attention(q, *filled[0], bias, slots)
    if "kernel" in seen:
        told["times_faster"] = round(told["sdpa_us"] / told["kernel_us"], 3)
        told["largest_difference"] = float((seen["sdpa"] - seen["kernel"]).abs().max())
    return told


def fill(ask: Ask, storage: str, rows: int, heads: int, dim: int, slots: int) -> Any:
    """One layer's keys or values, as a cache holds them within a line."""
    stored = STORAGE[storage]((1, rows, heads), slots, dim, DTYPE, ask.device)
    stored.write_prompt(0, torch.randn(rows, heads, slots, dim, dtype=DTYPE, device=ask.device))
    return stored


def through_sdpa(q: Tensor, keys: Any, values: Any, bias: Tensor, slots: int) -> Tensor:
    return attend(q, keys.read(0, slots), values.read(0, slots), bias)


def through_kernel(q: Tensor, keys: Any, values: Any, bias: Tensor, slots: int) -> Tensor:
    attend_one = import_module("linear_core.cache.kernel").attend_one
    return attend_one(q, keys.raw(0, slots), values.raw(0, slots), bias)

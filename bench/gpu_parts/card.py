"""The GPU and its ceilings: what copying, multiplying and launching cost there."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from bench.gpu import Ask
from bench.gpu_parts.common import Result, attempts, bandwidth_of, on_gpu, recorded, seconds_of
from linear_core.cache.attention import no_kernel

LAUNCHES = 500


def run(ask: Ask) -> Iterator[Result]:
    yield {"what": "card", **card(ask)}
    works = [
        ({"what": "copy"}, lambda: {"bytes_per_second": bandwidth_of(ask)}),
        ({"what": "matrix product, bfloat16"}, lambda: {"operations_per_second": products(ask)}),
        ({"what": "a small kernel"}, lambda: launches(ask)),
    ]
    yield from attempts(ask, works)


def card(ask: Ask) -> Result:
    if not on_gpu(ask):
        return {"name": ask.device}
    told = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": told.name,
        "capability": list(torch.cuda.get_device_capability()),
        "multiprocessors": told.multi_processor_count,
        "l2_bytes": getattr(told, "L2_cache_size", None),
        "memory_bytes": total,
        "free_bytes": free,
        "cuda": torch.version.cuda,
        "cpu_threads": torch.get_num_threads(),
        "kernel": no_kernel(torch.device(ask.device), torch.bfloat16) or "can run",
    }


def products(ask: Ask) -> float:
    size = 64 if ask.dry else 8192
    a, b = (torch.randn(size, size, device=ask.device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(ask, lambda: a @ b)


def launches(ask: Ask) -> Result:
    """Microseconds for one of many additions to a few numbers: started from Python, and from a graph."""
    x = torch.zeros(64, device=ask.device)

    def add() -> None:
        for _ in range(LAUNCHES):
            x.add_(1)

    each = 1e6 / LAUNCHES
    return {"eager_us": each * seconds_of(ask, add), "graph_us": each * seconds_of(ask, recorded(ask, add))}

"""Memory of a run beside the weights, and how many images fit into what there is. Numbers only."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from ..grid import Grid
from ..plan import CachePlan, CacheShape


def fold_pairs(device: str) -> int:
    """Pairs of slots that folding compares at once: what stays in a CPU's cache; on a GPU enough to keep it busy."""
    return 2**19 if device == "cpu" else 2**25


def run_bytes(shape: CacheShape, grid: Grid, plan: CachePlan, rows: int, codes: int, device: str = "cuda") -> int:
    """Cache, bookkeeping, a line's end, logits and noise, for `rows` sequences (images, twice with guidance).

    `device` is its type, on which it depends how much of a line's end is done at once.
    """
    held = shape.bytes(grid, plan, rows)
    # Beside keys and values a slot has a bias, an index, a score and its order; a line has its queries.
    slots = held // (2 * shape.head_dim * shape.bytes_per_element)
    beside = slots * (shape.bytes_per_element + 4 + 4 + 8) + shape.line_bytes(grid, rows) // 2
    each = shape.prompt + plan.lines(grid) * grid.stride  # slots of a head
    attention = rows * shape.heads * grid.stride * each * 4 * 2
    if plan.evicts(grid) and plan.release == "fold":  # distances between slots, and what four lines ahead will look at
        together = min(rows, max(1, fold_pairs(device) // (shape.heads * each**2)))
        attention = together * shape.heads * each * (7 * each + 2 * 4 * grid.stride) * 4
    logits = rows * codes * 4 * 8  # guided, sorted, softened: about eight copies
    return held + beside + attention + logits


def free_memory() -> int | None:
    """Bytes of the computer's memory that could be taken; None where the system does not tell without help."""
    try:
        told = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", told)
    return int(found[1]) * 1024 if found else None


def fits(room: int, images: int, needed: Callable[[int], int]) -> int:
    """How many of `images` can be drawn at once where n of them need `needed(n)` bytes of `room`; one at least."""
    most = 1
    while most < images and needed(most + 1) <= room:
        most += 1
    return most


def split_batch(images: int, at_once: int) -> list[range]:
    """A batch in parts of at most `at_once` images, as few and as even as can be."""
    count = -(-images // max(at_once, 1))
    edges = [images * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]

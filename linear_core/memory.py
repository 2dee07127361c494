"""Memory of a run beside the weights, and how many images fit into what there is. Numbers only."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

from .grid import Grid
from .plan import CachePlan, CacheShape


def run_bytes(shape: CacheShape, grid: Grid, plan: CachePlan, rows: int, codes: int) -> int:
    """Cache, bookkeeping, a line's end, logits and noise, for `rows` sequences (images, twice with guidance)."""
    held = shape.bytes(grid, plan, rows)
    # Beside keys and values a slot has a bias, an index, a score and its order; a line has its queries.
    slots = held // (2 * shape.dim * shape.bytes_per_number)
    beside = slots * (shape.bytes_per_number + 4 + 4 + 8) + shape.line_bytes(grid, rows) // 2
    attention = rows * shape.heads * grid.stride * (slots // (shape.layers * rows * shape.heads)) * 4 * 2
    logits = rows * codes * 4 * 8  # guided, sorted, softened: about eight copies
    return held + beside + attention + logits


def fits(room: int, images: int, needed: Callable[[int], int]) -> int:
    """How many of `images` can be drawn at once where n of them need `needed(n)` bytes of `room`; one at least."""
    most = 1
    while most < images and needed(most + 1) <= room:
        most += 1
    return most


def waves(images: int, at_once: int) -> list[range]:
    """A batch in parts of at most `at_once` images, as few and as even as can be."""
    count = -(-images // max(at_once, 1))
    edges = [images * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]

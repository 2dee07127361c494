"""Memory that a run needs besides the weights, and how many images fit. Numbers only."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

from ..grid import Grid
from ..plan import CachePlan, CacheShape, pairs_of_head
from ..pyramid import Pyramid
from ..steps import StepCachePlan, StepCacheShape

CONTEXT_BYTES = 2**30  # of a card's memory, that CUDA and PyTorch take for themselves
STREAMED_ROOM = 2**30  # of a card's memory, for weights that pass through it
BUS_BYTES = 25e9  # a second, from the computer's memory to a card in a PCIe 4.0 slot of 16 lanes
PAIRS = 2**21  # of slots, whose distances and vectors fit a CPU's cache


def fold_pairs(device: str) -> int:
    """Pairs of slots that folding compares at once: what fits a CPU's cache, or enough to keep a GPU busy."""
    return PAIRS if device == "cpu" else 2**25


def layers_at_once(shape: CacheShape, slots: int, rows: int, in_parts: bool) -> int:
    """Layers whose lines end together, for `rows` sequences whose heads have so many slots.

    Of few images, one layer is hardly more work than to launch its operations. On a GPU, too, no more than fit a CPU's
    cache: launches are then few enough, and memory is scarce.
    """
    pairs = rows * shape.heads * pairs_of_head(slots, shape.head_dim, in_parts)
    return min(shape.layers, max(1, PAIRS // pairs))


def run_bytes(
    shape: CacheShape, grid: Grid, plan: CachePlan, rows: int, codes: int, device: str = "cuda", window: int = 0
) -> int:
    """Bytes of cache, bookkeeping, line end, logits and noise, for `rows` sequences (images, twice with guidance).

    device  its type, which decides how much of a line's end is computed at once
    window  tokens of a pass with drafts; 0: none
    """
    held = shape.bytes(grid, plan, rows)
    # Besides key and value, a slot has a bias, an index, a score and its rank; a line has its queries.
    slots = held // (2 * shape.head_dim * shape.bytes_per_element)
    bookkeeping = slots * (shape.bytes_per_element + 4 + 4 + 8) + shape.line_bytes(grid, rows) * shape.group // 2
    head_slots = shape.prompt + plan.lines(grid) * grid.stride
    # Of a sequence in one layer. Where room is made within lines, values count as well, and queries look aside.
    in_parts = len(plan.ends(grid, grid.rows - 1)) > 1
    pairs = shape.heads * pairs_of_head(head_slots, shape.head_dim, in_parts)
    together = min(shape.layers * rows, PAIRS // pairs) if plan.evicts(grid) else 0  # of several layers, at most
    attention = max(rows, together) * shape.heads * shape.group * grid.stride * head_slots * 4 * 2
    if plan.evicts(grid) and plan.release == "fold":
        # Keys as float32 and sorted; distances to candidates; scores and weights of the look-ahead's queries.
        at_once = max(min(rows, max(1, fold_pairs(device) // pairs)), together)
        near = min(max(2 * grid.stride + plan.anchors + plan.recent * grid.stride, head_slots // 2), head_slots)
        vectors, horizons = (6, 3) if in_parts else (3, 2)
        each = vectors * shape.head_dim + 2 * near + 2 * horizons * shape.group * grid.stride
        attention = at_once * shape.heads * head_slots * each * 4
    if window:  # what a window's queries see, their scores, and queries, keys and values of all layers, twice
        seen = head_slots + window
        vectors = rows * shape.heads * shape.head_dim * shape.bytes_per_element
        attention = max(attention, rows * shape.heads * shape.group * window * seen * 4 * 3) + 2 * seen * vectors
        attention += 2 * (2 + shape.group) * shape.layers * window * vectors
    logits = rows * codes * 4 * 8 * max(window, 1)  # guidance, sorting and softmax make about eight copies
    return held + bookkeeping + attention + logits


def scales_run_bytes(
    shape: CacheShape,
    pyramid: Pyramid,
    plan: CachePlan,
    rows: int,
    logits: int,
    hidden: int,
    device: str = "cuda",
    stages: int = 0,
) -> int:
    """Bytes of cache, bookkeeping, the last scale's activations, settling, logits and noise, for `rows` sequences.

    Without a cache, of the state that joins the scales instead.

    logits  of a token
    hidden  numbers of a token in the middle of a feed-forward block, where a pass is widest
    stages  scales that are drawn; 0: all
    """
    held, slots = shape.scales_bytes(pyramid, plan, rows, stages), plan.work_slots(pyramid, stages)
    size = pyramid.size((stages or pyramid.stages) - 1)
    cached = not shape.state
    bookkeeping = shape.layers * rows * shape.heads * plan.keeps(pyramid) * (4 + 4 + 4) if cached else 0
    activations = rows * size * hidden * (shape.bytes_per_element * 2 + 4)
    settling = 0
    if cached and plan.keeps(pyramid) < pyramid.kept and pyramid.stages > 1:
        at_once = min(rows, max(1, fold_pairs(device) // (shape.heads * slots**2)))
        pairs = slots**2 if plan.release == "fold" else 64 * slots
        settling = at_once * shape.heads * pairs * 4 * 3
    sampling = rows * size * logits * (4 * 3 + 8 * 2)  # guidance, sorting, softmax; noise in int64
    return held + bookkeeping + max(activations, settling, sampling)


def masked_run_bytes(shape: StepCacheShape, plan: StepCachePlan, steps: int, rows: int, hidden: int) -> int:
    """Bytes of what is kept, what is fed, and the activations of a full pass, for `rows` sequences.

    hidden  numbers of a slot in the middle of a feed-forward block, where a pass is widest
    """
    width = shape.heads * shape.head_dim
    fed = rows * shape.slots * width * 4 * 4  # inputs of encoder and decoder, and their places
    activations = rows * shape.slots * (hidden * (shape.bytes_per_element + 4) + 8 * width * 4)
    modulations = 2**28  # of the diffusion head, and its noise
    return shape.bytes(plan, steps, rows) + fed + activations + modulations


def streamed_bytes(weights: int, card: int, run: int) -> int | None:
    """Bytes of `weights` that every pass has to fetch if `run` of the `card`'s bytes are taken; None: it does not fit.

    If all fit, nothing is fetched. Otherwise STREAMED_ROOM is left for those that are, and the rest stays on the card.
    """
    room = card - run
    if weights <= room:
        return 0
    return weights - (room - STREAMED_ROOM) if room >= STREAMED_ROOM else None


def streamed_seconds(streamed: int, passes: int, images: int) -> float:
    """Seconds that fetching alone takes for each of `images` that are drawn at once: they share every pass."""
    return streamed * passes / BUS_BYTES / images


def free_memory() -> int | None:
    """Free bytes of main memory; None if the system does not tell."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def max_batch_size(room: int, images: int, needed: Callable[[int], int]) -> int:
    """How many of `images` can be drawn at once if n of them need `needed(n)` of `room` bytes; at least one."""
    count = 1
    while count < images and needed(count + 1) <= room:
        count += 1
    return count


def split_batch(images: int, at_once: int) -> list[range]:
    """Split a batch into as few parts of at most `at_once` images as possible, of nearly equal size."""
    count = -(-images // max(at_once, 1))
    edges = [images * i // count for i in range(count + 1)]
    return [range(a, b) for a, b in pairwise(edges)]

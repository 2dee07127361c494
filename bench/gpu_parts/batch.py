"""A large batch, where the cache is most of the work: LlamaGen-XL at 384 pixels, 256 images with guidance."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu import Ask
from bench.gpu_parts.common import (
    DTYPE,
    Result,
    attempts,
    bandwidth_of,
    drawing,
    name_of,
    plan_of,
    release,
    shape_of,
    ways,
    why_no_kernel,
)  # fmt: skip
from bench.machine import synchronize
from bench.speed import Ours

MODEL, IMAGES = "LlamaGen-XL", 256
WAYS = [  # policy, storage, step, attention; in order of worth
    ("line", "full", "graph", "sdpa"),
    ("line", "full", "graph", "kernel"),
    ("full", "full", "eager", "sdpa"),
    ("line", "full", "eager", "sdpa"),
    ("fold", "full", "graph", "kernel"),
    ("line", "int8", "graph", "kernel"),
    ("full", "int8", "graph", "kernel"),
    ("full", "full", "graph", "kernel"),
    ("fold", "full", "graph", "sdpa"),
    ("line", "int8", "graph", "sdpa"),
]


@torch.inference_mode()
def run(ask: Ask) -> Iterator[Result]:
    shape, images = shape_of(ask, MODEL), 4 if ask.dry else IMAGES
    model, bandwidth = shape.make(DTYPE, ask.device), bandwidth_of(ask)

    def called(plan, step, attention, what="drawing"):
        told = {"what": what, "model": MODEL, "images": images, "plan": name_of(plan, shape.grid)}
        return told | {"step": step, "attention": attention}

    chosen = ways(ask, WAYS)
    yield from attempts(
        ask,
        [
            (called(*way), partial(drawing, ask, model, shape, way[0], images, *way[1:], bandwidth))
            for way in chosen[:3]
        ],
    )
    # Nothing is extrapolated here: one whole batch, with what recording the graphs costs.
    best = (plan_of(ask, "line"), "graph", "sdpa" if why_no_kernel(ask) else "kernel")
    yield from attempts(ask, [(called(*best, "whole images"), partial(whole, ask, model, shape, images, *best))])
    release(ask)
    yield from attempts(
        ask,
        [
            (called(*way), partial(drawing, ask, model, shape, way[0], images, *way[1:], bandwidth))
            for way in chosen[3:]
        ],
    )


def whole(ask: Ask, model, shape, images: int, plan, step: str, attention: str) -> Result:
    """A batch drawn by the real loop, from the prompt to the last line."""
    one = Ours("", model, shape, plan, images, step, attention)
    synchronize(ask.device)
    started = time.perf_counter()
    seconds, _ = one.picture()
    taken = time.perf_counter() - started
    return {"whole_seconds": round(taken, 3), "whole_images_per_second": images / taken, "line_seconds": seconds}

"""One and four images, where reading the weights is most of the work: graphs, the kernel, and wider forwards."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

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
    recorded,
    release,
    seconds_of,
    shape_of,
    ways,
)  # fmt: skip
from bench.speed import Ours

MODELS = ("LlamaGen-XL", "Janus-Pro-1B", "Janus-Pro-7B")
BATCHES = (1, 4)
WIDTHS = (1, 8, 24)  # tokens of a line, fed in one forward
WAYS = [
    ("line", "full", "graph", "sdpa"),
    ("line", "full", "graph", "kernel"),
    ("line", "full", "eager", "sdpa"),
    ("full", "full", "graph", "sdpa"),
    ("full", "full", "graph", "kernel"),
]


@torch.inference_mode()
def run(ask: Ask) -> Iterator[Result]:
    bandwidth = bandwidth_of(ask)
    models = MODELS[:2] if ask.dry else MODELS
    for number, name in enumerate(models):
        if ask.left <= 0:
            yield {"left_out": models[number:]}
            return
        shape = shape_of(ask, name)
        model = shape.make(DTYPE, ask.device)
        works = []
        for images in BATCHES[:1] if ask.dry else BATCHES:
            for plan, step, attention in ways(ask, WAYS):
                called = {"what": "drawing", "model": name, "images": images, "plan": name_of(plan, shape.grid)}
                works.append(
                    (
                        called | {"step": step, "attention": attention},
                        partial(drawing, ask, model, shape, plan, images, step, attention, bandwidth, 2),
                    )
                )
            called = {"what": "a wider forward", "model": name, "images": images}
            works.append((called, partial(widths, ask, model, shape, images)))
        yield from attempts(ask, works)
        del model, works
        release(ask)


def widths(ask: Ask, model: Any, shape: Any, images: int) -> Result:
    """Milliseconds of a forward of several tokens of a line, all of their logits wanted, as a graph and eagerly."""
    one = Ours("", model, shape, plan_of(ask, "line"), images, "graph", "sdpa")
    one.allocate()
    one.prefill()
    one.prepare(one.grid.rows - 2)
    first = (one.grid.rows - 2) * one.grid.stride
    told: Result = {}
    for width in (1, 2, 3) if ask.dry else WIDTHS:
        tokens = torch.zeros(one.rows.rows, width, dtype=torch.int64, device=model.device)
        index, columns = one.index[first : first + width], one.columns[:width]
        feed = partial(model.feed, tokens, index, one.rows.pad, columns, one.cache, all_logits=True)
        told[f"eager_ms_{width}"] = 1e3 * seconds_of(ask, feed)
        told[f"graph_ms_{width}"] = 1e3 * seconds_of(ask, recorded(ask, feed))
    step = partial(model.step, tokens[:, 0], index[:1], one.rows.pad, columns[:1], one.cache)
    told["graph_ms_step"] = 1e3 * seconds_of(ask, recorded(ask, step))
    return told

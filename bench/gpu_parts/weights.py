"""Weights in 8 and 4 bits at one image, where reading them is most of the work: products by size, and whole steps."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from bench.gpu import Ask
from bench.gpu_parts.common import DTYPE, Result, attempts, bandwidth_of, drawing, release, seconds_of, shape_of
from bench.shapes import ModelShape
from linear_core.checkpoints.library import stored_in
from linear_core.models.quantised import LAYOUTS, PLAIN, QUANTISATIONS, layout, quantise, quantise_model, works
from linear_core.plan import CachePlan

MODELS = ("LlamaGen-XL", "Janus-Pro-7B")
SIZES = ((3584, 1280), (4096, 4096), (11008, 4096))  # output and input channels
ROWS = (1, 2, 8, 16)


@torch.inference_mode()
def run(ask: Ask) -> Iterator[Result]:
    yield {
        "what": "products chosen",
        **{name: layout(kind.bits, _device(ask), 4096) for name, kind in QUANTISATIONS.items()},
    }
    sizes = ((64, 256),) if ask.dry else SIZES
    yield from attempts(
        ask, [({"what": "products", "outputs": o, "inputs": i}, partial(products, ask, o, i)) for o, i in sizes]
    )
    bandwidth = bandwidth_of(ask)
    for name in MODELS[:1] if ask.dry else MODELS:
        shape, model = shape_of(ask, name), None
        for weights in ("default", *QUANTISATIONS):
            if ask.left <= 0:
                yield {"left_out": [name, weights]}
                return
            model = None
            release(ask)
            model = shape.make(DTYPE, ask.device)
            if weights != "default":
                quantise_model(model, stored_in(QUANTISATIONS[weights]))
            for step in ("eager",) if ask.dry else ("graph", "eager"):
                called = {"what": "drawing", "model": name, "images": 1, "weights": weights, "step": step}
                yield from attempts(ask, [(called, partial(whole, ask, model, shape, step, bandwidth))])
        del model
        release(ask)


def whole(ask: Ask, model: Any, shape: ModelShape, step: str, bandwidth: float) -> Result:
    """As `drawing`, with the full cache; and the bytes of the weights as they are stored."""
    told = drawing(ask, model, shape, CachePlan("full"), 1, step, "sdpa", bandwidth, 2)
    return told | {"stored_bytes": sum(p.nbytes for p in model.parameters())}


def products(ask: Ask, outputs: int, inputs: int) -> Result:
    """Microseconds of every product that works here, over eight matrices in turn so that no cache holds them."""
    told: Result = {}
    source = torch.Generator().manual_seed(0)
    for rows in ROWS:
        x = torch.randn(rows, inputs, generator=source).to(ask.device, DTYPE)
        plain = [torch.randn(outputs, inputs, device=ask.device, dtype=DTYPE) for _ in range(8)]
        told[f"bfloat16, {rows}"] = _each(ask, lambda x=x, w=plain: [torch.nn.functional.linear(x, one) for one in w])
        for kind in QUANTISATIONS.values():
            stored = [quantise(one, kind) for one in plain]
            for name, of in LAYOUTS.items():
                if name == PLAIN or name.startswith("int4") != (kind.bits == 4) or not works(name, str(_device(ask))):
                    continue
                packed = [(of.pack(matrix), scale) for matrix, scale in stored]
                told[f"{name}, {rows}"] = _each(
                    ask, lambda x=x, of=of, packed=packed: [of.product(x, *one) for one in packed]
                )
    return told


def _each(ask: Ask, work: Any) -> float:
    return round(1e6 * seconds_of(ask, work) / 8, 2)


def _device(ask: Ask) -> torch.device:
    return torch.empty(0, device=ask.device).device

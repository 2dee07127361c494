"""Which large text-to-image models fit on which card, and under which cache: the table in README.md.

    python bench/cards.py

One square picture with guidance, computed in bfloat16, with large matrices in bfloat16, 8 or 4 bits. Counted are the
weights, the cache and what a run needs besides it, by the formulas that the pack plans with, and a GiB for CUDA and
PyTorch. The VQ tokenizer is not: ComfyUI unloads the decoder when it needs the room for it. Nothing is allocated and
nothing was measured on a card.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.shapes import SHAPES, ModelShape
from linear_core.checkpoints.library import stored_in
from linear_core.loop.memory import CONTEXT_BYTES, run_bytes
from linear_core.models.quantised import QUANTISATIONS, chosen
from linear_core.plan import PRESETS, CachePlan

MODELS = ("Lumina-mGPT-2.0-768", "Emu3-Gen", "Xiaomi-Robotics-U0-4B", "Emu3.5-Image")
SHARES = {"full": 1, "1/6": 6, "1/12": 12}
CARDS = (8, 12, 16, 24)  # GiB
GIB = 2**30
HEAD = """| model | image | weights, GB: bfloat16 · int8 · int4 | cache, GiB: full · 1/6 · 1/12 | {} |
|---|---|---|---|---|---|---|---|""".format(" | ".join(f"{card} GB" for card in CARDS))


def plan(shape: ModelShape, share: int) -> CachePlan:
    """A cache of this share of the lines, folded."""
    return PRESETS["Full"] if share == 1 else CachePlan("fold", budget=round(shape.grid.rows / share), recent=0)


def weight_bytes(shape: ModelShape) -> dict[str, int]:
    """Of the decoder, with its large matrices in bfloat16, in 8 and in 4 bits."""
    with torch.device("meta"):
        tensors = shape.network(shape.config, shape.grid).state_dict()
    sizes = {"bfloat16": sum(2 * t.numel() for t in tensors.values())}
    for called, kind in QUANTISATIONS.items():
        stored = stored_in(kind)
        large = [(t, own) for name, t in tensors.items() if (own := stored(name, t))]
        saved = sum(2 * t.numel() - chosen(own, *t.shape).bytes(*t.shape) for t, own in large)
        sizes[called] = sizes["bfloat16"] - saved
    return sizes


def row(shape: ModelShape) -> str:
    """A model's line of the table. On each card the first choice that fits: more bits first, then large caches."""
    cache, weights = shape.cache_shape(torch.bfloat16), weight_bytes(shape)
    held = {name: cache.bytes(shape.grid, plan(shape, share), 2) for name, share in SHARES.items()}
    total = {
        f"{kind}, {name}": CONTEXT_BYTES
        + weights[kind]
        + run_bytes(cache, shape.grid, plan(shape, share), 2, shape.config.codes)
        for kind in weights
        for name, share in SHARES.items()
    }
    fits = (next((how for how, size in total.items() if size <= card * GIB), "no") for card in CARDS)
    side = shape.grid.rows * (8 if shape.config.codes < 2**17 else 16)
    stored = " · ".join(f"{size / 1e9:.1f}" for size in weights.values())
    kept = " · ".join(f"{size / GIB:.2f}" for size in held.values())
    name = shape.name.removesuffix(f"-{side}")
    return f"| {name} | {side} × {side} | {stored} | {kept} | {' | '.join(fits)} |"


def table() -> str:
    return "\n".join([HEAD, *(row(SHAPES[name]) for name in MODELS)])


if __name__ == "__main__":
    print(table())

"""Published loops with our weights on the same GPU: LlamaGen's from a checkout, Janus' from transformers."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

import torch

from bench.gpu import Ask, NotHere
from bench.gpu_parts.common import Result, attempts, bandwidth_of, plan_of, shape_of
from bench.peer import chosen, problem
from bench.speed import measure


@torch.inference_mode()
def run(ask: Ask) -> Iterator[Result]:
    bandwidth = bandwidth_of(ask)
    wanted = [(ask.against, "LlamaGen-XL", 256), (ask.against, "LlamaGen-XL", 1)] if ask.against else []
    wanted += [("transformers", "Janus-Pro-1B", 1)]
    works, why = [], []
    for against, name, images in wanted:
        shape = shape_of(ask, name)
        if missing := problem(against, [shape]):
            why.append(missing)
            continue
        called = {"peer": chosen(against).label, "model": name, "images": images}
        works.append((called, partial(beside, ask, against, shape, min(images, 2) if ask.dry else images, bandwidth)))
    if not works:
        raise NotHere(" ".join(why))
    yield from attempts(ask, works)


def beside(ask: Ask, against: str, shape, images: int, bandwidth: float) -> Result:
    """The peer's times, with ours (4 of 24 lines, eager) taking turns with it."""
    settings = argparse.Namespace(
        device=ask.device, dtype=["bfloat16"], weights=["default"],
        plans=[plan_of(ask, "line")], steps=["eager"], attention=["sdpa"],
        drafts=[0], lines=1, repeat=1 if ask.dry else 3, against=against, unpacked=True,
    )  # fmt: skip
    *_, found = measure(shape, images, settings, bandwidth)
    ours, theirs = found
    return {key: theirs.get(key) for key in ("step_ms", "image_seconds", "images_per_second")} | {
        "ours_step_ms": ours["step_ms"],
        "ours_images_per_second": ours["images_per_second"],
        "extrapolated_from_lines": theirs["extrapolated_from_lines"],
    }

"""Drafts: several tokens are guessed and checked in one forward, on the bundled model, which accepts some of them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench.gpu import Ask
from bench.gpu_parts.common import Result, attempts
from bench.machine import synchronize
from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.loop.drafts import check
from linear_core.loop.generate import evict, generate
from linear_core.loop.graph import Graphs
from linear_core.plan import CachePlan
from linear_core.prompts import class_prompt

DRAFTS = (0, 24, 8, 16, 48)


def run(ask: Ask) -> Iterator[Result]:
    model = load_model(bundled_files(), device=ask.device)
    plain: dict[int, torch.Tensor] = {}
    works = []
    for images in (1,) if ask.dry else (1, 2, 4):
        for drafts in (0, 8) if ask.dry else DRAFTS:
            for step in ("eager",) if ask.dry else ("graph", "eager"):
                called = {"images": images, "drafts": drafts, "step": step}
                works.append((called, partial(drawn, ask, model, images, drafts, step, plain)))
    yield from attempts(ask, works)


def drawn(ask: Ask, model: Any, images: int, drafts: int, step: str, plain: dict[int, torch.Tensor]) -> Result:
    """A whole batch after one that is not counted; its codes beside those without drafts."""
    prompt = class_prompt([i % model.info.config.classes for i in range(images)])
    sample = replace(model.info.defaults, drafts=drafts)
    graphs = Graphs(model.decoder.step, evict, check) if step == "graph" else None
    draw = partial(generate, model.decoder, prompt, CachePlan("fold", 4, recent=0), sample)
    above = torch.zeros(1, 22, 24, dtype=torch.int64) if ask.dry else None
    for _ in range(1 if ask.dry else 2):
        synchronize(ask.device)
        started = time.perf_counter()
        lines = list(draw(above=above, **(graphs.kwargs if graphs else {})))
        taken = time.perf_counter() - started
    codes = torch.stack([line.tokens for line in lines], 1)
    plain.setdefault(images, codes)
    passes = sum(line.passes for line in lines)
    return {
        "images_per_second": images / taken,
        "passes_per_token": passes / codes[0].numel() if drafts else None,
        "codes_that_differ": int((codes != plain[images]).sum()),
        "not_recorded": graphs.why if graphs else "",
    }

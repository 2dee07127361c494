"""The bundled model on the GPU beside the CPU: same noise, so the same codes but for rounding, which is counted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bench.gpu import Ask
from bench.gpu_parts.common import Result, attempts, why_no_kernel
from linear_core.cache.attention import SWITCH
from linear_core.checkpoints.library import ImageModel, bundled_files, load_model
from linear_core.loop.forced import forced_lines
from linear_core.loop.generate import evict, generate, scores
from linear_core.loop.graph import Graphs
from linear_core.loop.sampling import Noise
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, class_prompt

PLANS = (CachePlan("line", 4), CachePlan("fold", 4, recent=0), CachePlan("full"))


def run(ask: Ask) -> Iterator[Result]:
    if not ask.dry:
        torch.set_num_threads(os.cpu_count() or 1)  # for the reference
    model = load_model(bundled_files())
    images, sample = 1 if ask.dry else 2, model.info.defaults
    prompt = class_prompt([i % model.info.config.classes for i in range(images)])
    above = None
    if ask.dry:  # most of the image is given, and only its end is drawn
        above = torch.arange(22 * 24).view(1, 22, 24) % model.decoder.codes
    for plan in PLANS[:1] if ask.dry else PLANS:
        if ask.left <= 0:
            yield {"left_out": f"{plan.policy} and what follows"}
            return
        codes = drawn(model, prompt, plan, sample, above)
        kinds = [("float32", "sdpa", "eager"), ("float32", "sdpa", "graph"), ("float32", "kernel", "graph")]
        kinds += [("bfloat16", "sdpa", "graph"), ("bfloat16", "kernel", "graph"), ("float16", "sdpa", "graph")]
        works = []
        for dtype, attention, step in kinds[:1] if ask.dry else kinds:
            if attention == "sdpa" or not why_no_kernel(ask):
                called = {"plan": plan.policy, "dtype": dtype, "attention": attention, "step": step, "images": images}
                told = partial(beside, ask, model, codes, prompt, plan, sample, above, dtype, attention, step)
                works.append((called, told))
        yield from attempts(ask, works)


def beside(
    ask: Ask, reference: ImageModel, codes: Tensor, prompt: Prompt, plan: CachePlan, sample: SamplePlan,
    above: Tensor | None, dtype: str, attention: str, step: str,
) -> Result:  # fmt: skip
    """What this way of drawing makes of the reference's image, given its codes and drawn by itself."""
    os.environ[SWITCH] = attention
    other = load_model(bundled_files(), device=ask.device, dtype=getattr(torch, dtype))
    own = drawn(other, prompt, plan, sample, above, graphs=step == "graph")
    told = agreement(reference.decoder, other.decoder, prompt, codes, plan, sample, 6 if ask.dry else None)
    pictures = [model.tokenizer.decode(codes.to(model.decoder.device)) for model in (reference, other)]
    told["largest_pixel_difference"] = float((pictures[0].cpu().float() - pictures[1].cpu().float()).abs().max())
    told["drawn_codes"], told["drawn_codes_that_differ"] = codes.numel(), int((own != codes).sum())
    told["images_that_are_equal"] = int((own == codes).flatten(1).all(1).sum())
    return told


def drawn(
    model: ImageModel, prompt: Prompt, plan: CachePlan, sample: SamplePlan, above: Tensor | None, graphs: bool = False
) -> Tensor:
    kwargs: dict[str, Any] = Graphs(model.decoder.step, evict).kwargs if graphs else {}
    return torch.stack([x.tokens for x in generate(model.decoder, prompt, plan, sample, above=above, **kwargs)], 1)


@torch.inference_mode()
def agreement(
    one: Any, other: Any, prompt: Prompt, codes: Tensor, plan: CachePlan, sample: SamplePlan, lines: int | None = None
) -> Result:
    """Two decoders given the same codes B rows cols: how many next codes they would draw differently, and how closely.

    lines   as many lines of the image; None: all
    margin  by how much the first one's code won over the other's, in the first one's numbers: 0 is a tie. Both have the
            same noise, so that a code differs only where rounding decides
    """
    both = []
    for decoder in (one, other):
        there = prompt.to(decoder.device)
        rows = decoder.with_unconditional(there) if sample.guided else there
        fed = codes.repeat(rows.rows // prompt.rows, 1, 1)
        both.append(forced_lines(decoder, rows, fed, plan))
    noise = Noise(sample.seed, prompt.rows, one.codes, "cpu")
    stride, differ, margins, largest, count = one.grid.stride, 0, [0.0], 0.0, 0
    for row, given in enumerate(islice(zip(*both, strict=True), lines)):
        logits = [line.float().cpu() for line in given]
        largest = max(largest, float((logits[0] - logits[1]).abs().max()))
        for column in range(codes.shape[-1]):
            number = row * stride + column
            race = [
                scores(line[:, column], number, prompt.rows, sample) / (sample.temperature or 1.0)
                - noise.exponential(number).log() * (sample.temperature > 0)
                for line in logits
            ]
            first, second = (each.argmax(-1) for each in race)
            off = first != second
            differ, count = differ + int(off.sum()), count + len(off)
            won = race[0].gather(-1, first[:, None]) - race[0].gather(-1, second[:, None])
            margins += won[off, 0].tolist()
    return {
        "forced_codes": count,
        "forced_codes_that_differ": differ,
        "largest_margin": max(margins),
        "largest_logit_difference": largest,
    }

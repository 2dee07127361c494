"""Evidence on anybody's own weights: the full cache against a few lines, at several budgets.

The same pictures are drawn from the same seeds under all caches, which take turns, so that their times compare. Then
the full cache's pictures go through all of them, and the distributions of every next token are compared
(teacher-forced).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checkpoints.families import ModelInfo
from .checkpoints.library import ImageModel
from .loop.forced import forced_lines
from .loop.generate import Run, generate
from .loop.micro_batches import merge_lines
from .loop.scales import forced_scales, generate_scales
from .plan import CachePlan, SamplePlan
from .prompts import Prompt

MIB = 2**20
FULL = CachePlan("full")
TEXTS = ("a red fox in the snow", "a lighthouse at dusk", "a bowl of oranges", "a steam train in the mountains",
         "an old sailor", "a city street in the rain", "a field of sunflowers", "a glass chess set")  # fmt: skip
# Student's t, 97.5 %, by degrees of freedom; in between, the next smaller entry is used, which is conservative.
STUDENT = {1: 12.71, 2: 4.30, 3: 3.18, 5: 2.57, 7: 2.36, 11: 2.20, 15: 2.13, 23: 2.07, 31: 2.04, 63: 2.0}


@dataclass(frozen=True)
class Checked:
    """What was found of one plan.

    run  what it drew
    kl   Kullback-Leibler divergence of its next-token distributions from the full cache's, nats per token, for each
         picture: float64 B. Without guidance
    same  share of each picture's codes that are the full cache's, drawn from the same seed: float64 B
    """

    plan: CachePlan
    run: Run
    kl: Tensor
    same: Tensor

    @property
    def cache_bytes(self) -> int:
        """Keys and values while drawing."""
        return max(int(line.cache_bytes) for line in self.run.lines)

    @property
    def divergence(self) -> str:
        """Mean and half of the 95 % interval of its divergence."""
        spread = half_width(self.kl)
        return f"{float(self.kl.mean()):.4f}" + ("" if math.isnan(spread) else f" ± {spread:.4f}")

    def as_row(self) -> dict[str, Any]:
        """Its numbers, for a file."""
        return {
            **vars(self.plan),
            "kl": float(self.kl.mean()),
            "kl_ci": None if math.isnan(spread := half_width(self.kl)) else spread,
            "kl_of_pictures": self.kl.tolist(),
            "same_codes": float(self.same.mean()),
            "cache_bytes": self.cache_bytes,
            "seconds": self.run.seconds,
            "tokens_per_second": self.run.tokens_per_second,
        }


def check_plans(
    model: ImageModel,
    prompt: Prompt,
    plans: Sequence[CachePlan],
    sample: SamplePlan,
    tick: Callable[[int], None] = lambda tokens: None,
) -> list[Checked]:
    """Measure the full cache and each of `plans` on one image for each row of `prompt`; the full cache comes first.

    All caches are in memory at once. `tick` is called with the tokens that one of the caches has drawn, or been fed
    """
    plans = [FULL, *plans]
    runs = draw_together(model, prompt, plans, sample, tick)
    kl = divergences(model, prompt, runs[0].tokens, plans, tick)
    same = [(run.tokens == runs[0].tokens).flatten(1).double().mean(1) for run in runs]
    return [Checked(*each) for each in zip(plans, runs, kl, same, strict=True)]


def joined(parts: Sequence[Sequence[Checked]]) -> list[Checked]:
    """Results of several batches, as if drawn at once; seconds add up."""
    whole = []
    for same_plan in zip(*parts, strict=True):
        run = Run()
        for line in merge_lines([part.run.lines for part in same_plan]):
            run.add(line)
        kl, same = (torch.cat([getattr(part, name) for part in same_plan]) for name in ("kl", "same"))
        whole.append(Checked(same_plan[0].plan, run, kl, same))
    return whole


def table(found: Sequence[Checked], names: Sequence[str]) -> list[str]:
    """The lines of a table, a plan a line; the first is the full cache. `names` are the plans'."""
    full, width = found[0], max(len(name) for name in names) + 2
    lines = [f"{'':{width}}{'KL, nats a token':>20}{'same codes':>12}{'cache MiB':>12}{'of full':>9}{'time':>8}"]
    for each, name in zip(found, names, strict=True):
        size = f"{each.cache_bytes / MIB:>12.2f}{each.cache_bytes / full.cache_bytes:>9.0%}"
        time = f"{each.run.seconds / max(full.run.seconds, 1e-9):>7.2f}×"
        lines.append(f"{name:{width}}{each.divergence:>20}{float(each.same.mean()):>12.0%}{size}{time}")
    return lines


def draw_together(
    model: ImageModel, prompt: Prompt, plans: Sequence[CachePlan], sample: SamplePlan, tick: Callable[[int], None]
) -> list[Run]:
    """The same images under several caches, which take turns line by line, or scale by scale."""
    decoder, name = model.decoder, model.info.name
    drawing: list[Iterator[Any]]
    if model.info.pyramid is None:
        drawing = [generate(decoder, prompt, plan, sample, name=name) for plan in plans]
    else:
        quantizer = model.tokenizer.quantize
        drawing = [generate_scales(decoder, quantizer, prompt, plan, sample, name=name) for plan in plans]
    runs = [Run() for _ in plans]
    for lines in zip(*drawing, strict=True):
        for run, line in zip(runs, lines, strict=True):
            run.add(line)
            tick(line.tokens.numel())
    return runs


@torch.inference_mode()
def divergences(
    model: ImageModel, prompt: Prompt, tokens: Tensor, plans: Sequence[CachePlan], tick: Callable[[int], None]
) -> list[Tensor]:
    """KL divergence of each plan's next-token distributions from the first plan's: float64 B each, nats per token.

    tokens  the pictures, codes B rows cols, or B N of all scales
    """
    totals, count = [torch.zeros(prompt.rows, dtype=torch.float64) for _ in plans], 0
    for first, *others in zip(*(_forced(model, prompt, tokens, plan) for plan in plans), strict=True):
        expected = first.float().log_softmax(-1)
        tick(expected[..., 0].numel())
        for total, logits in zip(totals[1:], others, strict=True):
            kl = (expected.exp() * (expected - logits.float().log_softmax(-1))).nan_to_num().sum(-1)
            total += kl.flatten(1).sum(1).double().cpu()
            tick(kl.numel())
        count += expected.shape[1]
    return [total / count for total in totals]


def _forced(model: ImageModel, prompt: Prompt, tokens: Tensor, plan: CachePlan) -> Iterator[Tensor]:
    """Logits of each line or scale: B n V, or where a token is several draws, B n draws V."""
    decoder, prompt = model.decoder, prompt.to(model.decoder.device)
    if model.info.pyramid is None:
        yield from forced_lines(decoder, prompt, tokens, plan)
        return
    for logits in forced_scales(decoder, model.tokenizer.quantize, prompt, tokens, plan):
        yield logits.unflatten(-1, (decoder.digits, -1))


def usual_classes(info: ModelInfo, count: int) -> list[str]:
    """Classes from all over the model's, by name where it has names."""
    count = min(count, info.config.classes)
    numbers = [i * info.config.classes // count for i in range(count)]
    return [info.classes[number] if info.classes else str(number) for number in numbers]


def half_width(values: Tensor) -> float:
    """Half of the 95 % interval of the mean of `values`; NaN for fewer than two."""
    if len(values) < 2:
        return math.nan
    factor = next(t for n, t in reversed(STUDENT.items()) if n <= len(values) - 1)
    return factor * float(values.std()) / math.sqrt(len(values))

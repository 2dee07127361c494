"""How far weights in 8 and 4 bits move the next token's probabilities: rows beside those of the cache in quality.py.

    python bench/quality.py --weights int8 int4 --images 24

Teacher-forced, as the rows of the cache: held-out pictures go through the full cache with all weights as published,
and then with matrices quantised. Measured are the Kullback-Leibler divergence and the negative log-likelihood. A text
model is measured beside the given one: its sizes are tiny and its weights random, of the magnitude of trained ones,
and the pictures are those that it draws.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.forced import FULL, forced_logits
from bench.shapes import ModelShape
from bench.uncertainty import half_width
from linear_core.checkpoints.library import stored_in
from linear_core.grid import Grid
from linear_core.loop.generate import Run, generate
from linear_core.models.janus import Janus, JanusConfig
from linear_core.models.quantised import QUANTISATIONS, quantise_model
from linear_core.plan import CachePlan, SamplePlan

TEXT_MODEL = ModelShape(
    "text model, random weights", Janus, JanusConfig(8, 256, 8, 768, 1024, 1024, head_hidden=256), Grid(16, 16),
    SamplePlan(guidance=5.0), prompt_tokens=16,
)  # fmt: skip


def rows(decoder: Any, prompt: Any, codes: Tensor, kinds: list[str], cache: CachePlan) -> list[dict[str, Any]]:
    """A row for each kind of weights with the full cache, then for `cache` with full weights and with each kind.

    codes  B rows cols
    """
    full = forced_logits(decoder, prompt, codes, FULL).log_softmax(-1)
    target = codes.flatten(1)[..., None]
    found = []
    models = {"default": decoder}
    for kind in kinds:
        models[kind] = quantise_model(deepcopy(decoder), stored_in(QUANTISATIONS[kind]))
    for plan in (FULL, cache):
        for kind, model in models.items():
            if plan is FULL and kind == "default":
                continue
            other = forced_logits(model, prompt, codes, plan).log_softmax(-1)
            kl = (full.exp() * (full - other)).sum(-1).double().mean(1).numpy()
            dnll = (full - other).gather(-1, target)[..., 0].double().mean(1).numpy()
            found.append(
                {
                    "weights": kind,
                    "cache": "full" if plan is FULL else f"{plan.policy} {plan.budget}/{decoder.grid.rows}",
                    "images": len(codes),
                    "kl": float(kl.mean()),
                    "kl_ci": half_width(kl),
                    "dnll": float(dnll.mean()),
                    "dnll_ci": half_width(dnll),
                    "matrix_bytes": sum(p.nbytes for n, p in model.named_parameters() if n.startswith("layers.")),
                }
            )
    return found


def text_model(images: int) -> tuple[Any, Any, Tensor]:
    """The text model, prompts, and pictures that it draws with the full cache."""
    torch.manual_seed(0)
    decoder, prompt = TEXT_MODEL.make(torch.float32, "cpu"), TEXT_MODEL.prompt(images)
    run = Run()
    for line in generate(decoder, prompt, FULL, replace(TEXT_MODEL.sample, seed=1)):
        run.add(line)
    return decoder, prompt, run.tokens


def table(measured: list[dict[str, Any]]) -> str:
    head = [
        "| model | weights | cache | KL, nats a token | change of the negative log-likelihood |",
        "|---|---|---|---|---|",
    ]
    lines = [
        f"| {r['model']} | {r['weights']} | {r['cache']} | {r['kl']:.5f} ± {r['kl_ci']:.5f} "
        f"| {r['dnll']:+.5f} ± {r['dnll_ci']:.5f} |"
        for r in measured
    ]
    return "\n".join([*head, *lines])

"""Ours equals the published LlamaGen on small random weights: recorded numbers, see llamagen_reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.models.llamagen import LlamaGen, read_config
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, class_prompt
from linear_core.tokenizers.tokenizer import VQTokenizer
from linear_core.tokenizers.tokenizer import read_config as read_vq_config
from tests.drawn import digest
from tests.models import llamagen_reference as upstream

TOLERANCE = 1e-4
KINDS = ("c2i", "t2i")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in weights.items()}


def decoder(kind: str) -> LlamaGen:
    weights = upstream.c2i_weights() if kind == "c2i" else upstream.t2i_weights()
    model = LlamaGen(read_config(shapes(weights), upstream.HEADS), Grid(upstream.GRID, upstream.GRID))
    model.load_state_dict(weights)
    return model.eval()


def prompt(kind: str) -> Prompt:
    if kind == "c2i":
        return class_prompt(list(upstream.LABELS))
    features, lengths = upstream.captions()
    return Prompt(features, features.shape[1] - torch.as_tensor(lengths))


def tokenizer() -> VQTokenizer:
    weights = upstream.vq_weights()
    weights.pop("quantize.codebook_used")
    model = VQTokenizer(read_vq_config(shapes(weights)))
    model.load_state_dict(weights)
    return model.eval()


def largest(ours: Tensor, theirs: np.ndarray) -> float:
    return float((ours - torch.from_numpy(theirs)).abs().max())


def test_the_weights_are_those_that_were_recorded(recorded: dict[str, np.ndarray]) -> None:
    features, lengths = upstream.captions()
    weights = {
        "c2i": upstream.c2i_weights(),
        "t2i": upstream.t2i_weights() | {"captions": features, "lengths": lengths},
        "vq": upstream.vq_weights(),
    }
    for kind, drawn in weights.items():
        assert (recorded[f"{kind}_digest"] == digest(drawn)).all(), kind


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_at_prefill_and_every_step(kind: str, recorded: dict[str, np.ndarray]) -> None:
    """With a full budget, both guidance rows, teacher-forced on recorded tokens; captions of two lengths in a batch."""
    model = decoder(kind)
    rows = model.with_unconditional(prompt(kind))
    grid = model.grid.after(rows.length)
    tokens = torch.from_numpy(recorded[f"{kind}_tokens"])
    cache = LineCache(model.cache_shape(), rows.rows, grid, CachePlan(policy="full"), dtype=torch.float32, device="cpu")
    logits = [model.prefill(rows, cache)]
    for n in range(grid.tokens - 1):
        if n % grid.stride == 0:
            cache.extend()
        column = torch.tensor([n % grid.stride])
        logits.append(model.step(tokens[:, n].repeat(2), torch.tensor([grid.prompt + n]), rows.pad, column, cache))
    assert largest(torch.stack(logits, 1), recorded[f"{kind}_logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_uncached_pass(kind: str, recorded: dict[str, np.ndarray]) -> None:
    model = decoder(kind)
    rows = model.with_unconditional(prompt(kind))
    tokens = torch.from_numpy(recorded[f"{kind}_tokens"])[:, :-1].repeat(2, 1)
    assert largest(model(rows, tokens)[:, rows.length - 1 :], recorded[f"{kind}_logits"]) < TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("interval", [-1, upstream.INTERVAL])
def test_greedy_images_with_guidance(kind: str, interval: int, recorded: dict[str, np.ndarray]) -> None:
    """The whole loop: guidance, and an interval after which the unconditional half is dropped."""
    sample = SamplePlan(guidance=upstream.SCALE, temperature=0, guidance_interval=interval)
    lines = list(generate(decoder(kind), prompt(kind), CachePlan(policy="full"), sample))
    ours = torch.stack([line.tokens for line in lines], 1).flatten(1)
    assert (ours.numpy() == recorded[f"{kind}_greedy" + ("_interval" if interval > 0 else "")]).all()


@pytest.mark.parametrize("shape", ["square", "wide"])
@torch.inference_mode()
def test_vq_decoder(shape: str, recorded: dict[str, np.ndarray]) -> None:
    ours = tokenizer().decode(torch.from_numpy(recorded[f"vq_codes_{shape}"]))
    assert largest(ours, recorded[f"vq_decoded_{shape}"]) < TOLERANCE


@torch.inference_mode()
def test_vq_encoder(recorded: dict[str, np.ndarray]) -> None:
    model, picture = tokenizer(), torch.from_numpy(recorded["vq_picture"])
    assert largest(model.quant_conv(model.encoder(picture)), recorded["vq_features"]) < TOLERANCE
    assert (model.encode(picture).numpy() == recorded["vq_codes"]).all()

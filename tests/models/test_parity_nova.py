"""Ours equals the published NOVA on small random weights: recorded numbers, see nova_reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.loop import masked
from linear_core.models import nova
from linear_core.models.denoise import schedule
from linear_core.models.nova import Nova, load_weights, read_config
from linear_core.plan import SamplePlan
from linear_core.prompts import Prompt
from linear_core.steps import STEP_CACHES, TIMESTEPS, MaskedPlan, StepCachePlan
from tests.drawn import digest
from tests.models import nova_reference as upstream
from tests.models.test_parity_mar import difference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(scope="module")
def model() -> Nova:
    weights = upstream.nova_weights()
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    config = read_config(shapes, upstream.SIDE, upstream.HEADS, upstream.LENGTH)
    return load_weights(config, weights)


def text_prompt(texts: list[Tensor], negative: Prompt | None = None) -> Prompt:
    """Features padded on the left, as prompts are."""
    length = max(map(len, texts))
    rows = torch.zeros(len(texts), length, upstream.FEATURES)
    for row, text in zip(rows, texts, strict=True):
        row[length - len(text) :] = text
    return Prompt(rows, torch.tensor([length - len(text) for text in texts]), negative=negative)


def plan(run: str) -> MaskedPlan:
    return MaskedPlan(
        upstream.STEPS, upstream.DENOISING, schedule="constant", spacing=upstream.RUNS[run]["spacing"], rounded=True
    )


def recorded_noise(model: Nova, timesteps: tuple[int, ...]) -> type:
    """In place of Noise: upstream's orders, and the noise of `upstream.noise`."""
    noise = torch.stack([model.to_tokens(latents) for latents in upstream.noise()])  # T B N C
    steps = {t: n for n, t in enumerate((TIMESTEPS, *timesteps))}

    class Recorded:
        def __init__(self, seed: Any, images: int, *rest: Any):
            self.images = torch.arange(images)

        def select(self, images: Tensor) -> Recorded:
            self.images = images
            return self

        def uniform(self, token: int) -> Tensor:
            places = upstream.orders().argsort(1) / upstream.TOKENS
            return torch.cat([torch.zeros(len(places), model.config.copies), places], 1)

        def normal(self, number: Tensor) -> Tensor:
            place, step = number // (TIMESTEPS + 1), number % (TIMESTEPS + 1)
            at = step.apply_(lambda t: steps[t])
            return noise[at, self.images[:, None], place]

    return Recorded


def test_the_weights_are_those_that_were_recorded(recorded: dict[str, np.ndarray]) -> None:
    assert (recorded["nova_digest"] == digest(upstream.nova_weights())).all()
    assert (recorded["vae_digest"] == digest(upstream.vae_weights())).all()


@torch.inference_mode()
def test_what_the_text_says_about_the_cells(model: Nova, recorded: dict[str, np.ndarray]) -> None:
    found = model.read(text_prompt(upstream.prompts()), guided=True)
    assert difference(found, recorded["condition"]) < TOLERANCE


@pytest.mark.parametrize("run", upstream.RUNS)
def test_the_whole_loop(
    run: str, model: Nova, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions of every step, of both rows, and the tokens drawn from them, given upstream's so far.

    The head is given upstream's conditions: random weights draw numbers of 1e5, and rounding would grow.
    """
    settings = upstream.RUNS[run]
    timesteps = plan(run).timesteps(0)
    assert timesteps == tuple(recorded[f"{run}_timesteps"])
    monkeypatch.setattr(masked, "Noise", recorded_noise(model, timesteps))
    latents = torch.from_numpy(recorded[f"{run}_latents"])
    tokens, conditions = model.to_tokens(latents), torch.from_numpy(recorded[f"{run}_conditions"])
    known = (0, *plan(run).known(upstream.TOKENS))
    step = iter(range(upstream.STEPS))

    def denoise(z: Tensor, *rest: Any) -> Tensor:
        number = next(step)
        rows = slice(2 * upstream.IMAGES * known[number], 2 * upstream.IMAGES * known[number + 1])
        assert difference(z, conditions[rows].numpy()) < TOLERANCE
        drawn = model.head(conditions[rows], *rest)
        places = upstream.orders()[:, known[number] : known[number + 1]]
        expected = tokens[torch.arange(len(places))[:, None], places].flatten(0, 1)
        assert difference(drawn, expected.numpy()) < TOLERANCE
        return expected

    negative = text_prompt(upstream.prompts(True)) if settings.get("negative") else None
    prompt = text_prompt(upstream.prompts(), negative)
    sample = SamplePlan(guidance=settings["guidance_scale"])
    steps = list(masked.generate_masked(model, prompt, sample, plan(run), denoise=denoise))
    assert torch.equal(steps[-1].latents, latents)


def test_the_published_schedule(recorded: dict[str, np.ndarray]) -> None:
    """Of 25 trailing steps, timesteps and numbers; and how many tokens are known after each of 64 steps of 1024."""
    published = MaskedPlan(64, 25, schedule="constant", spacing="trailing", rounded=True)
    assert published.timesteps(0) == tuple(recorded["published_timesteps"])
    assert published.known(1024) == tuple(recorded["known"])
    ours = schedule(published.timesteps(0), torch.device("cpu"))
    keep, take, deviation = torch.from_numpy(recorded["published_tables"])
    torch.testing.assert_close(ours.keep, keep, rtol=1e-4, atol=0)
    torch.testing.assert_close(-ours.take, take, rtol=1e-4, atol=0)
    torch.testing.assert_close((ours.least[:-1] / 2).exp(), deviation[:-1], rtol=1e-4, atol=0)


def test_cached_equals_plain(model: Nova) -> None:
    """When every slot is computed again, nothing is used that was kept; and a known picture's other half is drawn."""
    prompt, sample = text_prompt(upstream.prompts()), SamplePlan(guidance=3.0, seed=5)
    latents = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    runs = [
        list(masked.forced_masked(model, prompt, latents, sample, plan("guided"), cache))
        for cache in (STEP_CACHES["Off"], StepCachePlan(30, "oldest", 0, 1, 0), StepCachePlan(0, full_every=0))
    ]
    gaps = [max(difference(a, b.numpy()) for a, b in zip(runs[0], run, strict=True)) for run in runs[1:]]
    assert gaps[0] > 1e-3 or gaps[1] > 1e-3


def test_published_sizes_follow_from_the_shapes() -> None:
    for width, millions in ((768, 0), (1024, 0), (1536, 0)):
        pass

"""Ours equals the published NOVA on small random weights: recorded numbers, see nova_reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.cache.step_cache import StepCache
from linear_core.checkpoints.families import nova as family
from linear_core.checkpoints.library import ImageModel, ModelFiles, find_tokenizer, load_model
from linear_core.loop import masked
from linear_core.models.denoise import schedule
from linear_core.models.mar import Active
from linear_core.models.nova import Nova, NovaConfig
from linear_core.plan import SamplePlan
from linear_core.prompts import Prompt
from linear_core.steps import TIMESTEPS, MaskedPlan
from tests.drawn import digest
from tests.models import nova_reference as upstream
from tests.models.nova_official import published_sizes, write
from tests.models.test_parity_mar import difference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder as published."""
    return write(tmp_path_factory.mktemp("nova") / "nova-d4w24-sd96")


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    published_sizes(monkeypatch)


@pytest.fixture
def loaded(official: Path) -> ImageModel:
    return load_model(ModelFiles(official, find_tokenizer(official)))


@pytest.fixture
def model(loaded: ImageModel) -> Nova:
    return loaded.decoder


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
    assert (recorded["phi_digest"] == digest(upstream.phi_weights())).all()
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


@torch.inference_mode()
def test_the_tokenizer(loaded: ImageModel, recorded: dict[str, np.ndarray]) -> None:
    """Both ways, with the scale of the config."""
    picture = loaded.tokenizer.decode(upstream.vae_latents())
    assert difference(picture, recorded["vae_picture"]) < TOLERANCE
    mean = recorded["vae_mean"] * np.float32(upstream.VAE_SCALE)
    assert difference(loaded.tokenizer.encode(upstream.pictures()), mean) < TOLERANCE


def test_a_text_is_read_as_published(
    loaded: ImageModel, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family, "DTYPE", torch.float32)
    text = " ".join(f"word{n}" for n in upstream.WORDS)
    prompt = loaded.prompt([text, "word1 " * 9], "word2")
    loaded.check(prompt)
    assert prompt.pad.tolist() == [2, 0] and prompt.negative.pad.tolist() == [6, 6]
    assert difference(prompt.tokens[0, 2:], recorded["features"]) < TOLERANCE
    assert torch.equal(loaded.decoder.texts(prompt)[0, 5:], loaded.decoder.text_embed.weight[5 : upstream.LENGTH])


@torch.inference_mode()
def test_cached_equals_plain(model: Nova) -> None:
    """When all else is computed again, nothing that was kept is used; when nothing is, conditions differ."""
    prompt = text_prompt(upstream.prompts())
    latents = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    slots, known = model.config.copies + model.config.tokens, (0, *plan("guided").known(upstream.TOKENS))
    tokens, gaps = model.to_tokens(latents), []
    for everything in (True, False):
        cache = StepCache(model.config.step_cache_shape(4), 2, 4, dtype=torch.float32, device=model.device, looks=False)
        state = model.begin(prompt, torch.arange(upstream.TOKENS).expand(2, -1), True)
        model.conditions(state, Active(9, known[1]), cache)
        for before, now, after in zip(known, known[1:], known[2:], strict=False):
            model.feed(state, tokens[:, before:now], before)
            rest = [slot for slot in range(slots) if not 9 + before <= slot < 9 + after]
            extra = torch.tensor(rest if everything else rest[:3]).expand(2, -1)
            found = model.conditions(state, Active(9 + now, after - now, 9 + before, extra), cache)
            plain = model.conditions(state, Active(9 + now, after - now))
            gaps.append(difference(found, plain.numpy()))
    half = len(gaps) // 2
    assert max(gaps[:half]) < TOLERANCE and min(gaps[half:]) > 1e-3


def test_published_sizes() -> None:
    """Parameters as the authors count them: 0.3, 0.6 and 1.4 billion, without the part that reads earlier frames."""
    for width, heads, millions in ((768, 12, 365.2), (1024, 16, 646.9), (1536, 16, 1451.0)):
        config = NovaConfig(16, 16, width, heads, 4 * width, 0, 4096, 1024, 16, width, 6, 2)
        with torch.device("meta"):
            weights = Nova(config).state_dict()
        assert round(sum(tensor.numel() for tensor in weights.values()) / 1e6, 1) == millions
        assert config.head_dim == width // heads and config.grid.rows == 64 and config.channels == 4

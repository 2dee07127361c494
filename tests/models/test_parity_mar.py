"""Ours equals the published MAR on small random weights: recorded numbers, see mar_reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.checkpoints.families import mar as family
from linear_core.checkpoints.library import ModelFiles, load_model, read_info
from linear_core.loop import masked
from linear_core.models.denoise import schedule
from linear_core.models.mar import MAR, MARConfig, read_config
from linear_core.plan import SamplePlan
from linear_core.prompts import class_prompt
from linear_core.steps import TIMESTEPS, MaskedPlan
from linear_core.tokenizers import network
from tests.drawn import digest
from tests.models import mar_reference as upstream

TOLERANCE = 1e-5
PLAN = MaskedPlan(upstream.STEPS, upstream.DENOISING)
SCHEDULE = PLAN.timesteps(0)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(autouse=True)
def published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files are wide enough that all have 32 groups, and their number of heads and pixels follows from nothing."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setattr("linear_core.models.mar.HEADS", {upstream.WIDTH: upstream.HEADS})
    monkeypatch.setattr(family.published, "FACTOR", 4)


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files as published: both kinds of weights in one, of which the plain ones draw otherwise."""
    folder = tmp_path_factory.mktemp("mar")
    weights = upstream.mar_weights()
    plain = {name: weight * 1.5 for name, weight in weights.items()}
    torch.save({"model": plain, "model_ema": weights}, folder / "checkpoint-last.pth")
    torch.save({"model": upstream.vae_weights()}, folder / "kl16.ckpt")
    return folder


def load(folder: Path):
    return load_model(ModelFiles(folder / "checkpoint-last.pth", folder / "kl16.ckpt"))


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    theirs = torch.from_numpy(theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


class Recorded:
    """In place of Noise: upstream's orders, which are drawn from their end, and the noise of `upstream.noise`."""

    def __init__(self, seed: int, images: int, codes: int, device: torch.device):
        self.images = torch.arange(images)

    def select(self, images: Tensor) -> Recorded:
        self.images = images
        return self

    def uniform(self, token: int) -> Tensor:
        places = upstream.orders().flip(1).argsort(1) / upstream.TOKENS
        return torch.cat([places[:, : upstream.COPIES] * 0, places], 1)

    def normal(self, number: Tensor) -> Tensor:
        steps = {t: n for n, t in enumerate((TIMESTEPS, *SCHEDULE))}
        noise = upstream.noise()[self.images]
        found = [
            [noise[image, n // (TIMESTEPS + 1), steps[n % (TIMESTEPS + 1)]] for n in numbers]
            for image, numbers in enumerate(number.tolist())
        ]
        return torch.stack([torch.stack(each) for each in found])


def test_the_weights_are_those_that_were_recorded(recorded: dict[str, np.ndarray]) -> None:
    assert (recorded["mar_digest"] == digest(upstream.mar_weights())).all()
    assert (recorded["vae_digest"] == digest(upstream.vae_weights())).all()


def in_our_order(rows: np.ndarray, step: int) -> Tensor:
    """What upstream has of the tokens of a step in ascending place, as ours come: R*m W, from all steps' rows."""
    known = (0, *PLAN.known(upstream.TOKENS))
    images = len(rows) // upstream.TOKENS
    of_step = torch.from_numpy(rows[images * known[step] : images * known[step + 1]])
    places = upstream.orders().flip(1)[:, known[step] : known[step + 1]]
    rank = places.argsort(1).argsort(1)[None, :, :, None]
    split = of_step.unflatten(0, (-1, len(upstream.LABELS), places.shape[1]))
    return split.gather(2, rank.expand(len(split), -1, -1, split.shape[-1])).flatten(0, 2)


@pytest.mark.parametrize("run", upstream.RUNS)
def test_the_whole_loop(
    run: str, official: Path, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions of every step, with guidance those of both rows, and the tokens drawn from them.

    Each step is given upstream's tokens so far, and the head upstream's conditions: random weights draw numbers of 1e5,
    and rounding would grow from step to step.
    """
    model, settings = load(official), upstream.RUNS[run]
    monkeypatch.setattr(masked, "Noise", Recorded)
    sample = SamplePlan(guidance=settings["cfg"], temperature=settings.get("temperature", 1.0))
    plan = replace(PLAN, schedule=settings.get("cfg_schedule", "linear"))
    latents = recorded[f"{run}_latents"]
    tokens = model.decoder.to_tokens(torch.from_numpy(latents))
    step = iter(range(upstream.STEPS))

    def denoise(z: Tensor, *rest: Any) -> Tensor:
        number = next(step)
        conditions = in_our_order(recorded[f"{run}_conditions"], number)
        assert difference(z, conditions.numpy()) < TOLERANCE
        drawn = model.decoder.head(conditions, *rest)
        known = (0, *plan.known(upstream.TOKENS))
        places = upstream.orders().flip(1)[:, known[number] : known[number + 1]]
        expected = tokens[torch.arange(len(places))[:, None], places].flatten(0, 1)
        assert difference(drawn, expected.numpy()) < TOLERANCE
        return expected

    prompt = class_prompt(list(upstream.LABELS))
    steps = list(masked.generate_masked(model.decoder, prompt, sample, plan, denoise=denoise))
    assert torch.equal(steps[-1].latents, torch.from_numpy(latents))


@pytest.mark.parametrize("count", [100, 25, 7])
def test_the_schedule(count: int, recorded: dict[str, np.ndarray]) -> None:
    """Timesteps and numbers of each denoising step; upstream computes the mean by way of the token's own estimate."""
    timesteps = MaskedPlan(denoising=count).timesteps(0)
    assert timesteps == tuple(recorded[f"t{count}_map"])
    ours = schedule(timesteps, torch.device("cpu"))
    recip, recipm1, of_start, of_x, least, most = torch.from_numpy(recorded[f"t{count}_tables"])
    for found, expected in (
        (ours.keep, of_start * recip + of_x),
        (ours.take, of_start * recipm1),
        (ours.least, least),
        (ours.most, most),
    ):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@torch.inference_mode()
def test_the_tokenizer(official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Both ways, with the scale that is not in the file."""
    tokenizer = load(official).tokenizer
    picture = tokenizer.decode(torch.from_numpy(recorded["linear_latents"]) * upstream.VAE_SCALE)
    assert difference(picture, recorded["vae_picture"]) < TOLERANCE
    assert difference(tokenizer.encode(upstream.pictures()), recorded["vae_mean"] * np.float32(0.2325)) < TOLERANCE


def test_published_sizes_follow_from_the_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every published file's parameters, counted, are those of its size; names say nothing, so shapes have to."""
    monkeypatch.undo()
    for width, layers, heads, head_width, head_blocks, keys, millions in (
        (768, 12, 12, 1024, 6, 364, 207.9),
        (1024, 16, 16, 1280, 8, 476, 478.3),
        (1280, 20, 16, 1536, 12, 604, 942.4),
    ):
        config = MARConfig(layers, layers, width, heads, 4 * width, 1000, 256, 64, 16, head_width, head_blocks)
        with torch.device("meta"):
            weights = MAR(config).state_dict()
        assert read_config({name: tuple(tensor.shape) for name, tensor in weights.items()}) == config
        assert len(weights) == keys
        assert round(sum(tensor.numel() for tensor in weights.values()) / 1e6, 1) == millions


def test_patches_are_laid_out_as_published() -> None:
    """A token is channel, row, column of its patch, the channel outermost; tokens are in raster order."""
    with torch.device("meta"):
        model = MAR(MARConfig(1, 1, 24, 3, 32, 5, 6 * 6, 3, 4 * 2 * 2, 16, 1, patch=2))
    latents = torch.arange(4 * 12 * 12).reshape(1, 4, 12, 12)
    tokens = model.to_tokens(latents)
    for row in range(6):
        for col in range(6):
            patch = latents[0, :, 2 * row : 2 * row + 2, 2 * col : 2 * col + 2]
            assert torch.equal(tokens[0, 6 * row + col], patch.flatten())
    assert torch.equal(model.to_latents(tokens), latents)


def test_the_file_says_what_it_is(official: Path) -> None:
    info = read_info(official / "checkpoint-last.pth")
    assert info.family.name == "MAR" and info.masked == MaskedPlan() and info.tokenizer == "kl16"
    assert (info.grid.rows, info.config.classes, info.config.patch) == (upstream.SIDE, upstream.CLASSES, 1)

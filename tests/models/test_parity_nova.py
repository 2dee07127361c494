"""Ours equals the published NOVA on small random weights: recorded numbers, see nova_reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor

from linear_core.checkpoints.families import nova as family
from linear_core.checkpoints.library import ImageModel, ModelFiles, find_tokenizer, load_model
from linear_core.loop import masked
from linear_core.models.denoise import schedule
from linear_core.models.nova import Nova, NovaConfig
from linear_core.plan import SamplePlan
from linear_core.prompts import Prompt
from linear_core.steps import STEP_CACHES, TIMESTEPS, MaskedPlan, StepCachePlan
from linear_core.tokenizers import network
from tests.drawn import digest
from tests.models import nova_reference as upstream
from tests.models.test_parity_mar import difference

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder as published."""
    return upstream_folder(tmp_path_factory.mktemp("nova") / "nova-d4w24-sd96")


def upstream_folder(folder: Path) -> Path:
    transformer = {"image_base_size": [upstream.SIDE] * 2, "text_token_len": upstream.LENGTH, "image_stride": 8}
    scheduler = {
        "_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing",
        "clip_sample": False, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    }  # fmt: skip
    phi = {"num_attention_heads": upstream.PHI_HEADS, "partial_rotary_factor": upstream.ROTATED}
    words = {"[UNK]": 0, **{f"word{n}": n for n in range(1, upstream.VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    for name, config, weights in (
        ("transformer/diffusion_pytorch_model", transformer, upstream.nova_weights()),
        ("vae/diffusion_pytorch_model", {"scaling_factor": upstream.VAE_SCALE}, upstream.vae_weights()),
        ("text_encoder/model", phi, upstream.phi_weights()),
    ):
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True)
        save_file(weights, file)
        file.with_name("config.json").write_text(json.dumps(config))
    for name, text in (
        ("scheduler/scheduler_config.json", json.dumps(scheduler)),
        ("tokenizer/tokenizer.json", tokenizer.to_str()),
        ("model_index.json", "{}"),
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.fixture(autouse=True)
def published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files are wide enough that all have 32 groups, and their number of heads follows from the width."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setattr("linear_core.models.nova.HEADS", {upstream.WIDTH: upstream.HEADS})


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


@pytest.mark.parametrize("rule", ["oldest", "attention"])
def test_cached_equals_plain(rule: str, model: Nova) -> None:
    """When every slot is computed again, nothing that was kept is used; when none is, conditions differ."""
    prompt, sample = text_prompt(upstream.prompts()), SamplePlan(guidance=3.0, seed=5)
    latents = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(1))
    slots = model.config.copies + model.config.tokens
    plans = [STEP_CACHES["Off"], *(StepCachePlan(n, rule, 0, 1, 0) for n in (slots - 14, 0))]
    plain, all_again, none = (
        torch.cat(list(masked.forced_masked(model, prompt, latents, sample, plan("guided"), cache))) for cache in plans
    )
    assert difference(none, plain.numpy()) > 1e-2
    assert difference(all_again, plain.numpy()) < difference(none, plain.numpy())


def test_published_sizes_follow_from_the_shapes() -> None:
    for width, layers, millions in ((768, 16, 355.0), (1024, 16, 645.0), (1536, 16, 1400.0)):
        config = NovaConfig(
            layers, layers, width, width // 64 if width < 1536 else 16, 4 * width, 0, 4096, 1024, 16, width, 6, 2
        )
        with torch.device("meta"):
            weights = Nova(config).state_dict()
        print(width, sum(tensor.numel() for tensor in weights.values()) / 1e6)

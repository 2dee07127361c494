"""Masked Generate with a tiny MAR: the same images as the loop draws, inpainting, and what is said."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from tests.models import nova_reference as upstream
from tests.models.nova_official import write
from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK, host
from tests.nodes.test_nodes import (  # the fixtures too
    EXTENSION,
    NODES,
    CachePlan,
    UserError,
    asyncio,
    comfy,  # noqa: F401
    importlib,
    one,  # noqa: F401
    run,
    small,  # noqa: F401
)
from tests.tiny import CLASSES, latent_tokenizer, mar

LINEAR = {name: importlib.import_module(f"{PACK}.linear_core.{name}") for name in ("loop.masked", "steps", "plan")}
NAMES = [f"class {n}" for n in range(CLASSES)]
QUICK = {"steps": 8, "denoising": 4, "start": 950}
EVERYTHING = {"step_cache": "Off"}
KEPT = {"step_cache": "Custom", "refresh": 2, "rule": "oldest", "full_every": 4, "full_first": 2, "full_last": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """36 tokens of 2 x 2 pixels, with its VAE."""
    host.reset(tmp_path_factory.mktemp("mar"))
    asyncio.run(EXTENSION().on_load())
    folder = host.models / "ar_image"
    folder.mkdir(parents=True)
    notes = {"heads": "3", "channels": "4", "factor": "2", "tokenizer": "vae", "classes": json.dumps(NAMES)}
    save_file(mar(dtype=torch.float32).state_dict(), folder / "tiny.safetensors", notes)
    save_file(latent_tokenizer().state_dict(), folder / "vae.safetensors")
    facts = NODES["LineAR_LoadModel"].define_schema().inputs[0].extra["linear_ar"]["tiny.safetensors"]
    assert facts["masked"] and (facts["rows"], facts["cols"]) == (6, 6)
    with torch.inference_mode():
        (model,) = run("LoadModel", model="tiny.safetensors", tokenizer="automatic")
    return model


@pytest.fixture
def settings(tiny):
    prompt = run("ClassPrompt", model=tiny, class_name="(only those below)", more_classes="class 1")[0]
    return {"model": tiny, "prompt": prompt, "seed": 5, "step_cache": EVERYTHING, **QUICK}


def test_the_node_draws_what_the_loop_draws(tiny, settings, comfy):  # noqa: F811
    """Image i of a batch is the image alone; Decode shows it; previews come through ComfyUI's own mechanism."""
    tokens, report, ages = run("MaskedGenerate", batch_size=2, **settings)
    plan, sample = LINEAR["steps"].MaskedPlan(8, 4, 0, 950), replace(tiny.image.info.defaults, seed=5)
    *_, last = LINEAR["loop.masked"].generate_masked(tiny.image.decoder, settings["prompt"].repeat(2), sample, plan)
    assert torch.equal(tokens.latents, last.latents) and tokens.latents.isfinite().all()
    (alone, *_) = run("MaskedGenerate", **settings | {"seed": 6})
    assert torch.allclose(alone.latents[0], tokens.latents[1], atol=1e-4)
    (listed, *_) = run("MaskedGenerate", batch_size=2, seeds="6, 5", **settings)
    assert torch.allclose(listed.latents.flip(0), tokens.latents, atol=1e-4)
    (image,) = run("Decode", model=tiny, tokens=tokens)
    assert image.shape == (2, 12, 12, 3) and torch.allclose(image, tiny.pictures(tokens.latents), atol=1e-5)
    assert [p for p in comfy.progress if p[1] == 8][:8] == [(n, 8) for n in range(1, 9)]
    assert any(event == "preview" for event, _ in comfy.sent)
    assert report.startswith("72 tokens drawn in 8 of 8 steps, 8 of them full") and "no memory is added" in report
    assert ages.shape == (8, 126, 252, 3) and torch.equal(ages[0], ages[7]), "everything is computed in each step"


def test_the_step_cache_and_what_the_report_says_of_it(tiny, settings, comfy):  # noqa: F811
    """Other numbers than the plain pass, near them; computed tokens, added memory and ages are those of the steps."""
    plain, *_ = run("MaskedGenerate", **settings)
    tokens, report, ages = run("MaskedGenerate", **settings | {"step_cache": KEPT})
    assert not torch.equal(tokens.latents, plain.latents)
    cache = LINEAR["steps"].StepCachePlan(2, "oldest", 4, 2, 1)
    sample, plan = replace(tiny.image.info.defaults, seed=5), LINEAR["steps"].MaskedPlan(8, 4, 0, 950)
    steps = list(LINEAR["loop.masked"].generate_masked(tiny.image.decoder, settings["prompt"], sample, plan, cache))
    assert torch.equal(tokens.latents, steps[-1].latents) and tokens.cache_bytes == steps[-1].cache_bytes > 0
    full = sum(step.full for step in steps)
    assert 3 <= full < 8 and f"in 8 of 8 steps, {full} of them full" in report
    mean = sum(int(step.computed) for step in steps) / 8
    assert f"computed in a step: {mean:.0f} of 39 tokens" in report and "memory added by the step cache: 0." in report
    assert "transformer" in report and "diffusion head" in report
    age = next(step.age[0] for step in steps if not step.full)
    seen = ages[next(n for n, step in enumerate(steps) if not step.full)].sum(-1)[10::21, 10::21]
    assert float(seen[age == 0].min()) > float(seen[age > 0].max()), "bright: computed now"
    texts = [text for event, text in comfy.sent if event == "text"]
    assert "step 1 of 8: computed everything" in texts and any("of 39 tokens" in text for text in texts)
    widest = max(event[1][1].size[0] / event[1][1].size[1] for event in comfy.sent if event[0] == "preview")
    assert widest == 2, "the map of ages is beside the picture"


def test_what_the_mask_leaves_stays(tiny, settings, monkeypatch):
    """Unequal masks of any shape over one image; places outside are the image's own latents, and image i is alone."""
    image, masks = torch.rand(1, 12, 12, 3), torch.zeros(2, 12, 12)
    masks[0, 2:9, 3:5], masks[1, 11, :] = 1, 1
    tokens, report, _ = run("MaskedGenerate", image=image, mask=masks, batch_size=2, **settings)
    encoded = tiny.image.tokenizer.encode(image.permute(0, 3, 1, 2) * 2 - 1)
    cells = torch.nn.functional.max_pool2d(masks[:, None], 2).bool()
    same = torch.isclose(tokens.latents, encoded, atol=1e-5).all(1)
    assert torch.equal(same, ~cells[:, 0]) and "6 to 8 of 36 tokens were drawn anew" in report
    (second, *_) = run("MaskedGenerate", image=image, mask=masks[1], **settings | {"seed": 6})
    assert torch.allclose(second.latents[0], tokens.latents[1], atol=1e-4)
    both = torch.cat([image, image.flip(1)])
    monkeypatch.setattr(importlib.import_module(f"{PACK}.nodes.masked"), "ENCODED", 1)  # each in a part of its own
    (pair, *_) = run("MaskedGenerate", image=both, mask=masks, batch_size=2, **settings)
    assert torch.allclose(pair.latents[0], tokens.latents[0], atol=1e-4)
    encoded = tiny.image.tokenizer.encode(both.permute(0, 3, 1, 2) * 2 - 1)
    assert torch.equal(torch.isclose(pair.latents, encoded, atol=1e-5).all(1), ~cells[:, 0]), "each under its own mask"


def test_images_and_masks_of_another_size(settings):
    """The mask is stretched to the image, as ComfyUI does, then both are cropped to the model's size; it is said."""
    mask = torch.zeros(1, 6, 9)
    mask[:, :, :3] = 1  # the left third of 36 pixels, of which cropping leaves 6 of the middle 24: two columns of cells
    tokens, report, _ = run("MaskedGenerate", image=torch.rand(1, 24, 36, 3), mask=mask, **settings)
    assert "The mask of 9 x 6 was stretched to the image's 36 x 24." in report
    assert "Image and mask of 36 x 24 were scaled and cropped to 12 x 12." in report
    assert "12 of 36 tokens were drawn anew." in report and tokens.latents.isfinite().all()


def test_a_batch_that_does_not_fit_is_drawn_in_parts(tiny, settings, comfy):  # noqa: F811
    masked = importlib.import_module(f"{PACK}.nodes.masked")
    whole, *_ = run("MaskedGenerate", batch_size=3, **settings)
    plan, off = LINEAR["steps"].MaskedPlan(8, 4, 0, 950), LINEAR["steps"].STEP_CACHES["Off"]
    sample = tiny.image.info.defaults
    one_image = masked.Drawing(tiny, settings["prompt"].repeat(3), sample, plan, off, "7").bytes(1)
    comfy.free = one_image + 1000
    tokens, _, ages = run("MaskedGenerate", batch_size=3, **settings)
    assert torch.allclose(tokens.latents, whole.latents, atol=1e-4) and comfy.progress[-1] == (24, 24)
    assert len(ages) == 8


def test_stop(settings, comfy):  # noqa: F811
    """Within a step, on whichever thread it is told; the next run is whole."""
    comfy.stop_after, comfy.stop_where = 3, "MainThread"
    with pytest.raises(comfy_double.Interrupted):
        run("MaskedGenerate", **settings)
    assert comfy.stops == 1 and len(comfy.progress) < 8
    comfy.stop_after = None
    assert run("MaskedGenerate", **settings)[0].latents.isfinite().all()


def test_every_model_is_sent_to_its_own_node(tiny, settings, small, one):  # noqa: F811
    given = {"model": tiny, "prompt": settings["prompt"], "cache": CachePlan(), "seed": 5}
    for node in ("Generate", "Compare"):
        with pytest.raises(
            UserError, match=r"^model: tiny draws tokens in any order; connect it to Masked Generate\.$"
        ):
            run(node, **given)
    with pytest.raises(UserError, match=r"^beside: tiny draws tokens in any order"):
        run("Compare", **one, cache=CachePlan(), seed=5, beside=tiny)
    with pytest.raises(UserError, match=r"^model: small draws line by line; connect it to Generate\.$"):
        run("MaskedGenerate", **settings | one)
    with pytest.raises(
        UserError, match="model: tiny draws tokens in any order; connect the image and a mask to Masked"
    ):
        run("EncodeImage", model=tiny, image=torch.rand(1, 12, 12, 3))
    judged = {"images": torch.rand(1, 12, 12, 3), "model": tiny, "prompt": settings["prompt"], "by": "likelihood"}
    with pytest.raises(UserError, match="model: tiny draws tokens in any order, and cannot judge yet"):
        run("PickBest", **judged)
    tokens, *_ = run("MaskedGenerate", **settings)
    with pytest.raises(
        UserError, match="tokens: they come from tiny, which draws in any order, but small draws in lines"
    ):
        run("Decode", model=small, tokens=tokens)
    (lines,) = run("Generate", **one, cache=CachePlan(), seed=5, stop_after=1)
    with pytest.raises(UserError, match="tokens: they come from small, which draws in lines, but tiny draws in any"):
        run("Decode", model=tiny, tokens=lines)
    with pytest.raises(UserError, match="look at the output ages of Masked Generate"):
        run("RetentionHeatmap", tokens=tokens, show={"show": "lifetime"}, size=96)


PICTURE, COVERED = torch.rand(1, 12, 12, 3), torch.ones(1, 12, 12)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"image": PICTURE}, "mask: there is only the image; connect both"),
        ({"mask": COVERED}, "image: there is only the mask; connect both"),
        ({"image": PICTURE, "mask": COVERED}, "mask: it covers everything, so nothing of the picture would stay"),
        ({"image": PICTURE, "mask": 0 * COVERED}, "mask: it covers nothing, so nothing would be drawn"),
        ({"image": PICTURE, "mask": COVERED.repeat(3, 1, 1)}, "there are 3 images or masks, but 1 are generated"),
        ({"image": PICTURE, "mask": PICTURE}, r"mask: found a tensor of 1 x 12 x 12 x 3; .* Convert Image to Mask"),
        ({"image": PICTURE, "mask": COVERED * 255}, "mask: its pixels go from 255 to 255; connect a mask whose"),
        ({"image": PICTURE, "mask": COVERED * float("nan")}, "mask: some of its pixels are NaN"),
        ({"steps": 37}, "steps: 37 are more than the picture has tokens; choose at most 36"),
        ({"denoising_last": 5}, "denoising last: 5 is out of range; choose 2 to 4"),
        ({"step_cache": KEPT | {"rule": "newest"}}, "rule: found 'newest'"),
        ({"seeds": "1, 2"}, "seeds: "),
    ],
)  # fmt: skip
def test_what_is_refused(settings, more, words):
    with pytest.raises(UserError, match=words):
        run("MaskedGenerate", **settings | more)


def test_nova_draws_from_a_text(monkeypatch, tmp_path):
    """Load AR Model takes the folder, Text Prompt reads the text, and steps are spaced as the folder says."""
    host.reset(tmp_path)
    asyncio.run(EXTENSION().on_load())
    parts = ("tokenizers.network", "models.nova")
    network, nova = (importlib.import_module(f"{PACK}.linear_core.{name}") for name in parts)
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setattr(nova, "HEADS", {upstream.WIDTH: upstream.HEADS})
    write(host.models / "ar_image" / "nova")
    assert "nova" in importlib.import_module(f"{PACK}.nodes.files").model_names()
    with torch.inference_mode():
        (model,) = run("LoadModel", model="nova", tokenizer="automatic")
    (prompt,) = run("TextPrompt", text_encoder="none", text="word3 word4\n---\nword5", model=model)
    settings = {"steps": 5, "denoising": 4, "start": 950, "guidance_schedule": "constant"}
    tokens, *_ = run("MaskedGenerate", model=model, prompt=prompt, seed=5, step_cache=KEPT, **settings)
    plan = replace(model.image.info.masked, steps=5, denoising=4, start=950)
    assert plan.spacing == "trailing" and plan.rounded
    cache = LINEAR["steps"].StepCachePlan(2, "oldest", 4, 2, 1)
    sample = replace(model.image.info.defaults, seed=5)
    *_, last = LINEAR["loop.masked"].generate_masked(model.image.decoder, prompt, sample, plan, cache)
    assert torch.equal(tokens.latents, last.latents)
    (image,) = run("Decode", model=model, tokens=tokens)
    assert image.shape == (2, 96, 96, 3)

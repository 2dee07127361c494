"""A model without a cache through the nodes: what they say of it, and beside one with a cache."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from tests.nodes.comfy_double import host
from tests.nodes.test_live import told
from tests.nodes.test_nodes import EXTENSION, CachePlan, UserError, asyncio, comfy, run  # noqa: F401
from tests.nodes.test_nodes_scales import FEW, LANDSCAPES, SIDES, write_var
from tests.tiny import mvar


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A VAR and an M-VAR of the same classes, scales and tokenizer."""
    host.reset(tmp_path_factory.mktemp("both"))
    asyncio.run(EXTENSION().on_load())
    folder = host.models / "ar_image"
    folder.mkdir(parents=True)
    write_var(folder)
    decoder = mvar(*SIDES)[0].state_dict()
    decoder["class_emb.weight"] = decoder["class_emb.weight"][: len(LANDSCAPES) + 1].clone()
    notes = {"sides": " ".join(map(str, SIDES)), "classes": json.dumps(LANDSCAPES), "tokenizer": "tiny_vq.safetensors"}
    save_file(decoder, folder / "without.safetensors", notes)
    names = ("tiny.safetensors", "without.safetensors")
    with torch.inference_mode():
        return [run("LoadModel", model=name, tokenizer="automatic")[0] for name in names]


@pytest.fixture
def prompt(both):
    return run("ClassPrompt", model=both[1], class_name="alpine dawn")[0]


def test_the_page_is_told_of_a_state_and_of_nothing_held(both, prompt, comfy):  # noqa: F811
    """Whatever Line Cache says: no policy, no budget, a state as large as planned, and a dark map that says why."""
    model, drawn = both[1], []
    for cache in (FEW, CachePlan("streaming"), CachePlan("full")):
        (tokens,) = run("Generate", model=model, prompt=prompt, cache=cache, seed=5, batch_size=2)
        drawn.append(tokens)
    assert all(torch.equal(tokens.codes, drawn[0].codes) for tokens in drawn) and drawn[0].plan == CachePlan("full")
    begun = next(event for event in told(comfy) if event["kind"] == "started")
    rows = [event for event in told(comfy) if event["kind"] == "row"]
    size = model.image.decoder.cache_shape().state_bytes(4)
    assert begun["state_bytes"] == begun["cache_bytes"] == begun["full_bytes"] == rows[0]["cache_bytes"] == size > 0
    assert all(row["held"] == 0 for row in rows)
    (image,) = run("Decode", model=model, tokens=drawn[0])
    (alone,) = run("RetentionHeatmap", tokens=drawn[0], show={"show": "lifetime"}, size=200)
    (over,) = run("RetentionHeatmap", tokens=drawn[0], image=image, show={"show": "after a row", "row": 3})
    for dark in (alone, over):
        words = dark[0, -8:]  # white on black, and nothing else is as bright
        assert float(words.min()) == 0 and float(words.max()) > 0.6
    assert over.shape == image.shape and float(over[:, :8].max()) < 0.5


def test_beside_a_model_with_a_cache(both, prompt, comfy):  # noqa: F811
    """Compare draws what Generate draws with each model, and says what each took."""
    var, without = both
    left, right, report = run("Compare", model=var, beside=without, prompt=prompt, cache=FEW, seed=5)
    for model, drawn in ((without, left), (var, right)):
        settings = {"guidance": 2.0, "top_k": 0, "top_p": 1.0}  # the first model's own, for both
        (tokens,) = run("Generate", model=model, prompt=prompt, cache=FEW, seed=5, **settings)
        assert torch.equal(drawn, run("Decode", model=model, tokens=tokens)[0])
    assert "without, no cache: a state of 0.0 MiB" in report and "tiny, 15 of 30 tokens: 0.0 MiB" in report
    assert next(event for event in told(comfy) if event["kind"] == "started")["beside"] == "without"
    assert run("Compare", model=var, beside=without, prompt=prompt, cache=CachePlan("full"), seed=5)


def test_what_cannot_be_compared(both, prompt):
    var, without = both
    with pytest.raises(UserError, match="model: without keeps no cache, so there is no smaller one"):
        run("Compare", model=without, prompt=prompt, cache=FEW, seed=5)
    (landscapes,) = run("LoadModel", model="landscapes (bundled)", tokenizer="automatic")
    with pytest.raises(UserError, match="beside: landscapes draws other codes or sizes than tiny"):
        run("Compare", model=var, beside=landscapes, prompt=prompt, cache=FEW, seed=5)

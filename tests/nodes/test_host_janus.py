"""Janus' workflows in a real ComfyUI, with a small random checkpoint in the official layout.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image, ImageChops

from linear_core.checkpoints.library import ModelFiles, load_model
from linear_core.loop.generate import Run, generate
from linear_core.pictures.preview import decode
from linear_core.pictures.sheet import to_image
from linear_core.plan import CachePlan, SamplePlan
from tests.models import official_janus
from tests.nodes.comfy_server import Server, comfyui, finish, twin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    """The model lies where other packs have it; a second one, in safetensors, where ours are."""
    with comfyui() as running:
        official_janus.write(running.base / "models" / "Janus-Pro" / "Janus-Pro-1B")
        official_janus.write(running.base / "models" / "ar_image" / "Janus-1.3B", shards=1, suffix=".safetensors")
        yield running


def test_folders_are_listed_with_their_memory(server: Server) -> None:
    kind, options = server.get("/object_info/LineAR_LoadModel")["LineAR_LoadModel"]["input"]["required"]["model"]
    assert kind == "COMBO" and set(options["options"]) == {
        "landscapes (bundled)",
        "landscapes in scales (bundled)",
        "Janus-1.3B",
        "Janus-Pro-1B",
    }
    sizes = options["linear_ar"]["Janus-Pro-1B"]
    assert sizes["rows"] == sizes["stride"] == 24 and sizes["guided"] == 1
    assert sizes["weights"]["fp8_e4m3fn"] < sizes["weights"]["default"]


@pytest.mark.parametrize(
    ("name", "images", "size"), [("janus_text_to_image", 1, (384, 384)), ("janus_sixteen", 16, (1548, 1548))]
)
def test_a_workflow_runs(name: str, images: int, size: tuple[int, int], server: Server) -> None:
    """Four of 24 lines, guidance 5, a picture of the promised size, no text encoder in sight."""
    messages, end = finish(server, twin(name))
    assert end["type"] == "execution_success", end
    (pictures,) = server.pictures(end["data"]["prompt_id"])  # of the one node that saves any
    assert [Image.open(path).size for path in pictures] == [size]
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(24))
    (started,) = [event for event in events if event["kind"] == "started"]
    assert started["images"] == images and started["lines"] == 4
    assert started["cache_bytes"] < started["full_bytes"] / 3
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)


@pytest.mark.parametrize("kept", ["default", "fp8_e5m2"])
def test_the_host_draws_what_we_draw(kept: str, server: Server) -> None:
    """Two texts, a negative one, and weights in a byte a number: the same picture as without ComfyUI."""
    texts = "a red fox\n---\nan old lighthouse on a cliff"
    settings = {"text": texts, "negative_text": "rain", "weight_dtype": kept, "temperature": 0.0, "stop_after": 2}
    prompt = twin("janus_text_to_image", model="Janus-1.3B", seed=3, **settings)
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    (saved,) = server.pictures(end["data"]["prompt_id"])
    folder = server.base / "models" / "ar_image" / "Janus-1.3B"
    model = load_model(ModelFiles(folder, folder))
    if kept != "default":
        for name, parameter in model.decoder.named_parameters():
            if name.startswith("layers.") and parameter.ndim == 2:
                parameter.copy_(parameter.to(torch.float8_e5m2).float())
    run = Run()
    sample = SamplePlan(seed=3, guidance=5.0, temperature=0.0)
    for line in generate(model.decoder, model.prompt(texts.split("\n---\n"), "rain"), CachePlan(), sample):
        run.add(line)
        if len(run.lines) == 2:
            break
    for path, picture in zip(saved, decode(model.tokenizer, run.tokens), strict=True):
        theirs, ours = Image.open(path).convert("RGB"), to_image(picture, 0)
        assert theirs.size == ours.size == (384, 32)
        assert max(high for _, high in ImageChops.difference(theirs, ours).getextrema()) <= 3


def test_mistakes_are_told(server: Server) -> None:
    """Last of all: the host writes mistakes into its log."""
    without = twin("janus_text_to_image")
    (text,) = [node for node in without.values() if node["class_type"] == "LineAR_TextPrompt"]
    del text["inputs"]["model"]
    with pytest.raises(AssertionError, match="read text themselves"):
        finish(server, without)
    wrong = twin("janus_text_to_image", model="landscapes (bundled)")
    _, end = finish(server, wrong)
    assert end["type"] == "execution_error" and "connect it to Class Prompt" in end["data"]["exception_message"], end
    with pytest.raises(AssertionError, match="Download AR Model"):
        finish(server, twin("janus_text_to_image", model="Janus-Pro-7B"))

"""Lumina-mGPT's workflows in a real ComfyUI, with small random checkpoints in the official layout.

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
from linear_core.plan import CachePlan
from linear_core.sizes import sizes
from tests.models import lumina_official
from tests.nodes.comfy_server import Server, comfyui, finish, twin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        lumina_official.write(running.base / "models")
        lumina_official.write_2(running.base / "models")
        yield running


def test_what_is_offered(server: Server) -> None:
    """Models and their VQ tokenizer are told apart, and of sizes those that a model draws."""
    inputs = server.get("/object_info/LineAR_LoadModel")["LineAR_LoadModel"]["input"]["required"]
    names = {"Lumina-mGPT-7B-768", "Lumina-mGPT-7B-1024", "Lumina-mGPT-2.0"}
    assert set(inputs["model"][1]["options"]) == names | {"landscapes (bundled)", "landscapes in scales (bundled)"}
    assert inputs["tokenizer"][1]["options"] == ["automatic", "movqgan_270M.ckpt", "vqgan.ckpt"]
    known = inputs["model"][1]["linear_ar"]["Lumina-mGPT-7B-1024"]
    assert (known["rows"], known["cols"], known["stride"], known["pixels"]) == (64, 64, 65, 16)
    known = inputs["model"][1]["linear_ar"]["Lumina-mGPT-2.0"]
    assert (known["rows"], known["cols"], known["stride"], known["pixels"]) == (96, 96, 97, 8)
    choice = server.get("/object_info/LineAR_TextPrompt")["LineAR_TextPrompt"]["input"]["optional"]["size"]
    drawn = {f"of Lumina-mGPT {side}": sizes(side) for side in (512, 768, 1024)}
    drawn["of Lumina-mGPT 2.0"] = sizes(768) + sizes(512)
    options = {option["key"]: option for option in choice[1]["options"]}
    for name, every in drawn.items():
        offered = options[name]["inputs"]["required"]["pixels"][1]["options"]
        assert [tuple(map(int, one.split(" x "))) for one in offered] == list(every)


@pytest.mark.parametrize(
    ("name", "size", "pixels", "lines"),
    [
        ("lumina_768", (768, 768), 16, 6),
        ("lumina_1024_portrait", (832, 1216), 16, 8),
        ("lumina2_768_on_24gb", (768, 768), 8, 8),
    ],
)
def test_a_workflow_runs(name: str, size: tuple[int, int], pixels: int, lines: int, server: Server) -> None:
    """The whole picture, of the size that was chosen, from the lines that the graph says, rows told in order."""
    messages, end = finish(server, twin(name))
    assert end["type"] == "execution_success", end
    ((picture,),) = server.pictures(end["data"]["prompt_id"])
    assert Image.open(picture).size == size
    cols, rows = (side // pixels for side in size)
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(rows))
    (started,) = [event for event in events if event["kind"] == "started"]
    assert (started["rows"], started["cols"], started["stride"]) == (rows, cols, cols + 1)
    assert started["lines"] == lines and started["cache_bytes"] < started["full_bytes"] / 4
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)


@pytest.mark.parametrize("kept", ["default", "fp8_e4m3fn"])
def test_the_host_draws_what_we_draw(kept: str, server: Server) -> None:
    """Two texts of unequal length, a negative one, and weights in a byte a number: the picture as without ComfyUI."""
    texts, rows = ["a red fox", "an old lighthouse on a cliff above the sea"], 2
    prompt = twin(
        "lumina_1024_portrait", text="\n---\n".join(texts), negative_text="rain", weight_dtype=kept, temperature=0.0,
        stop_after=rows,
    )  # fmt: skip
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    (saved,) = server.pictures(end["data"]["prompt_id"])
    folder = server.base / "models" / "ar_image"
    model = load_model(ModelFiles(folder / "Lumina-mGPT-7B-1024", folder / "vqgan.ckpt"))
    if kept != "default":
        for name, parameter in model.decoder.named_parameters():
            if name.startswith("layers.") and parameter.ndim == 2 and "norm" not in name:
                parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    info, run = model.info.with_size((832, 1216)), Run()
    asked = info.family.prompt(model.text_tokenizer, texts, "rain", info)
    sample = type(info.defaults)(guidance=4.0, top_k=2000, temperature=0.0)
    for line in generate(model.decoder, asked, CachePlan(budget=8), sample):
        run.add(line)
        if len(run.lines) == rows:
            break
    for path, ours in zip(saved, decode(model.tokenizer, run.tokens), strict=True):
        theirs = Image.open(path).convert("RGB")
        assert theirs.size == (832, 16 * rows)
        difference = ImageChops.difference(theirs, to_image(ours, 0).convert("RGB")).getextrema()
        assert max(high for _, high in difference) <= 3


def test_a_picture_is_continued_downward(server: Server) -> None:
    """Encode Image takes the size most like the picture's, or the prompt's, with which Generate can go on."""
    prompt = twin("lumina_768", stop_after=42, keep_rows=40)
    prompt["20"] = {"class_type": "EmptyImage", "inputs": {"width": 300, "height": 310, "batch_size": 1, "color": 99}}
    prompt["21"] = {"class_type": "LineAR_EncodeImage", "inputs": {"model": ["3", 0], "image": ["20", 0]}}
    prompt["6"]["inputs"]["tokens"] = ["21", 0]
    _, end = finish(server, prompt)
    assert end["type"] == "execution_error" and "lines of 46, but" in end["data"]["exception_message"], end
    prompt["21"]["inputs"]["prompt"] = ["4", 0]
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    ((picture,),) = server.pictures(end["data"]["prompt_id"])
    assert Image.open(picture).size == (768, 42 * 16)


def test_mistakes_name_what_there_is(server: Server) -> None:
    """Last of all: the host writes mistakes into its log."""
    wrong = {
        "size: Lumina-mGPT-7B-768 does not draw 832 x 1216 pixels; of similar shape it draws 608 x 896, ": twin(
            "lumina_1024_portrait", model="Lumina-mGPT-7B-768"
        ),
        "connect a Text Prompt": None,
    }
    other = twin("lumina_768")
    other["4"] = {
        "class_type": "LineAR_ClassPrompt",
        "inputs": {"model": ["30", 0], "class_name": "alpine dawn", "more_classes": ""},
    }
    other["30"] = {
        "class_type": "LineAR_LoadModel",
        "inputs": {"model": "landscapes (bundled)", "tokenizer": "automatic", "grid_rows": 0, "grid_cols": 0},
    }
    wrong["connect a Text Prompt"] = other
    for words, prompt in wrong.items():
        _, end = finish(server, prompt)
        assert end["type"] == "execution_error" and words in end["data"]["exception_message"], end
    refused = twin("lumina_768")
    refused["4"]["inputs"]["size.pixels"] = "800 x 600"
    with pytest.raises(AssertionError, match=r"size\.pixels: '800 x 600' not in"):
        finish(server, refused)

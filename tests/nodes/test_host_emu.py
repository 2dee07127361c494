"""Emu3's kind in a real ComfyUI, with small random checkpoints in the official layout.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re

import pytest
from PIL import Image

from linear_core.sizes import EMU3_AREAS, EMU35_SIZES, emu3_sizes
from tests.models import emu_official
from tests.nodes.comfy_server import Server, comfyui, finish, twin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        emu_official.write(running.base / "models")
        yield running


def test_what_is_offered(server: Server) -> None:
    """Decoders and VQ tokenizers, folders both, are told apart; sizes are those that a model draws."""
    inputs = server.get("/object_info/LineAR_LoadModel")["LineAR_LoadModel"]["input"]["required"]
    assert set(inputs["model"][1]["options"]) == {
        "Emu3-Gen",
        "Xiaomi-Robotics-U0-4B",
        "landscapes (bundled)",
        "landscapes in scales (bundled)",
    }
    assert inputs["tokenizer"][1]["options"] == ["automatic", "Emu3-VisionTokenizer", "Emu3.5-VisionTokenizer"]
    known = inputs["model"][1]["linear_ar"]["Emu3-Gen"]
    assert (known["rows"], known["cols"], known["stride"], known["pixels"], known["group"]) == (90, 90, 91, 8, 3)
    choice = server.get("/object_info/LineAR_TextPrompt")["LineAR_TextPrompt"]["input"]["optional"]["size"]
    offered = {option["key"]: option for option in choice[1]["options"]}
    drawn = {f"of {name}": emu3_sizes(area) for name, area in EMU3_AREAS.items()} | {"of Emu3.5": EMU35_SIZES}
    for name, sizes in drawn.items():
        pixels = offered[name]["inputs"]["required"]["pixels"][1]["options"]
        assert [tuple(map(int, one.split(" x "))) for one in pixels] == list(sizes)


def test_u0_draws_its_workflow(server: Server) -> None:
    """The whole picture, from the lines that the graph says, rows told in order."""
    messages, end = finish(server, twin("u0_1024"))
    assert end["type"] == "execution_success", end
    ((picture,),) = server.pictures(end["data"]["prompt_id"])
    assert Image.open(picture).size == (1024, 1024)
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(64))
    (started,) = [event for event in events if event["kind"] == "started"]
    assert (started["rows"], started["cols"], started["stride"], started["lines"]) == (64, 64, 65, 11)
    assert started["cache_bytes"] < started["full_bytes"] / 3
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)


def test_emu3_in_another_shape(server: Server) -> None:
    """The first rows of a wide picture, guided from the published list of flaws; then a size of another model."""
    prompt = twin("u0_1024", model="Emu3-Gen", stop_after=2)
    prompt["4"]["inputs"] |= {"size": "of Emu3-Gen", "size.pixels": "960 x 544"}
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    ((picture,),) = server.pictures(end["data"]["prompt_id"])
    assert Image.open(picture).size == (960, 16)
    prompt["4"]["inputs"] |= {"size": "of Emu3-Stage1", "size.pixels": "512 x 512"}
    _, end = finish(server, prompt)
    assert end["type"] == "execution_error"
    assert "size: Emu3-Gen does not draw 512 x 512 pixels" in end["data"]["exception_message"]

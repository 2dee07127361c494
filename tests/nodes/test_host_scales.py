"""The workflows of VAR and Infinity in a real ComfyUI, with small random checkpoints laid out as the published ones.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from linear_core.models.var import PYRAMIDS, VAR, VARConfig
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from tests.models import infinity_reference, official
from tests.nodes.comfy_server import Server, comfyui, finish, twin

pytestmark = pytest.mark.host


def save(network: nn.Module, path: Path) -> None:
    torch.manual_seed(0)
    for parameter in network.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
    torch.save(network.state_dict(), path)


def write(folder: Path) -> None:
    """A VAR of depth 16 for 256 pixels, an Infinity of 32 bits for 1024, and their tokenizers."""
    widths = (32, 32, 32, 32, 32)
    save(VAR(VARConfig(16, 64, 1, 128, 4096, 1000, 32, PYRAMIDS[680])), folder / "var_d16.pth")
    save(PyramidTokenizer(PyramidConfig(4096, 32, widths, 1)), folder / "vae_ch160v4096z32.pth")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("CAPTION_DIM", 2048), ("SLOTS", 512), ("CHANNELS", {"upright": 32})):
            patch.setattr(infinity_reference, name, value)
        torch.save(infinity_reference.weights("upright"), folder / "infinity_2b_reg.pth")
        torch.save(infinity_reference.vae_weights("upright"), folder / "infinity_vae_d32reg.pth")


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        official.write(running.base / "models")
        write(running.base / "models" / "ar_image")
        yield running


@pytest.mark.parametrize(
    ("name", "settings", "scales", "sizes", "kept"),
    [
        ("var_class_grid", {}, 10, [(516, 516)], (71, 424)),
        (
            "infinity_text_to_image",
            {"size": "of Infinity 0.06M", "size.pixels": "256 x 256"},
            7,
            [(256, 256)],
            (44, 265),
        ),
    ],
)
def test_a_workflow_runs(name: str, settings: dict, scales: int, sizes: list, kept: tuple, server: Server) -> None:
    """Pictures of the promised size, told of scale by scale, with the promised part of the cache."""
    prompt = twin(name)
    for node in prompt.values():
        if node["class_type"] == "LineAR_TextPrompt":
            node["inputs"] |= settings
    messages, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    (pictures,) = server.pictures(end["data"]["prompt_id"])
    assert [Image.open(path).size for path in pictures] == sizes
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(scales))
    (started,) = [event for event in events if event["kind"] == "started"]
    all_but_last = sum(rows * cols for rows, cols in started["sides"][:-1])
    assert (started["lines"], all_but_last) == kept and started["cache_bytes"] < started["full_bytes"] / 2
    assert events[-1]["kind"] in ("finished", "picture")
    assert max(event["cache_bytes"] for event in events if event["kind"] == "row") == started["cache_bytes"]
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)

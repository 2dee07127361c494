"""M-VAR's workflow in a real ComfyUI, with a small random checkpoint laid out as the published one.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from linear_core.models.mvar import MVAR, MVARConfig
from linear_core.models.var import PYRAMIDS
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from tests.nodes.comfy_server import Server, comfyui, finish, twin
from tests.tiny import _filled

pytestmark = pytest.mark.host
DEPTH, WIDTH = 16, 64


def write(folder: Path) -> None:
    """Sixteen layers, as the name says, of a 16th of the width."""
    config = MVARConfig(
        DEPTH, WIDTH, 1, 64, 4096, 1000, 32, PYRAMIDS[680], inner=2 * WIDTH, scan_heads=2, scan_size=64, span=4
    )
    decoder = _filled(MVAR(config).requires_grad_(False), {"class_emb": 1.0, "head": 0.5}, 0)
    tokenizer = PyramidTokenizer(PyramidConfig(4096, 32, (16, 16, 8, 8, 8), 1)).requires_grad_(False)
    _filled(tokenizer, {"embedding": 1.0}, 1)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(decoder.state_dict(), folder / "mvar_d16.pth")
    torch.save(tokenizer.state_dict(), folder / "vae_ch160v4096z32.pth")


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        write(running.base / "models" / "ar_image")
        yield running


def test_the_workflow_runs_without_a_cache(server: Server) -> None:
    """Ten scales, a picture of the promised size, and a state where others have a cache; the page plans the same."""
    messages, end = finish(server, twin("mvar_class_grid"))
    assert end["type"] == "execution_success", end
    (pictures,) = server.pictures(end["data"]["prompt_id"])
    assert [Image.open(path).size for path in pictures] == [(516, 516)]
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(10))
    (started,) = [event for event in events if event["kind"] == "started"]
    state = DEPTH * 8 * (3 * 256 + 64 * 128) * 4  # of four pictures with guidance
    assert started["state_bytes"] == started["cache_bytes"] == state
    assert all(event["held"] == 0 for event in events if event["kind"] == "row")
    facts = server.get("/object_info/LineAR_LoadModel")["LineAR_LoadModel"]["input"]["required"]["model"][1][
        "linear_ar"
    ]
    assert facts["mvar_d16.pth"]["state"] * DEPTH * 8 * 4 == state
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)

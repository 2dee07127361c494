"""MAR's workflows in a real ComfyUI, with a small random checkpoint laid out as the published one.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import save_file

from linear_core.models.mar import MAR, MARConfig
from linear_core.tokenizers.latents import LatentConfig, LatentTokenizer
from tests.nodes.comfy_server import Server, comfyui, finish, twin
from tests.tiny import _filled

pytestmark = pytest.mark.host
QUICK = {"steps": 16, "denoising": 4, "start": 950, "step_cache": "Balanced"}


def write(folder: Path) -> None:
    """Two and two layers of a 24th of the width, 256 tokens of 16 numbers; a VAE of 16 pixels a latent."""
    config = MARConfig(2, 2, 32, 1, 64, 1000, 256, 64, 16, 32, 1)
    deviation = {"qkv": 0.5, "fc2": 0.3, "class_emb": 1.0, "pos_embed": 0.7, "final_layer.linear": 0.05}
    decoder = _filled(MAR(config).requires_grad_(False), deviation, 0)
    widths = (16, 16, 8, 8, 8)
    tokenizer = LatentTokenizer(LatentConfig(16, widths, 1, False, widths[::-1], 1)).requires_grad_(False)
    _filled(tokenizer, {}, 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(decoder.state_dict(), folder / "mar-base.safetensors", {"heads": "1"})
    save_file(tokenizer.state_dict(), folder / "kl16.safetensors")


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        write(running.base / "models" / "ar_image")
        yield running


def draw(server: Server, name: str) -> tuple[list[tuple[int, int]], str]:
    """Sizes of what a workflow saves and leaves on its nodes, and the report; previews came as ComfyUI's own."""
    messages, end = finish(server, twin(name, **QUICK))
    assert end["type"] == "execution_success", end
    assert any(isinstance(message, bytes) for message in messages), "no preview"
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)
    prompt = end["data"]["prompt_id"]
    sizes = [Image.open(path).size for paths in server.pictures(prompt) for path in paths]
    outputs = server.get(f"/history/{prompt}")[prompt]["outputs"].values()
    (report,) = (output["text"][0] for output in outputs if "text" in output)
    return sizes, report


def test_four_classes(server: Server) -> None:
    """A grid is saved, and the pictures beside the map of ages stay on the node."""
    sizes, report = draw(server, "mar_class_grid")  # 4 layers, 8 sequences of 320 slots and a spare one
    assert sorted(sizes) == [(516, 516), (1024, 512)]
    assert report.startswith("1024 tokens drawn in 16 of 16 steps") and "added by the step cache: 2.5 MiB" in report


def test_a_region_drawn_anew(server: Server) -> None:
    sizes, report = draw(server, "mar_inpaint")
    assert sizes.count((256, 256)) == 2 and "36 of 256 tokens were drawn anew." in report

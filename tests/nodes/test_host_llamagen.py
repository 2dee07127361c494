"""LlamaGen's workflows in a real ComfyUI, with small random checkpoints laid out as the published ones.

Runs as test_host.py does: COMFYUI_DIR=path/to/ComfyUI python3 dev.py test -m host
"""

from __future__ import annotations

import re

import pytest
import torch
from PIL import Image

from linear_core.checkpoints.library import ImageModel, ModelFiles, load_model
from linear_core.loop.generate import Run, generate
from linear_core.pictures.preview import decode
from linear_core.pictures.sheet import to_image
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.models import official
from tests.nodes.comfy_server import Server, comfyui, finish, twin

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def server():
    with comfyui() as running:
        official.write(running.base / "models")
        yield running


@pytest.mark.parametrize(
    ("name", "rows", "sizes"),
    [("llamagen_class_grid", 24, [(772, 772)]), ("llamagen_text_to_image", 16, [(256, 256)] * 2)],
)
def test_a_workflow_runs(name: str, rows: int, sizes: list, server: Server) -> None:
    """The published settings, ComfyUI's own tokenizer for texts, pictures of the promised size."""
    messages, end = finish(server, twin(name))
    assert end["type"] == "execution_success", end
    (pictures,) = server.pictures(end["data"]["prompt_id"])  # of the one node that saves any
    assert [Image.open(path).size for path in pictures] == sizes
    events = [m["data"] for m in messages if isinstance(m, dict) and m["type"] == "linear_ar.line"]
    assert [event["row"] for event in events if event["kind"] == "row"] == list(range(rows))
    (started,) = [event for event in events if event["kind"] == "started"]
    assert started["cache_bytes"] < started["full_bytes"] / 2 and started["lines"] == 4
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)


def same_lines(theirs: Image.Image, model: ImageModel) -> None:
    """The host's picture of two lines is what the core draws of them with this model."""
    run = Run()
    sample = SamplePlan(guidance=4.0, top_k=2000, temperature=0.0)
    for line in generate(model.decoder, class_prompt([model.label("golden retriever")]), CachePlan(), sample):
        run.add(line)
        if len(run.lines) == 2:
            break
    ours = to_image(decode(model.tokenizer, run.tokens)[0], 0)
    assert theirs.size == ours.size == (384, 32)
    assert max(high for _, high in theirs_minus(theirs, ours)) <= 3


def test_weights_in_fp8_draw_what_rounded_weights_draw(server: Server) -> None:
    """ComfyUI casts them back a layer at a time; here they are rounded and kept in float32."""
    prompt = twin("llamagen_class_grid", weight_dtype="fp8_e4m3fn", temperature=0.0, more_classes="", stop_after=2)
    (decoded,) = [key for key, node in prompt.items() if node["class_type"] == "LineAR_Decode"]
    (saved,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    prompt[saved]["inputs"]["images"] = [decoded, 0]
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    ((saved_as,),) = server.pictures(end["data"]["prompt_id"])
    theirs = Image.open(saved_as)

    folder = server.base / "models" / "ar_image"
    model = load_model(ModelFiles(folder / "c2i_L_384.pt", folder / "vq_ds16_c2i.pt"))
    for name, parameter in model.decoder.named_parameters():
        if name.startswith("layers.") and parameter.ndim == 2:
            parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    same_lines(theirs, model)


@pytest.mark.parametrize("kept", ["int8", "int4"])
def test_weights_in_few_bits_draw_what_the_core_draws(kept: str, server: Server) -> None:
    """Quantised while ComfyUI loads them, multiplied by its layers."""
    prompt = twin("llamagen_class_grid", weight_dtype=kept, temperature=0.0, more_classes="", stop_after=2)
    (decoded,) = [key for key, node in prompt.items() if node["class_type"] == "LineAR_Decode"]
    (saved,) = [key for key, node in prompt.items() if node["class_type"] == "SaveImage"]
    prompt[saved]["inputs"]["images"] = [decoded, 0]
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    ((saved_as,),) = server.pictures(end["data"]["prompt_id"])
    theirs = Image.open(saved_as)
    folder = server.base / "models" / "ar_image"
    model = load_model(ModelFiles(folder / "c2i_L_384.pt", folder / "vq_ds16_c2i.pt"), weight_dtype=kept)
    same_lines(theirs, model)
    assert not re.search(r"WARNING.*(LineAR|linear_core)|Traceback", server.log)


def theirs_minus(a: Image.Image, b: Image.Image) -> tuple:
    from PIL import ImageChops

    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getextrema()


def test_a_text_is_encoded_once(server: Server) -> None:
    """The encoder is loaded for a new text, goes again, and is not loaded for a known one."""
    prompt = twin("llamagen_text_to_image", text="a lake under the moon", stop_after=1)
    before = server.log.count("Requested to load ModuleList")
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    assert server.log.count("Requested to load ModuleList") == before + 1
    prompt = twin("llamagen_text_to_image", text="A LAKE under the moon\n---\na lake  under the moon", stop_after=1)
    _, end = finish(server, prompt)
    assert end["type"] == "execution_success", end
    assert server.log.count("Requested to load ModuleList") == before + 1


def test_mistakes_are_told_with_the_path_and_the_source(server: Server) -> None:
    """Last of all: the host writes mistakes into its log."""
    with pytest.raises(AssertionError) as refused:
        finish(server, twin("llamagen_class_grid", model="c2i_XL_384.pt"))
    expected = server.base / "models" / "ar_image" / "c2i_XL_384.pt"
    assert str(expected) in str(refused.value) and "huggingface.co/FoundationVision/LlamaGen" in str(refused.value)
    wrong = {
        "vq_ds16_t2i.pt: is another model's tokenizer": twin("llamagen_class_grid", tokenizer="vq_ds16_t2i.pt"),
        "connect a Class Prompt": twin("llamagen_text_to_image", model="c2i_L_384.pt"),
        "16 x 16 tokens, not 24 x 24": twin("llamagen_text_to_image", grid_rows=24, grid_cols=24),
    }
    for words, prompt in wrong.items():
        _, end = finish(server, prompt)
        assert end["type"] == "execution_error" and words in end["data"]["exception_message"], end

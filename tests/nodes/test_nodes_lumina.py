"""Lumina-mGPT's nodes against the stand-in for ComfyUI: folders, the choice of a size, pictures that are continued."""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.models import lumina_official
from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK, Host, execute, host, object_info

pytest.importorskip("tokenizers")
comfy_double.load_pack()
EXTENSION = importlib.import_module(f"{PACK}.nodes").LineARExtension
UserError = importlib.import_module(f"{PACK}.linear_core.errors").UserError
CachePlan = importlib.import_module(f"{PACK}.linear_core.plan").CachePlan
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(EXTENSION().get_node_list())}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("comfy")
    lumina_official.write(folder / "models")
    return folder


@pytest.fixture(autouse=True)
def comfy(models: Path) -> Iterator[Host]:
    host.reset(models)
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(models / "models" / "text_encoders")], set())
    asyncio.run(EXTENSION().on_load())
    with torch.inference_mode():
        yield host


def run(node: str, **inputs: object) -> object:
    return execute(NODES[f"LineAR_{node}"], **inputs).result[0]


@pytest.fixture(scope="module")
def model(models: Path) -> object:
    host.reset(models)
    asyncio.run(EXTENSION().on_load())
    return run("LoadModel", model="Lumina-mGPT-7B-768", tokenizer="automatic")


def size(side: int, pixels: str) -> dict[str, str]:
    """As the host puts together what was chosen."""
    return {"size": f"of Lumina-mGPT {side}", "pixels": pixels}


def text(model: object, chosen: dict[str, str] | None = None, **more: object) -> object:
    return run("TextPrompt", text_encoder="none", text="a fox\n---\nan owl at night", model=model, size=chosen, **more)


def test_folders_and_the_vq_tokenizer_are_told_apart() -> None:
    inputs = object_info(NODES["LineAR_LoadModel"])["input"]["required"]
    assert inputs["model"][1]["options"] == [
        "landscapes (bundled)",
        "landscapes in scales (bundled)",
        "Lumina-mGPT-7B-1024",
        "Lumina-mGPT-7B-768",
    ]
    assert inputs["tokenizer"][1]["options"] == ["automatic", "vqgan.ckpt"]
    assert inputs["model"][1]["linear_ar"]["Lumina-mGPT-7B-768"]["stride"] == 49


def test_the_licence_is_told_where_a_model_is_chosen() -> None:
    for node, widget in (("LoadModel", "model"), ("DownloadModel", "release")):
        tooltip = object_info(NODES[f"LineAR_{node}"])["input"]["required"][widget][1]["tooltip"].lower()
        assert "lumina-mgpt" in tooltip and "not for commercial use" in tooltip


def test_the_size_travels_with_the_prompt(model: object) -> None:
    """Generate draws what Text Prompt chose; nothing is loaded again for another size."""
    own, same = text(model), text(model, {"size": "the model's own"})
    assert (own.grid.rows, own.grid.cols) == (48, 48) == (same.grid.rows, same.grid.cols)
    prompt = text(model, size(768, "896 x 608"))
    assert (prompt.grid.rows, prompt.grid.cols) == (38, 56)
    tokens = run("Generate", model=model, cache=CachePlan(budget=4), prompt=prompt, seed=1, stop_after=2)
    assert tokens.codes.shape == (2, 2, 56) and tokens.names == ("a fox", "an owl at night")
    assert run("Decode", model=model, tokens=tokens).shape == (2, 32, 896, 3)


def test_sizes_that_do_not_fit(model: object) -> None:
    with pytest.raises(UserError, match=r"size: Lumina-mGPT-7B-768 does not draw 1024 x 1024 .* 768 x 768"):
        text(model, size(1024, "1024 x 1024"))
    large = run("LoadModel", model="Lumina-mGPT-7B-1024", tokenizer="automatic")
    with pytest.raises(UserError, match=r"prompt: it asks for 1024 x 1024 pixels and was not made for"):
        run("Generate", model=model, cache=CachePlan(budget=4), prompt=text(large), seed=1)
    with pytest.raises(UserError, match=r"size: connect the model that is to draw '768 x 768'"):
        run("TextPrompt", text_encoder="flan-t5-xl", text="a fox", size=size(768, "768 x 768"))


def test_a_picture_is_encoded_in_a_size_that_the_model_draws(model: object) -> None:
    picture = torch.rand(1, 300, 420, 3)
    assert run("EncodeImage", model=model, image=picture).codes.shape == (1, 40, 56)  # 896 x 640, the nearest shape
    prompt = text(model, size(768, "768 x 768"))
    above = run("EncodeImage", model=model, image=picture, prompt=prompt)
    assert above.codes.shape == (1, 48, 48)
    drawn = run(
        "Generate",
        model=model,
        cache=CachePlan(budget=4),
        prompt=prompt,
        seed=1,
        tokens=above,
        keep_rows=6,
        stop_after=7,
    )
    assert torch.equal(drawn.codes[:, :6], above.codes[:, :6].expand(2, -1, -1)) and drawn.codes.shape == (2, 7, 48)


def test_anole_as_it_was_published(models: Path, tmp_path: Path) -> None:
    """Its one file in the folders of its repository; 32 lines without ends, its own sampling, no choice of a size."""
    ids, place = lumina_official.vocabulary(), tmp_path / "models" / "ar_image"
    folder = place / "Anole-7b-v0.1"
    (folder / "models" / "7b").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    loose = lumina_official.meta(lumina_official.decoder(ids, layers=1, heads=1), heads=1)
    torch.save(
        {name: tensor.bfloat16() for name, tensor in loose.items()}, folder / "models" / "7b" / "consolidated.pth"
    )
    lumina_official.tokenizer(folder / "tokenizer" / "text_tokenizer.json", ids)
    (place / "vqgan.ckpt").write_bytes((models / "models" / "ar_image" / "vqgan.ckpt").read_bytes())
    host.reset(tmp_path)
    asyncio.run(EXTENSION().on_load())
    anole = run("LoadModel", model="Anole-7b-v0.1/models/7b/consolidated.pth", tokenizer="automatic")
    info = anole.image.info
    assert info.name == "Anole-7B" and (info.grid.rows, info.grid.stride) == (32, 32)
    assert (info.defaults.guidance, info.defaults.temperature, info.defaults.top_p) == (3.0, 0.7, 0.9)
    prompt = text(anole)
    assert prompt.grid is None and prompt.negative.length == 2
    tokens = run("Generate", model=anole, cache=CachePlan(budget=2, recent=1), prompt=prompt, seed=1, stop_after=4)
    assert tokens.codes.shape == (2, 4, 32)
    with pytest.raises(UserError, match=r"size: Anole-7B does not draw 768 x 768 pixels; it has only one size"):
        text(anole, size(768, "768 x 768"))

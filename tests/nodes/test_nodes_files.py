"""The nodes among files from strangers: names that a workflow brings, and folders with broken models in them."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.checkpoints import bad_files
from tests.nodes import comfy_double
from tests.nodes.comfy_double import PACK, host

comfy_double.load_pack()
EXTENSION = importlib.import_module(f"{PACK}.nodes").LineARExtension
UserError = importlib.import_module(f"{PACK}.linear_core.errors").UserError
files = importlib.import_module(f"{PACK}.nodes.files")
NODES = {node.GET_SCHEMA().node_id: node for node in asyncio.run(EXTENSION().get_node_list())}
LEAVES = ["../secret.pt", "/etc/passwd", "a/../../secret.pt", "..\\secret.pt", "C:\\secret.pt", "C:secret.pt",
          "\\\\server\\secret.pt", "\\secret.pt", "..", "below/.."]  # fmt: skip
NO_NAMES = ["", "a\0.pt", "x" * 300, 5, None, ["landscapes"], {"a": 1}, True]


@pytest.fixture(autouse=True)
def models(tmp_path: Path) -> Path:
    """ComfyUI's models folder, with a model in it and a file outside that nobody may reach."""
    host.reset(tmp_path)
    folder = tmp_path / "models" / "ar_image"
    folder.mkdir(parents=True)
    encoders = tmp_path / "models" / "text_encoders"
    comfy_double.folder_names_and_paths["text_encoders"] = ([str(encoders)], {".safetensors", ".bin"})
    asyncio.run(EXTENSION().on_load())
    bad_files.write_llamagen(folder, "mine.safetensors", bad_files.decoder(), bad_files.NOTES)
    (tmp_path / "models" / "secret.pt").write_bytes((folder / "vq_ds16_c2i.pt").read_bytes())
    return folder


@pytest.mark.parametrize("name", LEAVES + NO_NAMES, ids=repr)
def test_a_name_in_a_workflow(name: object) -> None:
    """Neither as a model, nor as a tokenizer, nor as a text encoder does it lead out of the model folders."""
    for ask in (files.find_decoder, files.find_text_files, lambda name: files.find_files("mine.safetensors", name)):
        with pytest.raises(UserError, match=r"leads out of|is not (the|a file) name|too long|no such file") as caught:
            ask(name)
        assert str(caught.value).isprintable()
    told = NODES["LineAR_LoadModel"].validate_inputs(model=name)
    assert told is True if name is None else isinstance(told, str), "nothing: it is linked"


def test_a_broken_model_is_listed_and_hides_no_other(models: Path) -> None:
    """Whatever lies in the folder, the nodes come up with what is whole, and choosing what is broken says so."""
    for n, content in enumerate(("", "[" * 100_000, "[]", '{"weight_map": 5}', '{"weight_map": {"x": "../../x"}}')):
        folder = models / f"broken {n}"
        folder.mkdir()
        (folder / "config.json").write_text("{")
        (folder / "model.safetensors.index.json").write_text(content)
        save_file({"x": torch.zeros(1)}, folder / "model-00001-of-00002.safetensors")
    (models / "noise.pt").write_bytes(b"PK\3\4" + bytes(50))
    (models / "no config.safetensors").write_bytes((2**40).to_bytes(8, "little"))
    if os.name != "nt":
        (models / "gone.pt").symlink_to("nowhere.pt")
        (models / "loop.pt").symlink_to("loop.pt")
    names = files.model_names()
    assert {"mine.safetensors", "noise.pt", *(f"broken {n}" for n in range(5))} <= set(names)
    own = {"guidance": 4.0, "temperature": 1.0, "top_k": 2000, "top_p": 1.0}  # LlamaGen's, of classes
    assert files.model_facts()["mine.safetensors"]["sampling"] == own and files.class_names()
    schema = json.dumps(NODES["LineAR_LoadModel"].GET_SCHEMA().inputs[0].options)
    assert "noise.pt" in schema
    load = NODES["LineAR_LoadModel"]
    for name in set(names) - {"mine.safetensors", *files.BUNDLED_NAMES}:
        with pytest.raises(UserError, match=r"index\.json|config\.json|noise|no config"):
            load.execute(model=name, tokenizer="automatic")
        load.fingerprint_inputs(name, "automatic", 0, 0)


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not everybody make symbolic links")
def test_links_out_of_the_model_folder_work(models: Path, tmp_path: Path) -> None:
    """As people who keep models on another disk have them."""
    elsewhere = models.rename(tmp_path / "another disk")
    models.symlink_to(elsewhere)
    assert files.find_decoder("mine.safetensors") == models / "mine.safetensors"
    (elsewhere / "linked.pt").symlink_to(tmp_path / "models" / "secret.pt")
    assert files.find_decoder("linked.pt") == models / "linked.pt"


def test_a_tokenizer_as_the_hub_has_it_is_listed_and_found(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with a config and weights is a tokenizer by its weights, whatever its name, and *automatic* takes it."""
    heads = importlib.import_module(f"{PACK}.linear_core.models.llamagen").HEADS
    monkeypatch.setitem(heads, 64, 1)
    weights = bad_files.official.decoder("c2i", layers=1, width=64, hidden=32, codes=bad_files.official.CODES)
    torch.save({"model": weights}, models / "c2i_B_256.pt")
    (models / "vq_ds16_c2i.pt").unlink()
    for name in ("vq-ds16-c2i", "somebody's"):
        folder = models / "tokenizers" / name
        folder.mkdir(parents=True)
        found = {k: v.detach() for k, v in bad_files.official.tokenizer(16, channels=16).items()}
        save_file(found, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
        assert f"tokenizers/{name}" in files.tokenizer_names()
        assert f"tokenizers/{name}" not in files.model_names()
        for choice in (files.AUTOMATIC, f"tokenizers/{name}", f"tokenizers\\{name}"):
            model = NODES["LineAR_LoadModel"].execute(model="c2i_B_256.pt", tokenizer=choice).result[0]
            assert model.image.files.tokenizer == folder
        folder.rename(models.parent / name)

"""NOVA's folder: what a user draws with it, and what is said of one that is not whole."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from linear_core.__main__ import main
from linear_core.checkpoints.families import nova as family
from linear_core.checkpoints.library import (
    ModelFiles,
    find_checkpoints,
    find_tokenizer,
    load_model,
    load_tokenizer,
    read_info,
)
from linear_core.errors import UserError
from linear_core.steps import MaskedPlan
from tests.models.nova_official import published_sizes, write

NAME = "nova-d4w24-sd96"
WEIGHTS = "diffusion_pytorch_model.safetensors"
QUICK = ("--steps", "4", "--denoising", "4", "--start", "950", "--text", "word3 word4")


@pytest.fixture(autouse=True)
def sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    published_sizes(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("nova") / NAME)


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / NAME))


def test_the_folder_is_one_model_whichever_file_of_it_is_named(folder: Path) -> None:
    info = read_info(folder / "transformer" / WEIGHTS)
    assert info.name == NAME and info.family.name == "NOVA" and info.own_tokenizer
    assert (info.grid.rows, info.pixels, info.config.copies, info.config.text_tokens) == (6, 16, 9, 7)
    assert info.masked == MaskedPlan(64, 25, schedule="constant", spacing="trailing", rounded=True)
    assert info.defaults.guidance == 5.0
    assert find_tokenizer(folder) == folder / "vae"
    assert folder in find_checkpoints([folder.parent]) and folder / "transformer" not in find_checkpoints([folder])


def test_a_picture_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn from a text, with a step cache; then one corner of a picture, of 3 x 3 cells, is drawn anew."""
    mask = Image.new("L", (96, 96))
    mask.paste(255, (0, 0, 40, 33))
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (96, 96), (200, 40, 90)).save(tmp_path / "image.png")
    words = ["generate", "--model", str(folder), "--out", str(tmp_path / "a.png"), *QUICK]
    assert main([*words, "--step-cache", "MARché", "--refresh", "5"]) == 0
    found = re.search(r"36 tokens in 4 steps, (\d+) of 45 slots", capsys.readouterr().out)
    assert found and int(found[1]) < 45
    assert main([*words, "--image", str(tmp_path / "image.png"), "--mask", str(tmp_path / "mask.png")]) == 0
    assert "9 tokens in" in capsys.readouterr().out
    assert main(["plan", str(folder), "--step-cache", "Balanced", "--steps", "20"]) == 0
    assert "20 steps" in capsys.readouterr().out


def test_what_is_float32_whatever_the_model_computes_in(folder: Path) -> None:
    model = load_model(ModelFiles(folder, folder / "vae"), dtype=torch.bfloat16).decoder
    kinds = {name: weight.dtype for name, weight in model.named_parameters()}
    assert {kinds[name] for name in kinds if family.precise(name)} == {torch.float32}
    assert {kinds[name] for name in kinds if not family.precise(name)} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("transformer/config.json", None, "the transformer of a NOVA without its folder"),
        ("transformer/config.json", {"image_base_size": [6, 4]}, "image_base_size: [6, 4]"),
        ("transformer/config.json", {"text_token_len": 513}, "more than its 512"),
        ("scheduler/scheduler_config.json", None, "it says how tokens are denoised"),
        ("scheduler/scheduler_config.json", {"_class_name": "FlowMatch"}, "says _class_name: 'FlowMatch', but only"),
        ("scheduler/scheduler_config.json", {"timestep_spacing": "linspace"}, "only trailing and leading are"),
    ],
)
def test_a_folder_that_is_not_whole(file: str, changes: dict | None, words: str, copy: Path) -> None:
    if changes is None:
        (copy / file).unlink()
    else:
        (copy / file).write_text(json.dumps(json.loads((copy / file).read_text()) | changes))
    with pytest.raises(UserError, match=re.escape(words)):
        read_info(copy)


def test_a_model_of_videos_is_refused(copy: Path) -> None:
    file = copy / "transformer" / WEIGHTS
    save_file(load_file(file) | {"motion_embed.flow_proj.0.weight": torch.zeros(2)}, file)
    with pytest.raises(UserError, match="draws videos"):
        read_info(copy)


def test_a_vae_without_its_scale_and_a_missing_text_encoder(copy: Path) -> None:
    model = load_model(ModelFiles(copy, copy / "vae"))
    shutil.rmtree(copy / "text_encoder")
    with pytest.raises(UserError, match="has to hold the text encoder"):
        model.prompt(["word3"])
    (copy / "vae" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has to tell the scale"):
        load_tokenizer(copy / "vae")

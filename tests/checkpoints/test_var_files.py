"""VAR files from header to picture: recognised, refused with a reason, drawn on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from linear_core.__main__ import main
from linear_core.checkpoints.convert import convert
from linear_core.checkpoints.library import (
    ModelFiles,
    bundled_files,
    decoder_bytes,
    find_tokenizer,
    load_model,
    read_info,
)
from linear_core.errors import UserError
from linear_core.plan import CachePlan
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from tests.tiny import CLASSES, CODES, var

SIDES = (1, 2, 3, 4)
NOTES = {
    "sides": " ".join(map(str, SIDES)),
    "classes": json.dumps([f"class {n}" for n in range(CLASSES)]),
    "sampling": json.dumps({"guidance": 2.0, "top_k": 0, "top_p": 0.9, "temperature": 1.0}),
    "tokenizer": "little_vq.safetensors",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny VAR and its tokenizer, factor 4, in our own layout."""
    folder = tmp_path_factory.mktemp("files")
    decoder, quantizer = var(*SIDES)
    save_file(decoder.state_dict(), folder / "little.safetensors", NOTES)
    torch.manual_seed(0)
    tokenizer = PyramidTokenizer(PyramidConfig(CODES, 6, (16, 8, 8), 1))
    tokenizer.quantize.load_state_dict(quantizer.state_dict())
    save_file(tokenizer.state_dict(), folder / "little_vq.safetensors", {"family": "pyramid-vq"})
    return folder


def saved(folder: Path, name: str, notes: dict[str, str] = NOTES, **changes: Tensor | None) -> Path:
    """The tiny VAR under another name, with weights changed or (None) left out."""
    weights = var(*SIDES)[0].state_dict() | changes
    save_file({key: tensor.contiguous() for key, tensor in weights.items() if tensor is not None}, folder / name, notes)
    return folder / name


def test_sizes_and_classes(folder: Path) -> None:
    info = read_info(folder / "little.safetensors")
    assert info.family.name == "VAR" and info.pyramid.text == "1 2 3 4" and (info.grid.rows, info.grid.cols) == (4, 4)
    assert info.classes[1] == "class 1" and not info.text and info.defaults.top_p == 0.9
    assert find_tokenizer(folder / "little.safetensors") == folder / "little_vq.safetensors"
    half = decoder_bytes(info, torch.float32, torch.float8_e4m3fn)
    matrices = 2 * (24 * 72 + 24 * 24 + 2 * 24 * 32)  # what adapts norms stays as computed
    assert decoder_bytes(info, torch.float32) - half == 3 * matrices


@pytest.mark.parametrize(
    ("name", "notes", "changes", "words"),
    [
        ("var_d16.safetensors", NOTES, {}, "says depth 16 in its name, but has 2 layers"),
        ("no_sides.safetensors", {}, {}, "30 tokens in 4 scales are no published pyramid"),
        ("odd.safetensors", NOTES | {"sides": "1 2 x"}, {}, "not sides such as 1 2 3 4"),
        ("wrong.safetensors", NOTES | {"sides": "1 2 3 5"}, {}, "30 tokens in 4 scales"),
        ("down.safetensors", NOTES | {"sides": "4 3 2 1"}, {}, "does not go from coarse to fine"),
        ("names.safetensors", NOTES | {"classes": '["a"]'}, {}, "not a list of 5 names"),
        ("headless.safetensors", NOTES, {"head.weight": None}, "does not describe VAR"),
    ],
)
def test_a_file_that_is_not_what_it_says(name, notes, changes, words, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(name) + ".*" + words):
        read_info(saved(tmp_path, name, notes, **changes))


def test_tokenizers_of_the_other_kind(folder: Path, tmp_path: Path) -> None:
    """A raster tokenizer for scales and the reverse, and codes of another size: one sentence each."""
    little, raster = folder / "little.safetensors", bundled_files()
    with pytest.raises(UserError, match=r"landscapes_vq.*decodes one map of codes, but little.*coarse to fine"):
        load_model(ModelFiles(little, raster.tokenizer))
    with pytest.raises(UserError, match=r"little_vq.*decodes maps of codes from coarse to fine, but landscapes"):
        load_model(ModelFiles(raster.decoder, folder / "little_vq.safetensors"))
    other = PyramidTokenizer(PyramidConfig(CODES, 4, (16, 8, 8), 1))
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other.*codes have 4 numbers, but little.*reads 6"):
        load_model(ModelFiles(little, tmp_path / "other.safetensors"))
    with pytest.raises(UserError, match="files describe themselves"):
        convert(folder / "little_vq.safetensors", tmp_path / "converted.safetensors")


def test_a_training_checkpoint_is_unwrapped(folder: Path, tmp_path: Path) -> None:
    """Upstream's trainer nests its weights twice."""
    weights = var(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, layers=1)[0].state_dict()
    torch.save({"epoch": 1, "trainer": {"var_wo_ddp": weights, "vae_local": {}}}, tmp_path / "ar-ckpt-last.pth")
    assert read_info(tmp_path / "ar-ckpt-last.pth").pyramid.tokens == 680


def run(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str, str]:
    status = main([str(word) for word in words])
    return status, *capsys.readouterr()


def test_pictures_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Drawn with a share, in one piece and in parts: the same pictures; stopped after some scales: another."""
    model = ("--model", folder / "little.safetensors", "--class", "class 1", "--images", "3", "--seed", "4")
    pictures = {}
    for name, more in {
        "whole": (),
        "parts": ("--at-once", "2"),
        "full": ("--share", "1"),
        "coarse": ("--stop-after", "2"),
        "smooth": ("--smooth",),
        "map": ("--heatmap",),
    }.items():
        out = tmp_path / f"{name}.png"
        status, said, wrong = run(capsys, "generate", *model, "--share", "1/2", "--out", out, *more)
        assert status == 0, wrong
        assert "image tokens held after a scale" in said
        with Image.open(tmp_path / f"{name}_02.png") as image:
            pictures[name] = image.convert("RGB").resize((16, 16)).tobytes()
            notes = json.loads(image.info["linear"])
            assert notes["seed"] == 5 and notes["share"] == (1 if name == "full" else 0.5)
    assert pictures["whole"] == pictures["parts"]
    assert len({pictures[name] for name in ("whole", "coarse", "smooth", "map")}) == 4


def test_comparing_and_planning(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", folder / "little.safetensors", "--share", "1/2")
    status, said, wrong = run(capsys, "compare", *model, "--class", "class 1", "--out", tmp_path / "two.png")
    assert status == 0 and "7 of 14 tokens, fold" in said, wrong
    status, said, wrong = run(capsys, "plan", *model)
    info = read_info(folder / "little.safetensors")
    mib = info.cache_shape(torch.float32).scales_bytes(info.pyramid, CachePlan("fold", share=0.5), 2) / 2**20
    assert status == 0 and "4 scales (1 2 3 4), 30 tokens" in said and f"{mib:.2f}" in said, wrong
    status, said, _ = run(capsys, "models", folder)
    assert status == 0 and "4 x 4 tokens in scales 1 2 3 4, 5 classes" in said
    for words, complaint in (
        (("--share", "0.1", "--policy", "line"), "the first scales hold 5"),
        (("--share", "half"), "'half' is not a share"),
        (("--share", "2"), "share: 2.0 is out of range"),
        (("--stop-after", "9"), "stop after: 9 is out of range; the model draws 4 scales"),
        (("--policy", "tova"), "policy: tova looks at the last queries"),
    ):
        status, _, wrong = run(capsys, "generate", *model, "--class", "1", *words, "--out", tmp_path / "x.png")
        assert status == 2 and complaint in wrong


def test_a_budget_in_mib_holds_for_the_drafter_too(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep, out = tmp_path / "deep.safetensors", tmp_path / "x.png"
    save_file(var(*SIDES, layers=5)[0].state_dict(), deep, NOTES)
    info = read_info(deep)
    mib = info.cache_shape(torch.float32).scales_bytes(info.pyramid, CachePlan("fold", share=0.5), 2) / 2**20
    model = ("--model", folder / "little.safetensors", "--tokenizer", folder / "little_vq.safetensors")
    for more, kept in (((), 14), (("--drafter", deep), 7)):
        status, _, wrong = run(
            capsys, "generate", *model, "--class", "1", "--budget", f"{mib + 1e-4}MiB", "--out", out, *more
        )
        assert status == 0, wrong
        with Image.open(out) as image:
            assert json.loads(image.info["linear"])["share"] * 14 == pytest.approx(kept)


def test_methods_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A profile is made next to the model and ends the note about a survey; pruning changes the picture."""
    model, profile = ("--model", folder / "little.safetensors"), folder / "little.profile.json"
    draw = ("generate", *model, "--class", "1", "--share", "1/2", "--out", tmp_path / "x.png")
    status, _, wrong = run(capsys, *draw, "--policy", "heatkv")
    assert status == 0 and "note: policy heatkv judges the model's heads by the first scales" in wrong
    status, said, wrong = run(capsys, "calibrate", *model, "--samples", "2")
    assert status == 0 and f"{profile}: 2 layers of 3 heads, from 2 pictures" in said, wrong
    status, _, wrong = run(capsys, *draw, "--policy", "heatkv")
    assert status == 0 and "note" not in wrong
    profile.unlink()
    pictures = []
    for more in ((), ("--prune", "0.5", "--prune-layers", "0-1"), ("--drafter", folder / "little.safetensors")):
        status, _, wrong = run(capsys, *draw, *more)
        assert status == 0, wrong
        with Image.open(tmp_path / "x.png") as image:
            pictures.append(image.convert("RGB").tobytes())
            notes = json.loads(image.info["linear"])
        assert notes.get("prune") == ("0.5" if "--prune" in more else None)
    assert pictures[0] == pictures[2] != pictures[1], "drafted by itself, it is the same picture"
    for words, complaint in (
        (("generate", "--prune", "half"), "prune: 'half' are no shares; write them as 0.4,0.5"),
        (("generate", "--prune-layers", "0-1"), "add that one"),
        (("generate", "--prune", "0.5", "--prune-layers", "2"), "prune-layers: '2' are no layers"),
        (("generate", "--prune", "0.5", "--prune-layers", "0-7"), "layers are 0 to 1"),
        (("generate", "--drafter-scales", "2"), "add that one"),
        (("generate", "--drafter", folder / "little.safetensors", "--drafter-scales", "4"), "choose 1 to 3"),
        (("generate", "--drafter", bundled_files().decoder), "draws in lines; choose a model that draws in scales"),
        (("calibrate", "--out", tmp_path / "x.txt"), "is not a JSON file"),
        (("calibrate", "--samples", "0"), "samples: 0 is out of range"),
    ):
        command, *more = words
        share = ("--share", "1/2") if command == "generate" else ()
        status, _, wrong = run(capsys, command, *model, *share, *more)
        assert status == 2 and complaint in wrong, wrong
    status, _, wrong = run(capsys, "calibrate")
    assert status == 2 and "draws in lines; profiles are of models that draw in scales" in wrong


def test_a_share_on_a_raster_is_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1/6 of 24 lines is 4 of them."""
    status, said, _ = run(capsys, "plan", "--share", "1/6")
    assert status == 0 and "4 of 24 lines, fold" in said

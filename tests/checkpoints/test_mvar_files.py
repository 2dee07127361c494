"""M-VAR files from header to picture: told apart from VAR's, drawn and planned on the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from linear_core.checkpoints.library import ModelFiles, decoder_bytes, load_model, read_info
from linear_core.errors import UserError
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from tests.checkpoints.test_var_files import NOTES, SIDES, run
from tests.tiny import CODES, mvar, var


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny M-VAR and its tokenizer, factor 4, in our own layout."""
    folder = tmp_path_factory.mktemp("files")
    decoder, quantizer = mvar(*SIDES)
    save_file(decoder.state_dict(), folder / "little.safetensors", NOTES)
    torch.manual_seed(0)
    tokenizer = PyramidTokenizer(PyramidConfig(CODES, 6, (16, 8, 8), 1))
    tokenizer.quantize.load_state_dict(quantizer.state_dict())
    save_file(tokenizer.state_dict(), folder / "little_vq.safetensors", {"family": "pyramid-vq"})
    return folder


def test_sizes_and_dtypes(folder: Path) -> None:
    """Exponents of long decays stay float32 whatever is computed in, and only matrices are stored in fewer bits."""
    info = read_info(folder / "little.safetensors")
    assert info.family.name == "M-VAR" and not info.cached and info.pyramid.text == "1 2 3 4"
    files = ModelFiles(folder / "little.safetensors", folder / "little_vq.safetensors")
    model = load_model(files, dtype=torch.bfloat16)
    kept = {name for name, tensor in model.decoder.state_dict().items() if tensor.dtype == torch.float32}
    assert kept == {f"blocks.{n}.mamba.{name}" for n in range(2) for name in ("A_log", "D", "dt_bias")}
    saved = decoder_bytes(info, torch.float32) - decoder_bytes(info, torch.float32, torch.float8_e4m3fn)
    scan = 24 * (2 * 48 + 2 * 5 + 3) + 48 * 24
    assert saved == 3 * 2 * (24 * 72 + 24 * 24 + 2 * 24 * 32 + scan)


@pytest.mark.parametrize(
    ("name", "kind", "changes", "words"),
    [
        ("mvar_d02", var, {}, "says M-VAR in its name, but its layers are VAR's"),
        ("var_d02", mvar, {}, "says VAR in its name, but its layers are M-VAR's"),
        ("d16", mvar, {}, "says depth 16 in its name, but has 2 layers"),
        ("torn", mvar, {"blocks.0.mamba.A_log": None}, "does not describe M-VAR"),
        ("shared", mvar, {"shared_ada_lin.1.weight": torch.ones(9 * 24, 24)}, "its layers share a modulation"),
        ("odd", mvar, {"blocks.0.mamba.A_log": torch.ones(5)}, "do not fit 5 heads and 48 channels"),
    ],
)
def test_a_file_that_is_not_what_it_says(name, kind, changes, words, tmp_path: Path) -> None:
    weights = {key: tensor for key, tensor in (kind(*SIDES)[0].state_dict() | changes).items() if tensor is not None}
    save_file(weights, tmp_path / f"{name}.safetensors", NOTES)
    with pytest.raises(UserError, match=f"{name}.*{re.escape(words)}"):
        read_info(tmp_path / f"{name}.safetensors")


def test_an_official_file(tmp_path: Path) -> None:
    """As the authors publish it, with buffers and a name that says the depth alone; and as their trainer wraps it."""
    weights = mvar(1, 2, 3, 4, 5, 6, 8, 10, 13, 16, layers=1)[0].state_dict()
    buffers = {"lvl_1L": torch.zeros(1, 680, dtype=torch.int64), "blocks.0.attn.patch_nums": torch.ones(10).int()}
    torch.save(weights | buffers, tmp_path / "d01.pth")
    torch.save({"trainer": {"mvar_wo_ddp": weights | buffers, "vae_local": {}}}, tmp_path / "ar-ckpt-last.pth")
    for name in ("d01.pth", "ar-ckpt-last.pth"):
        info = read_info(tmp_path / name)
        assert info.pyramid.tokens == 680 and not info.cached, name
        assert info.defaults.guidance == 5.0 and info.defaults.top_k == 900


def test_pictures_on_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In one piece and in parts, the same pictures; after some scales, another. No setting of a cache is written."""
    model = ("--model", folder / "little.safetensors", "--class", "class 1", "--images", "3", "--seed", "4")
    pictures = {}
    for name, more in {"whole": (), "parts": ("--at-once", "2"), "coarse": ("--stop-after", "2")}.items():
        status, said, wrong = run(capsys, "generate", *model, "--out", tmp_path / f"{name}.png", *more)
        assert status == 0, wrong
        assert re.search(r"no cache: a state of 0\.0 MiB, \d+ tokens/s, \d", said)
        with Image.open(tmp_path / f"{name}_02.png") as image:
            pictures[name] = image.convert("RGB").resize((16, 16)).tobytes()
            notes = json.loads(image.info["linear"])
            assert notes["seed"] == 5 and "budget" not in notes
    assert pictures["whole"] == pictures["parts"] != pictures["coarse"]


def test_planning_and_what_does_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = ("--model", folder / "little.safetensors")
    status, said, wrong = run(capsys, "plan", *model, "--images", "50", "--class", "1")
    assert status == 0 and "no cache: a state of 0.3 MiB, the same at every scale and with every budget" in said, wrong
    assert "Images that fit at once, besides the weights:" in said and "keys" not in said
    for words, complaint in (
        (("generate", "--share", "1/6"), "share: it does nothing here, as little keeps no cache"),
        (("generate", "--preset", "Small"), "preset: it does nothing here"),
        (("generate", "--heatmap"), "heatmap: it does nothing here"),
        (("plan", "--budget", "3"), "budget: it does nothing here"),
        (("check",), "check: little keeps no cache, so no budget can change its pictures"),
        (("compare",), "compare: little keeps no cache, so there is nothing to compare"),
    ):
        status, _, wrong = run(capsys, words[0], *model, *words[1:])
        assert status == 2 and complaint in wrong

"""`doctor`: it names what is there and what is wrong, and no folder of anybody's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from linear_core import doctor
from linear_core.__main__ import main
from linear_core.checkpoints.library import bundled_files
from linear_core.models.raster import Raster
from tests.tiny import cut_down


def self_test() -> list[str]:
    return list(doctor.self_test("cpu", torch.float32))


def test_the_report_says_what_is_wrong_and_names_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "janedoe" / "models" / "ar_image"
    folder.mkdir(parents=True)
    cut_down(folder / "lonely.safetensors", tokenizer="gone.safetensors")
    (folder / "broken.safetensors").write_bytes(b"no")
    (folder / "vq.safetensors").write_bytes(bundled_files().tokenizer.read_bytes())
    monkeypatch.setenv("HOME", str(tmp_path / "janedoe"))
    monkeypatch.setattr("getpass.getuser", lambda: "janedoe")
    monkeypatch.setattr(doctor, "self_test", lambda *given: iter(["self-test: fine"]))
    monkeypatch.setenv("LINEAR_STEP", f"{tmp_path}/janedoe/x")
    assert main(["doctor", str(folder), "--device", "cpu", "--text-encoder", str(folder / "t5")]) == 0
    told = capsys.readouterr().out
    assert "janedoe" not in told and str(tmp_path) not in told.replace("~/.../x", "")
    lines = told.splitlines()
    assert lines[0].startswith("LineAR 0.") and f"torch {torch.__version__}" in told
    assert "models compute on cpu in float32" in lines and "models in ar_image: 3" in lines
    assert "  vq.safetensors: a VQ tokenizer" in lines
    assert any(line.startswith("  broken.safetensors: WRONG: broken.safetensors: not a complete") for line in lines)
    (lonely,) = (line for line in lines if line.startswith("  lonely.safetensors: "))
    assert "LlamaGen, 8 x 8 tokens, draws 12 classes" in lonely and "WRONG: gone.safetensors" in lonely
    assert "text encoder t5: WRONG: t5: there is no such file or folder." in lines and lines[-1] == "self-test: fine"


def test_paths_and_names_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setattr(Path, "home", lambda: Path("/srv/ann"))
    clean = doctor.without_names
    assert clean("/srv/ann/x/models/a b.pt: gone", [Path("/srv/ann/x/models")]) == "a b.pt: gone"
    assert clean("cannot load /srv/ann/venv/lib/libx.so (no)") == "cannot load ~/.../libx.so (no)"
    assert clean("/data/ann/planner by ann.") == "/data/USER/planner by USER."
    assert clean(f"{os.path.dirname(doctor.__file__)}/assets: gone") == "linear_core/assets: gone"


def test_the_self_test_draws_and_compares(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that all is fine, and that something is wrong once the step is."""
    monkeypatch.setattr(doctor, "SECONDS", 0.0)  # no more than the lines that are compared
    told = self_test()
    assert len(told) == 5 and not [line for line in told if "WRONG" in line] and "drew 6 of 24 lines" in told[1]
    before = Raster.step
    monkeypatch.setattr(Raster, "step", lambda *given: before(*given) + 0.01)
    assert "WRONG, rounding explains at most 0.002" in self_test()[3]
    monkeypatch.setattr(Raster, "step", lambda *given: (_ for _ in ()).throw(RuntimeError("CUDA error: no kernel\nx")))
    assert self_test()[-1] == "self-test: WRONG: RuntimeError: CUDA error: no kernel"


def test_a_stop_ends_the_self_test() -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(doctor.self_test("cpu", torch.float32, stop))


def test_the_models_of_the_comfyui_around_it_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.usual_folders() == [] or Path(doctor.__file__).parents[2].name == "custom_nodes"
    models = tmp_path / "models" / "ar_image"
    models.mkdir(parents=True)
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "custom_nodes" / "pack" / "linear_core" / "doctor.py"))
    assert doctor.usual_folders() == [models] and doctor.version() == "unknown"

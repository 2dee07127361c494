"""The command line, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from linear_core import __main__ as cli
from linear_core.__main__ import main
from linear_core.checkpoints import library
from linear_core.loop.generate import generate
from linear_core.loop.memory import run_bytes
from linear_core.loop.redraw import DRAW
from linear_core.pictures.fit import fit
from linear_core.pictures.sheet import read_image, save, to_image
from linear_core.plan import PRESETS, CachePlan
from linear_core.policies import POLICIES


def test_generate(small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "hills.png"
    asked = ["generate", str(small_model), "--class", "autumn hills"]
    assert main([*asked, "--images", "2", "--seed", "5", "--out", str(out)]) == 0
    written = sorted(p.name for p in tmp_path.iterdir())
    assert written == ["hills_01.png", "hills_02.png"]
    image = Image.open(tmp_path / "hills_02.png")
    notes = json.loads(image.text["linear"])
    assert notes["seed"] == 6 and notes["class"] == "autumn hills" and notes["policy"] == notes["release"] == "fold"
    alone = tmp_path / "alone.png"
    assert main([*asked, "--seed", "6", "--out", str(alone)]) == 0
    assert Image.open(alone).tobytes() == image.tobytes()  # image i of a batch is the image of seed + i
    assert main([*asked, "--images", "2", "--seeds", "6,5", "--out", str(out)]) == 0
    swapped = Image.open(tmp_path / "hills_01.png")
    assert swapped.tobytes() == image.tobytes() and json.loads(swapped.text["linear"]) == notes
    assert "MiB" in capsys.readouterr().out


def test_compare_measures_what_plan_promises(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(small_model), "--class", "desert day", "--out", str(tmp_path / "c.png")]) == 0
    measured = capsys.readouterr().out
    assert re.search(r"\d+% less cache; \d+% of the codes are the same as with the full cache", measured)
    assert main(["plan", str(small_model), "--class", "desert day"]) == 0
    planned = capsys.readouterr().out
    info = library.read_info(small_model)
    for plan in (CachePlan(policy="full"), PRESETS["Balanced"]):
        size = info.cache_shape(torch.float32).bytes(info.grid, plan, 2) / 2**20
        assert f"{size:.2f}" in measured and f"{size:.2f}" in planned
    assert "1/2" in planned
    assert Image.open(tmp_path / "c.png").width > 288


def test_the_demo_measures_what_it_says(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = library.ModelFiles(small_model, library.find_tokenizer(small_model))
    monkeypatch.setattr(library, "bundled_files", lambda *_: files)
    few = ["--policy", "random", "--budget", "1", "--anchors", "0", "--recent", "0"]
    assert main(["demo", "--class", "desert day", *few, "--size", "96", "--out", str(tmp_path / "d.png")]) == 0
    told = capsys.readouterr().out
    overlap = re.search(
        r"\d+% less cache\. Given the same tokens, the next one's probabilities overlap by (\d+)% with", told
    )
    assert overlap and 50 < int(overlap[1]) < 100
    assert "differ in places" in told and "of the codes are the same" not in told


@pytest.mark.parametrize("drafts", [0, -1])
def test_a_graph_that_cannot_be_says_so(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drafts: int
) -> None:
    """Without a GPU `--step graph` draws all the same, and says that it did so without one."""
    out = tmp_path / "g.png"
    asked = ["generate", str(small_model), "--class", "desert day", "--device", "cpu", "--step", "graph"]
    assert main([*asked, "--drafts", str(drafts), "--out", str(out)]) == 0
    told = capsys.readouterr()
    why = "no graph was used, graphs need cuda and this runs on cpu"
    names = ["step", "line's end"] if drafts == 0 else ["line's end", "drafts"]
    assert "; ".join(f"{name}: {why}" for name in names) + ".\n" in told.err
    assert ("% of drafts right" in told.out) == (drafts != 0)
    assert out.exists()


def test_plan_says_how_many_images_fit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """As many as the formula of a run allows beside the weights; none is said to be none."""
    info = library.read_info(library.bundled_files().decoder)
    shape, weights = info.cache_shape(torch.float32), library.decoder_bytes(info, torch.float32)
    few = PRESETS["Balanced"]
    room, full = (run_bytes(shape, info.grid, p, 2 * 5, info.config.codes, "cpu") for p in (few, PRESETS["Full"]))
    assert room < full / 2
    for free, words in ((weights + room, "with 4 of 24 lines, fold 5."), (weights + full, "full cache 5, with"),
                        (weights, "cache none, with")):  # fmt: skip
        monkeypatch.setattr("linear_core.__main__.free_memory", lambda free=free: free)
        assert main(["plan", "--device", "cpu"]) == 0
        assert words in capsys.readouterr().out
    monkeypatch.setattr("linear_core.__main__.free_memory", lambda: None)
    assert main(["plan", "--device", "cpu"]) == 0 and "at once" not in capsys.readouterr().out


def test_a_budget_in_memory_is_what_the_cache_takes(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`plan` and `generate` find the same lines for it, and the picture is that of so many lines."""
    info = library.read_info(small_model)
    lines = PRESETS["Balanced"].in_lines(info.grid)
    mib = info.cache_shape(torch.float32).bytes(info.grid, lines, 4) / 2**20
    told = []
    for budget in (f"{mib + 1e-3:.6f}MiB", "4 lines", f"{100 * lines.budget / info.grid.rows}%"):
        asked = [str(small_model), "--class", "desert day", "--images", "2", "--budget", budget]
        assert main(["plan", *asked]) == 0
        out = tmp_path / "b.png"
        assert main(["generate", *asked, "--out", str(out)]) == 0
        picture = Image.open(tmp_path / "b_02.png")
        notes = json.loads(picture.text["linear"])
        told.append((re.search(r"\d+ of \d+ lines, fold", capsys.readouterr().out)[0], picture.tobytes(), notes))
    assert told[0] == told[1] == told[2] and told[0][2]["budget"] == 4
    assert main(["plan", str(small_model), "--budget", "1KiB"]) == 2
    assert "not enough for one line of 2 sequences" in capsys.readouterr().err


def test_the_best_of_several(small_model: Path, tmp_path: Path) -> None:
    """The pictures with the highest scores, as they are drawn alone, and a sheet of all."""
    out = tmp_path / "b.png"
    asked = [str(small_model), "--class", "desert day", "--class", "ocean dusk"]
    for by in ("match", "likelihood"):
        assert main(["generate", *asked, "--images", "3", "--best", "2", "--by", by, "--out", str(out)]) == 0
        written = [Image.open(tmp_path / f"b_{n:02d}.png") for n in (1, 2, 3, 4)]
        notes = [json.loads(picture.text["linear"]) for picture in written]
        assert [note["class"] for note in notes] == ["desert day"] * 2 + ["ocean dusk"] * 2
        assert all(a["score"] >= b["score"] for a, b in (notes[:2], notes[2:]))
        assert {note["seed"] for note in notes[:2]} < {0, 1, 2} and {note["seed"] for note in notes[2:]} < {3, 4, 5}
        assert Image.open(tmp_path / "b_sheet.png").width > 3 * 288
    alone = tmp_path / "alone.png"
    again = ["--class", "ocean dusk", "--seed", str(notes[3]["seed"]), "--out", str(alone)]
    assert main(["generate", str(small_model), *again]) == 0
    assert Image.open(alone).tobytes() == written[3].tobytes()


def test_a_region_is_drawn_anew(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image and a mask of any size; of several fills the one that is written, and a sheet of all."""
    asked = ["generate", str(small_model), "--class", "desert day", "--image", str(tmp_path / "image.png")]
    asked += ["--mask", str(tmp_path / "mask.png"), "--size", "0", "--out", str(tmp_path / "new.png")]
    source = torch.Generator().manual_seed(0)
    pixels = torch.rand(
        64, 96, 3, generator=source
    )  # the model draws 32 x 32: scaled to half, and 8 cropped left, right
    save(to_image(pixels), tmp_path / "image.png", {})
    mask = torch.zeros(32, 48, 3)  # half as large
    mask[12:20, 8:16] = 1  # rows 3 and 4, columns 0 and 1 of the 8 x 8 that are left
    save(to_image(mask), tmp_path / "mask.png", {})
    given = []

    def spy(*args: Any, kept: torch.Tensor | None = None, **more: Any) -> Any:
        given.append(kept)
        return generate(*args, kept=kept, **more)

    monkeypatch.setattr(cli, "generate", spy)
    assert main([*asked, "--candidates", "3", "--seed", "5"]) == 0
    told = capsys.readouterr().err
    assert "The mask of 48 x 32 was stretched to the image's 96 x 64." in told
    assert "Image and mask of 96 x 64 were scaled and cropped to 32 x 32." in told
    (kept,) = given
    inside = torch.zeros(1, 8, 8, dtype=torch.bool)
    inside[:, 3:5, :2] = True
    assert torch.equal(kept == DRAW, inside)
    tokenizer = library.load_tokenizer(small_model.parent / "landscapes_vq.safetensors")
    codes = tokenizer.encode(fit(read_image(tmp_path / "image.png", "image")[None], 32, 32) * 2 - 1)
    assert torch.equal(kept[~inside], codes[~inside])
    best = Image.open(tmp_path / "new.png")
    notes = json.loads(best.text["linear"])
    assert notes["seed"] in {5 + (n << 32) for n in range(3)} and notes["by"] == "what follows"
    assert notes["mask"] == "mask.png" and Image.open(tmp_path / "new_sheet.png").width > 3 * 32
    for seed in {5, notes["seed"]}:
        assert main([*asked, "--seed", str(seed)]) == 0
        assert (Image.open(tmp_path / "new.png").tobytes() == best.tobytes()) == (seed == notes["seed"])


def test_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert main(["models", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "landscapes: 24 x 24 tokens, 12 classes" in out and "broken.safetensors: skipped" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--class", "sea"], ["class", "sea", "alpine dawn"]),
        (["--budget", "1", "--recent", "1"], ["budget", "1 lines", "anchors"]),
        (["--budget", "0"], ["budget", "choose 1"]),
        (["--budget", "some"], ["budget", "some", "1/6"]),
        (["--seeds", "1,2", "--class", "ocean dusk"], ["seeds", "there are 2", "1 images"]),
        (["--best", "2"], ["best", "2 of 1 images"]),
        (["--best", "1", "--by", "vqa"], ["model", "landscapes cannot look at pictures"]),
        (["--candidates", "2"], ["candidates", "--image and --mask"]),
        (["--image", "a.png"], ["mask", "give both"]),
        (["--image", "a.png", "--mask", "b.png"], ["image", "a.png cannot be read"]),
        (["--model", "landscapes_var", "--image", "a.png", "--mask", "b.png"], ["mask", "draws in scales"]),
        (["--seeds", "1", "--seed", "1"], ["seeds", "--seed is one for all"]),
        (["--grid", "3x3"], ["landscapes.safetensors", "24 x 24"]),
        (["--grid", "three"], ["grid", "24x24"]),
        (["--images", "0"], ["images"]),
        (["--top-p", "0"], ["top-p"]),
        (["--out", "picture.jpg"], ["picture.jpg", ".png"]),
        (["--model", "gone.pt"], ["gone.pt", "no such file"]),
        (["--model", "gone.pt", "--tokenizer", "gone_vq.pt"], ["gone.pt", "no such file"]),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: list[str],
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    for word in words:
        assert word in error, error
    assert not list(tmp_path.iterdir())


def test_presets_fit_the_bundled_grid() -> None:
    grid = library.read_info(library.bundled_files().decoder).grid
    for plan in PRESETS.values():
        plan.check(grid)
        assert plan.policy in POLICIES

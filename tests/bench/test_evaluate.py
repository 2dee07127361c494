"""bench/evaluate.py: what it says of a folder that `batch` drew."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import evaluate
from linear_core.__main__ import main as batch
from linear_core.check import FULL, check_plans, divergences
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model
from linear_core.plan import CachePlan
from tests.bench.command import last_line


@pytest.fixture(scope="module")
def folder(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    rows = [
        {"class": name, "include": [{"class": name, "count": n}], "tag": "t"}
        for name, n in (("desert day", 1), ("3", 2))
    ]
    (folder / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    plan = ["--policy", "streaming", "--budget", "1", "--anchors", "0", "--recent", "0"]
    asked = ["batch", str(folder / "p.jsonl"), "--model", str(small_model), "--device", "cpu", "--codes", *plan]
    assert batch([*asked, "--out", str(folder / "out")]) == 0
    return folder / "out"


def test_kl_is_that_of_the_pictures_that_were_drawn(folder: Path, small_model: Path, monkeypatch, capsys) -> None:
    """The same as `check` finds, for what the few lines drew instead of the full cache."""
    found = last_line(evaluate.main, [str(folder), "--model", str(small_model)], monkeypatch, capsys)
    model = load_model(ModelFiles(small_model, find_tokenizer(small_model)))
    plan = CachePlan("streaming", 1, 0, 0)
    (_, few) = check_plans(model, model.class_prompt(["desert day", "3"]), [plan], model.info.defaults)
    theirs = divergences(model, model.class_prompt(["desert day", "3"]), few.run.tokens, [FULL, plan], lambda n: None)[
        1
    ]
    assert found["kl"]["kl"] == pytest.approx(float(theirs.mean()), rel=1e-4) and found["kl"]["kl"] > 1e-3
    assert (
        found["accuracy"] == found["frechet"] == {"left_out": "the classifier knows only the bundled model's pictures"}
    )
    assert [name for name in evaluate.METRICS if "left_out" not in found[name]] == ["kl"]
    assert json.loads((folder / "evaluation.json").read_text())["pictures"] == 2


def test_the_classifier_and_the_scenes(folder: Path, monkeypatch) -> None:
    """Of pictures that pass for the bundled model's: a class each, and a distance once there are enough."""
    pictures = evaluate.Pictures(folder, None)
    pictures.run["weight_bytes"] = pictures.info.weight_bytes
    found, seen = evaluate.features(pictures)
    assert found.shape == (2, 32) and 0 <= evaluate.accuracy(pictures, None)["accuracy"] <= 1 and len(seen) == 2
    with pytest.raises(evaluate.Missing, match="too few"):
        evaluate.frechet_distance(pictures, None)


def test_objects_are_counted(folder: Path) -> None:
    """One is enough where one is asked for; two have to be two."""
    pictures = evaluate.Pictures(folder, None)

    def detect(image, candidate_labels):
        return [{"label": candidate_labels[0], "score": 0.9}, {"label": candidate_labels[0], "score": 0.1}]

    assert evaluate.objects_by(pictures, detect)["objects"] == 0.5
    assert evaluate.objects_by(pictures, detect, least=0.05)["by_tag"] == {"t": 1.0}


def test_a_folder_without_pictures(tmp_path: Path) -> None:
    with pytest.raises(evaluate.UserError, match=r"has no pictures of `batch`"):
        evaluate.Pictures(tmp_path, None)

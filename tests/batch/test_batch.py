"""`batch`: a picture and a row of metadata for every row of a file, whatever interrupts it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from linear_core.__main__ import main
from linear_core.batch import draw, folder, over_ray
from linear_core.batch.draw import Drawer, Job, Picture, batches_of, check_rows, draw_here, pictures_of
from linear_core.batch.folder import Drawn, Folder
from linear_core.batch.over_ray import Worker, Workers
from linear_core.batch.table import Row, Skipped
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, read_info
from linear_core.errors import UserError
from linear_core.plan import PRESETS

CLASSES = ["desert day", "alpine dawn", "ocean dusk", "alpine dawn", "winter snow"]


@pytest.fixture(scope="module")
def whole(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an undisturbed run leaves."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "prompts.txt").write_text("\n".join(CLASSES))
    asked = ["--model", str(small_model), "--device", "cpu", "--at-once", "2", "--seed", "5", "--codes"]
    assert main(["batch", str(folder / "prompts.txt"), *asked, "--out", str(folder / "out")]) == 0
    return folder / "out"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(CLASSES))
    return path


@pytest.fixture
def command(small_model: Path, prompts: Path) -> Callable[..., int]:
    def run(out: Path, *more: str, file: Path = prompts) -> int:
        asked = ["batch", str(file), "--model", str(small_model), "--device", "cpu", "--at-once", "2", "--seed", "5"]
        return main([*asked, "--codes", "--out", str(out), *more])

    return run


@pytest.fixture
def job(small_model: Path) -> Job:
    sample = read_info(small_model).defaults
    return Job(ModelFiles(small_model, find_tokenizer(small_model)), PRESETS["Smallest"], sample, codes=True)


def contents(out: Path) -> dict[str, bytes]:
    """Everything that a run leaves but its lock."""
    files = [path for path in out.rglob("*") if path.is_file() and path.name != folder.LOCK]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def test_pictures_are_those_of_generate(whole: Path, small_model: Path, tmp_path: Path) -> None:
    """Picture n of a file is what `generate` draws for the same class with seed + n, and says so of itself."""
    rows = [json.loads(line) for line in (whole / "metadata.jsonl").read_text().splitlines()]
    assert [(row["row"], row["prompt"], row["seed"]) for row in rows] == [
        (i + 1, c, 5 + i) for i, c in enumerate(CLASSES)
    ]
    assert all(len(row["codes"]) == 64 for row in rows) and rows[1]["codes"] != rows[3]["codes"]
    assert len(list((whole / "pictures").iterdir())) == len(rows)
    asked = ["generate", str(small_model), "--class", CLASSES[3], "--seed", "8", "--size", "0", "--device", "cpu"]
    assert main([*asked, "--drafts", "0", "--out", str(tmp_path / "one.png")]) == 0
    ours, alone = Image.open(whole / rows[3]["file_name"]), Image.open(tmp_path / "one.png")
    assert ours.tobytes() == alone.tobytes() and json.loads(ours.text["linear"]) == json.loads(alone.text["linear"])


@pytest.mark.parametrize("moment", ["picture", "row", "end"])
def test_a_run_that_was_killed_goes_on(
    moment: str, whole: Path, command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the pictures of a batch, in the middle of a row, or at the end: only what is missing is drawn."""
    out, drawn = tmp_path / "out", []
    write, calls = folder._write, []

    def killed(path: Path, content: bytes) -> None:
        calls.append(path)
        if len([p for p in calls if p.suffix == ".png"]) == 4 and moment != "end":
            raise SystemExit("killed")
        if moment == "end" and path.name == "metadata.jsonl":
            raise SystemExit("killed")
        write(path, content)

    monkeypatch.setattr(folder, "_write", killed)
    with pytest.raises(SystemExit):
        command(out)
    monkeypatch.setattr(folder, "_write", write)
    if moment == "row":
        with (out / "metadata.jsonl").open("a") as file:
            file.write('{"row": 3, "file_name": "pictures/0000')
    before = Drawer.draw
    monkeypatch.setattr(
        Drawer, "draw", lambda self, batch: drawn.extend(p.row.number for p in batch) or before(self, batch)
    )
    assert command(out) == 0
    assert drawn == ([] if moment == "end" else [3, 4, 5])
    assert contents(out) == contents(whole)
    (out / "pictures" / "000002.png").unlink()
    assert command(out) == 0 and drawn[-1:] == [2] and contents(out) == contents(whole)


def test_a_full_disk_loses_nothing(
    whole: Path,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write = folder._write

    def full(path: Path, content: bytes) -> None:
        if path.name == "000004.png":
            raise OSError(28, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(folder, "_write", full)
    assert command(tmp_path / "out") == 2
    assert "000004.png: No space left on device" in capsys.readouterr().err
    monkeypatch.setattr(folder, "_write", write)
    assert command(tmp_path / "out") == 0 and contents(tmp_path / "out") == contents(whole)


def test_a_bad_row_is_reported_and_the_others_are_drawn(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    rows = [{"class": "desert day", "tag": [1]}, {"class": "the moon"}, {"class": 3, "seed": 40, "tag": "b"}]
    file.write_text("\n".join(["{oops", *map(json.dumps, rows)]))
    assert command(out, "--images", "2", file=file) == 0
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "row 1 of p.jsonl was skipped: it is not JSON"
    assert told[1].startswith("row 3 of p.jsonl was skipped: class: small has no class 'the moon'") and len(told) == 2
    assert [json.loads(line)["row"] for line in (out / "skipped.jsonl").read_text().splitlines()] == [1, 3]
    found = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    names = ["000002_01", "000002_02", "000004_01", "000004_02"]
    assert [row["file_name"] for row in found] == [f"pictures/{name}.png" for name in names]
    assert [(row["seed"], row["tag"]) for row in found] == [(7, [1]), (8, [1]), (40, "b"), (41, "b")]
    assert found[2]["prompt"] == "3"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--class", "desert day"], "class: prompts.txt says what to draw"),
        (["--text", "a fox"], "draws classes, not texts"),
        (["--seeds", "1-5"], "seeds: a table's column seed says them"),
        (["--workers", "2"], "workers: they are for --ray"),
        (["--gpus", "0.5"], "workers: they are for --ray"),
        (["--ray", "--gpus", "1.5"], "gpus: 1.5 is neither"),
        (["--ray", "--workers", "-1"], "workers: -1 is out of range"),
        (["--column", "text"], "column: prompts.txt is a text file"),
        (["--budget", "0"], "budget"),
        (["--size", "-1"], "size: -1"),
        (["--tokenizer", "gone.pt"], "gone.pt"),
    ],
)
def test_bad_options_are_one_sentence_and_write_nothing(
    more: list[str], words: str, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tmp_path / "out", *more) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert not (tmp_path / "out" / "metadata.jsonl").exists()


def test_a_folder_of_another_run_is_refused(
    whole: Path, command: Callable[..., int], prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Other settings or prompts, pictures of something else, a run that is going on: all is left as it is."""
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = contents(out)

    def refused(words: str, *more: str, place: Path = out) -> None:
        capsys.readouterr()
        assert command(place, *more) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error

    refused("a run with other settings (budget was '4' and is '2')", "--budget", "2")
    refused("a run with other settings (seed was '5' and is '6')", "--seed", "6")
    with Folder.opened(out, json.loads(before["run.json"])):
        refused("another run is drawing into")
    prompts.write_text("\n".join([*CLASSES[:2], "desert dusk", *CLASSES[3:]]))
    refused("000003.png has the prompt 'ocean dusk', but the file of prompts now says 'desert dusk'")
    prompts.write_text("\n".join(CLASSES))
    assert contents(out) == before
    (out / "run.json").unlink()
    refused("has pictures of something else")
    refused("cannot be written", place=prompts / "below")
    (out / "run.json").write_text("[")
    refused("run.json cannot be read")
    (out / "run.json").write_bytes(before["run.json"])
    (out / "metadata.jsonl").write_bytes(b"{}\n" + before["metadata.jsonl"])
    refused("line 1 of")


def test_rows_that_are_added_are_drawn(whole: Path, command: Callable[..., int], prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    prompts.write_text("\n".join(CLASSES[:3]))
    assert command(out) == 0
    prompts.write_text("\n".join(CLASSES))
    assert command(out) == 0 and contents(out) == contents(whole)


# -- batches, wherever they are drawn ----------------------------------------------------------------------------------


def test_pictures_do_not_depend_on_the_split(job: Job) -> None:
    """Seeds of their own, in any order and company: the same codes."""
    rows = [Row(1, "desert day"), Row(2, "ocean dusk", seed=9), Row(3, "alpine dawn"), Row(4, "ocean dusk", seed=1)]
    pictures, drawer = pictures_of(rows, job), Drawer(job)

    def codes(at_once: int, order: list[Picture]) -> dict[str, list[int]]:
        done = [each for batch in batches_of(order, at_once, job) for each in drawer.draw(batch)]
        return {each.metadata["file_name"]: each.metadata["codes"] for each in done if isinstance(each, Drawn)}

    together = codes(4, pictures)
    assert together == codes(3, pictures[::-1]) == codes(1, pictures)
    assert len({tuple(one) for one in together.values()}) == 4


def test_batches_have_one_negative_prompt(job: Job) -> None:
    rows = [Row(1, "a"), Row(2, "b", "blurry"), Row(3, "c"), Row(4, "d", "blurry"), Row(5, "e")]
    found = batches_of(pictures_of(rows, job), 2, job)
    assert [[picture.row.number for picture in batch] for batch in found] == [[1, 3], [5], [2, 4]]


def test_a_text_that_the_model_cannot_read_costs_only_its_row(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which only the model's own tokenizer finds out, in the middle of a run."""
    before = Drawer._prompt_of

    def prompt(self: Drawer, batch: list[Picture]) -> Any:
        if any(picture.row.number == 2 for picture in batch):
            raise UserError("text: it takes too many tokens.")
        return before(self, batch)

    monkeypatch.setattr(Drawer, "_prompt_of", prompt)
    batch = pictures_of([Row(1, "desert day"), Row(2, "ocean dusk"), Row(3, "alpine dawn")], job)
    done = Drawer(job).draw(batch)
    assert [d for d in done if isinstance(d, Skipped)] == [Skipped(2, "text: it takes too many tokens.")]
    assert [d.metadata["row"] for d in done if isinstance(d, Drawn)] == [1, 3]


def test_memory_that_runs_out_halves_this_batch_and_the_next(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, before = [], draw.generate

    def generate(decoder: Any, prompt: Any, *args: Any, **more: Any) -> Any:
        sizes.append(prompt.rows)
        if prompt.rows > 2:
            raise MemoryError
        return before(decoder, prompt, *args, **more)

    monkeypatch.setattr(draw, "generate", generate)
    drawer, batch = Drawer(job), pictures_of([Row(i + 1, "desert day") for i in range(4)], job)
    assert drawer.draw(batch) == drawer.draw(batch)
    assert sizes == [4, 2, 2, 2, 2]


def test_a_worker_draws_what_this_process_draws(job: Job) -> None:
    """Through the JSON and the tables that Ray carries, and without Ray."""
    batch = pictures_of([Row(2, "ocean dusk", more={"id": "x"}), Row(3, "desert day", seed=4)], job)
    ((here),) = draw_here(job, [batch], print)
    told = Worker(job)({"batch": [6], "pictures": [over_ray._written(batch)]})
    assert told["batch"] == [6] and told["error"] == [""]
    assert list(over_ray._read(told["metadata"][0], told["pngs"][0])) == here


def test_what_is_wrong_with_all_pictures_reaches_the_run(job: Job, tmp_path: Path, monkeypatch: Any) -> None:
    lost = Worker(draw.replace(job, files=ModelFiles(tmp_path / "gone.pt", tmp_path / "gone.pt")))
    assert "gone.pt: there is no such file" in lost({"batch": [0], "pictures": ["[]"]})["error"][0]
    worker = Worker(job)
    monkeypatch.setattr(worker.drawer, "draw", lambda batch: (_ for _ in ()).throw(UserError("memory: none.")))
    assert worker({"batch": [0], "pictures": ["[]"]})["error"] == ["memory: none."]


@pytest.mark.parametrize(
    ("workers", "there", "expected"),
    [
        (Workers(), {"CPU": 4.0}, (4, 0, 1)),
        (Workers(count=2), {"CPU": 4.0}, (2, 0, 2)),
        (Workers(), {"CPU": 16.0, "GPU": 2.0}, (2, 1, 8)),
        (Workers(gpus=0.5), {"CPU": 16.0, "GPU": 2.0}, (4, 0.5, 4)),
        (Workers(gpus=0), {"CPU": 2.0, "GPU": 2.0}, (2, 0, 1)),
        (Workers(count=9), {"CPU": 9.0, "GPU": 2.0}, "workers: 9 are more than the 2 that Ray has GPUs for"),
        (Workers(gpus=1), {"CPU": 9.0}, "gpus: a worker is to get 1, but Ray sees 0"),
    ],
)
def test_workers_are_laid_out(workers: Workers, there: dict[str, float], expected: Any) -> None:
    ray = SimpleNamespace(cluster_resources=lambda: there)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            over_ray._layout(ray, workers, 100)
    else:
        assert over_ray._layout(ray, workers, 100) == expected
        assert over_ray._layout(ray, workers, 1)[0] == 1


def test_without_ray_one_sentence_says_what_to_install(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert command(tmp_path / "out", "--ray") == 2
    error = capsys.readouterr().err
    assert "needs the Python package ray" in error and "pip install 'ray[data]'" in error and error.count("\n") == 1


def test_rows_are_held_to_the_model(small_model: Path) -> None:
    rows, skipped = check_rows([Row(1, "11"), Row(2, "12"), Row(3, "1", "blurry")], read_info(small_model))
    assert [row.number for row in rows] == [1] and [row.number for row in skipped] == [2, 3]


def test_a_ray_that_is_not_there_is_one_sentence(job: Job) -> None:
    def refuse(**options: Any) -> None:
        raise ConnectionError(f"no GCS at {options['address']}\nand more")

    ray = SimpleNamespace(init=refuse)
    with (
        pytest.raises(
            UserError, match=r"ray: it cannot be started at '10\.0\.0\.1:6379' \(no GCS at 10\.0\.0\.1:6379\)"
        ),
        over_ray._started(ray, Workers("10.0.0.1:6379")),
    ):
        pass


@pytest.mark.parametrize("before", [None, "/elsewhere"])
def test_a_ray_that_is_started_here_finds_the_package_and_leaves_no_trace(
    before: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes inherit the path; a `runtime_env` would make the workers that are started ahead useless."""
    if before is None:
        monkeypatch.delenv("PYTHONPATH", raising=False)
    else:
        monkeypatch.setenv("PYTHONPATH", before)
    told: dict[str, Any] = {}
    ray = SimpleNamespace(
        init=lambda **options: told.update(options, path=os.environ["PYTHONPATH"]),
        shutdown=lambda: told.update(ended=True),
    )
    with over_ray._started(ray, Workers()):
        assert os.environ.get("PYTHONPATH") == before
    assert told["path"].split(os.pathsep) == [str(over_ray.PACKAGE.parent), *([before] if before else [])]
    assert told["address"] == "local" and "runtime_env" not in told and told["ended"]

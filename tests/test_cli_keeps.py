"""The command line loses no picture to a reader that goes, a full disk, Ctrl-C or an error; and what it asks before.

Most of it in this process; what only a process of its own shows (signals while it starts, a closed pipe) in one.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import linear_core.__main__ as cli
from linear_core.__main__ import main
from tests.checkpoints import bad_files

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def hears_stop() -> Iterator[None]:
    """As in a terminal; what runs in the background is started deaf to Ctrl-C, and its children too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def asked(small_model: Path, tmp_path: Path) -> list[str]:
    """Three images, one at a time, of a model that takes a moment."""
    out = ["--out", str(tmp_path / "out" / "x.png")]
    return ["generate", str(small_model), "--class", "desert day", "--images", "3", "--at-once", "1", *out]


def pictures(folder: Path) -> dict[str, dict[str, Any]]:
    """The notes of every picture in a folder; each is a whole PNG, and nothing else is there."""
    found = {}
    for path in sorted(folder.iterdir()):
        image = Image.open(path)
        image.load()
        found[path.stem] = json.loads(image.text["linear"])
    return found


def fail_at(monkeypatch: pytest.MonkeyPatch, call: int, error: BaseException, name: str = "_draw_micro_batch") -> None:
    """Let a step of the command raise an error at its n-th call, after it has done its work."""
    before, calls = getattr(cli, name), []

    def step(*args: Any, **more: Any) -> Any:
        done = before(*args, **more)
        calls.append(1)
        if len(calls) == call:
            raise error
        return done

    monkeypatch.setattr(cli, name, step)


# -- an end before the end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the driver"), cli.UserError("not finite.")])
def test_pictures_are_written_as_they_are_done(
    error: BaseException, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished before is there, and what was drawn of the next, marked as unfinished."""
    fail_at(monkeypatch, 2, error)
    if isinstance(error, RuntimeError):
        with pytest.raises(RuntimeError, match="driver"):
            main(asked)
    else:
        assert main(asked) == (130 if isinstance(error, KeyboardInterrupt) else 2)
    found = pictures(tmp_path / "out")
    assert found.keys() == {"x_01", "x_02"}
    assert found["x_02"]["unfinished"] and "unfinished" not in found["x_01"]
    assert (found["x_01"]["seed"], found["x_02"]["seed"]) == (0, 1)


def test_a_picture_is_there_before_the_next_is_begun(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, seen = cli._draw_micro_batch, []

    def step(*args: Any) -> None:
        seen.append(len(list((tmp_path / "out").iterdir())))
        before(*args)

    monkeypatch.setattr(cli, "_draw_micro_batch", step)
    assert main(asked) == 0
    assert seen == [0, 1, 2] and len(pictures(tmp_path / "out")) == 3


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_a_comparison_that_is_stopped_is_kept(
    command: str, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    assert main([command, *asked[1:]]) == 130
    assert pictures(tmp_path / "out")["x"]["unfinished"]
    said = capsys.readouterr()
    assert f"picture: {tmp_path / 'out' / 'x.png'}" in said.out and "stopped." in said.err


def test_stopped_while_the_demo_measures(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_at(monkeypatch, 1, KeyboardInterrupt(), "_shared")
    assert main(["demo", *asked[1:]]) == 130
    assert "unfinished" not in pictures(tmp_path / "out")["x"]
    assert "picture: " in capsys.readouterr().out


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("moment", ["decode", "save"])
def test_stop_while_pictures_are_saved(
    moment: str, times: int, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Ctrl-C waits for what is being saved, however often it is pressed; then no further picture is drawn."""
    before = getattr(cli, moment)

    def step(*args: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return before(*args)

    monkeypatch.setattr(cli, moment, step)
    assert main(asked) == 130
    assert pictures(tmp_path / "out").keys() == {"x_01"}
    said = capfd.readouterr().err
    assert said.count("once what is drawn is saved") == times and said.endswith("stopped.\n")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_stop_twice_while_drawing(
    asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second comes while what was drawn so far is saved."""
    before = cli.Writer.write

    def write(*args: Any) -> None:
        if list((tmp_path / "out").iterdir()):
            signal.raise_signal(signal.SIGINT)
        before(*args)

    monkeypatch.setattr(cli.Writer, "write", write)
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    cli.STOP.asked = True
    assert main(asked) == 130
    assert pictures(tmp_path / "out").keys() == {"x_01", "x_02"}
    assert "Traceback" not in capfd.readouterr().err


def test_every_command_has_a_file_of_its_own(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for command in ("demo", "compare", "generate"):
        assert main([command, str(small_model), "--class", "desert day"]) == 0
    assert pictures(tmp_path / "out").keys() == {"demo", "compare", "small"}


# -- nobody listens, and nowhere to write ------------------------------------------------------------------------------


class Gone(io.StringIO):
    """A pipe whose reader has gone, a full disk: no line gets through."""

    def __init__(self, error: OSError):
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), OSError(28, "No space left on device")])
def test_nobody_reads_what_is_printed(
    error: OSError, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", Gone(error))
    monkeypatch.setattr(sys, "stderr", Gone(error))
    assert main([*asked, "--heatmap"]) == 0
    assert len(pictures(tmp_path / "out")) == 3
    for command in ("models", "plan"):
        assert main([command]) == 0


def test_a_terminal_that_cannot_show_a_letter(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(shown, encoding="ascii"))
    path = tmp_path / "bäume 🌲.png"
    assert main(["generate", str(small_model), "--class", "desert day", "--out", str(path)]) == 0
    assert main(["generate", str(small_model), "--class", "bäume"]) == 2
    sys.stdout.flush()
    assert path.exists() and rb"b\xe4ume \U0001f332.png" in shown.getvalue()
    assert rb"has no class 'b\xe4ume'" in shown.getvalue()


@pytest.fixture
def spare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "spare"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_a_full_disk(
    command: str, asked: list[str], spare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The pictures are kept elsewhere, and the user is told where and why."""
    before = cli.save

    def save(image: Any, path: Path, notes: Any) -> None:
        if spare not in path.parents:
            raise OSError(28, "No space left on device")
        before(image, path, notes)

    monkeypatch.setattr(cli, "save", save)
    assert main([command, *asked[1:]]) == 2
    (folder,) = spare.iterdir()
    found = pictures(folder)
    assert len(found) == (3 if command == "generate" else 1)
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "No space left on device" in said.err and str(folder) in said.err
    assert str(folder) in said.out
    monkeypatch.setattr(cli, "save", lambda *given: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main([command, *asked[1:]]) == 2
    assert "free some space" in capsys.readouterr().err


def test_too_little_memory_to_enlarge(asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = cli.to_image

    def enlarge(picture: Any, size: int | None = None) -> Any:
        if size:
            raise MemoryError
        return before(picture)

    monkeypatch.setattr(cli, "to_image", enlarge)
    assert main(asked) == 0
    assert len(pictures(tmp_path / "out")) == 3


# -- asked before anything is drawn ------------------------------------------------------------------------------------


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str], *words: str) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out
    for word in words:
        assert word in said.err, said.err


@pytest.fixture
def nothing_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it began to draw")

    monkeypatch.setattr(cli, "_draw_micro_batch", never)


@pytest.fixture
def nothing_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **more: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(cli.library, "load_model", never)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device", "tpu"], ["device: 'tpu' is unknown", "cpu"]),
        (["--device", "meta"], ["device: 'meta' is unknown"]),
        (["--device", "cuda:x"], ["device: cuda:x cannot be used"]),
        (["--device", ""], ["device"]),
        (["--device", "cuda:99"], ["device: cuda:99 cannot be used on this computer"]),
        (["--size", "100000"], ["size: 100000", "8192"]),
        (["--size", "-1"], ["size: -1"]),
        (["--images", "0"], ["images: 0"]),
        (["--images", "1000000000"], ["images", "4096"]),
        (["--at-once", "-1"], ["at-once"]),
        (["--seed", "-1"], ["seed: -1"]),
        (["--seed", str(2**64)], ["seed"]),
        (["--text", "a fox"], ["text: landscapes draws classes", "--class"]),
        (["--negative", "rain"], ["negative: landscapes draws classes", "leave --negative out"]),
        (["--text-encoder", "flan"], ["text-encoder: landscapes draws classes"]),
        (["--tokenizer", "vq.pt"], ["tokenizer: the bundled model comes with its own"]),
        (["--pixels", "96x96"], ["size: landscapes does not draw", "only one size"]),
        (["--grid", "²x³"], ["grid: '²x³' is not a grid"]),
        (["--grid", "9" * 5000 + "x2"], ["is not a grid"]),
        (["--pixels", "0x96"], ["pixels: '0x96' is not a size"]),
        (["--class", "9" * 5000], ["class: landscapes has no class"]),
        (["--class", "goldfish"], ["class: landscapes has no class 'goldfish'"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("command", ["generate", "compare", "demo", "plan"])
def test_refused_before_the_model_is_loaded(
    command: str, arguments: list[str], words: list[str], nothing_is_loaded: None, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "plan" and arguments[0] == "--size":
        return
    refused([command, *arguments], capsys, *words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(nothing_is_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("generate", "plan"):
        refused(
            [command, "--device", "cuda"], capsys, "device: cuda cannot be used on this computer", "choose auto or cpu"
        )


@pytest.mark.parametrize("command", ["generate", "compare"])
def test_places_that_cannot_be_written(
    command: str, asked: list[str], tmp_path: Path, nothing_is_drawn: None, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [command, *asked[1:-2]]
    file = tmp_path / "file"
    file.write_text("mine")
    refused([*asked, "--out", str(file / "x.png")], capsys, f"out: {file} is a file", "choose another folder")
    refused([*asked, "--out", str(file / "a" / "b" / "x.png")], capsys, f"out: {file} is a file")
    (tmp_path / "x.png").mkdir()
    (tmp_path / "y_02.png").mkdir()
    if command == "generate":
        refused([*asked, "--out", str(tmp_path / "y.png")], capsys, f"{tmp_path / 'y_02.png'} is a folder")
    refused([*asked, "--out", str(tmp_path / ("n" * 300 + ".png"))], capsys, "out: ", "shorter name")
    refused([*asked, "--out", "/proc/here/x.png"], capsys, "out: /proc/here/x")
    refused([*asked, "--out", str(tmp_path / "x.jpg")], capsys, "end its name in .png")
    assert file.read_text() == "mine"


def test_too_large_a_sheet(nothing_is_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["compare", "--images", "40", "--size", "8192"], capsys, "size: 240 pictures", "lower --size")


def test_options_of_other_models(tmp_path: Path, nothing_is_loaded: None, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that reads texts takes no classes, and one that reads them itself no text encoder."""
    bad_files.write_janus(tmp_path, ".bin")
    janus = ["generate", str(tmp_path / "Janus-Pro-1B")]
    refused([*janus, "--class", "7"], capsys, "class: Janus-Pro-1B draws from texts", "--text instead")
    refused(["plan", janus[1], "--class", "7"], capsys, "class: Janus-Pro-1B draws from texts")
    refused(
        [*janus, "--text", "a fox", "--text-encoder", "t5"], capsys, "text-encoder: Janus-Pro-1B reads texts itself"
    )
    refused(janus, capsys, "add --text")
    refused([*janus, "--text", " "], capsys, "text: it is empty")
    refused(
        [*janus, "--text", "x", "--negative", "y", "--guidance", "1"], capsys, "negative: it has an effect only with"
    )
    assert main(["plan", janus[1], "--text", "a fox"]) == 0
    capsys.readouterr()
    mine = tmp_path / "mine.safetensors"
    bad_files.save_file(bad_files.decoder(text=True), mine, bad_files.NOTES)
    bad_files.write_t5(tmp_path)
    text = ["generate", str(mine), "--text", "a fox"]
    refused(text, capsys, "add --text-encoder")
    told = "flan-t5-xl: gives 16 features per token, but the model takes "
    refused([*text, "--text-encoder", str(tmp_path / "flan-t5-xl")], capsys, told)


def test_a_file_that_may_not_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refused(["generate", str(tmp_path / ("n" * 300))], capsys, "File name too long")


# -- in a process of its own -------------------------------------------------------------------------------------------


def start(arguments: list[str], packages: Path | None = None, **more: Any) -> subprocess.Popen[str]:
    path = {"PYTHONPATH": str(packages)} if packages else {}
    return subprocess.Popen(
        [sys.executable, "-m", "linear_core", *arguments], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env=os.environ | {"OMP_NUM_THREADS": "1"} | path, **more,
    )  # fmt: skip


def wait_for(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not there():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def package(folder: Path, name: str, content: str) -> Path:
    (folder / f"{name}.py").write_text(content)
    return folder


@pytest.mark.parametrize(("module", "told"), [("tqdm", "package tqdm"), ("PIL", "package pillow"), ("torch", "torch")])
def test_a_package_that_is_missing(module: str, told: str, tmp_path: Path) -> None:
    """torch is imported first, so that a stand-in for it fails as any other would, and sooner."""
    packages = package(tmp_path, "torch", f"raise ModuleNotFoundError('No module named {module}', name={module!r})")
    process = start(["models"], packages)
    out, error = process.communicate()
    assert process.returncode == 2 and not out
    assert error.startswith("error: ") and error.count("\n") == 1 and told in error and "pip install" in error


def test_a_fault_of_our_own_is_not_called_a_missing_package(tmp_path: Path) -> None:
    packages = package(tmp_path, "torch", "raise ImportError('gone', name='linear_core.gone')")
    assert "Traceback" in start(["models"], packages).communicate()[1]


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_stop_while_it_starts(tmp_path: Path) -> None:
    here = tmp_path / "here"
    packages = package(tmp_path, "torch", f"import time; open({str(here)!r}, 'w'); time.sleep(60)")
    process = start(["models"], packages)
    wait_for(here.exists, process)
    process.send_signal(signal.SIGINT)
    assert process.communicate() == ("", "stopped.\n") and process.returncode == 130


@pytest.mark.skipif(os.name == "nt", reason="signals of another kind")
def test_stop_pressed_again_and_again(asked: list[str], tmp_path: Path) -> None:
    """For real: no traceback, and every picture that is there is whole."""
    process = start([*asked[:5], "400", *asked[6:]])
    wait_for((tmp_path / "out" / "x_02.png").exists, process)
    while process.poll() is None:
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, error = process.communicate()
    found = pictures(tmp_path / "out")
    assert process.returncode == 130 and "Traceback" not in error and "Exception" not in error
    assert 2 <= len(found) < 400 and len(found) == len(out.splitlines())
    assert error.splitlines()[-1] == "stopped."


@pytest.mark.skipif(os.name == "nt", reason="pipes of another kind")
def test_a_reader_that_takes_one_line(asked: list[str], tmp_path: Path) -> None:
    """`generate … | head -1`, and one that takes none."""
    process = start(asked)
    assert process.stdout
    process.stdout.close()
    error = process.stderr.read() if process.stderr else ""
    assert process.wait() == 0 and "Traceback" not in error and "Exception" not in error
    assert len(pictures(tmp_path / "out")) == 3

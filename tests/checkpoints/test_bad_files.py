"""Files from strangers: whatever is wrong with one is told in a sentence, at once, and nothing in it is run.

The cases are in tests/checkpoints/bad_files.py. `python -m pytest tests/checkpoints/test_bad_files.py` runs them all.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from linear_core.checkpoints.library import find_checkpoints
from linear_core.checkpoints.untrusted import ALLOWED_GLOBALS, inside
from linear_core.checkpoints.weights import read_weights
from linear_core.errors import UserError
from tests.checkpoints import bad_files
from tests.checkpoints.bad_files import CANARY, CASES, LAYOUTS, Case

pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

SECONDS = 10  # of the processor, to refuse a file; nearly all take hundredths of one
BYTES = 64 * 2**20  # more memory than before, at most, while one is refused
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """The good files. Each was loaded once: what a library takes for itself the first time is not a file's doing."""
    with bad_files.good(tmp_path_factory.mktemp("good")) as found:
        yield found


def memory(name: str) -> int:
    """VmRSS: bytes of memory that the process has; VmHWM: the most it had since `forget_peak`."""
    return int(re.search(rf"{name}:\s+(\d+) kB", STATUS.read_text())[1]) * 1024


def forget_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:  # another system than Linux
        return False
    return True


def refused(load: Callable[[Path], object], path: Path) -> str:
    """What the user is told, in time and without much memory."""
    measured = forget_peak()
    before, started = memory("VmRSS") if measured else 0, time.process_time()
    with pytest.raises(UserError) as caught:
        load(path)
    assert time.process_time() - started < SECONDS
    assert not measured or memory("VmHWM") - before < BYTES
    told = str(caught.value)
    assert told.isprintable() and len(told) <= 1001, "one line, and no more than one reads"
    return told


def test_the_good_files_load(made: dict[str, Path]) -> None:
    """Or else no refusal below would mean anything. `made` did it."""
    assert made.keys() == LAYOUTS.keys()


def test_there_are_more_than_a_thousand_cases() -> None:
    """As many as the pages say; each has a name of its own, and each layout is damaged in many ways."""
    for page in ("README.md", "SECURITY.md"):
        assert f"{len(CASES)} bad files" in (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert len(CASES) == len(list(bad_files.cases())) == 1201
    assert all(sum(case.layout == layout for case in CASES.values()) >= 60 for layout in LAYOUTS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_refused(case: Case, made: dict[str, Path], tmp_path: Path) -> None:
    if os.name == "nt" and case.what.startswith("a link"):
        pytest.skip("Windows lets not everybody make symbolic links")
    path = bad_files.make(case, made[case.layout], tmp_path)
    told = refused(LAYOUTS[case.layout].load, path)
    assert re.search(case.reason, told), told
    assert re.search(case.told, told), told
    assert "weights_only" not in told, "torch's advice to read the file unprotected"
    assert not (tmp_path / CANARY).exists(), "something was run"
    shutil.rmtree(tmp_path)


# -- what stays allowed ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not everybody make symbolic links")
def test_links_to_another_disk_work(made: dict[str, Path], tmp_path: Path) -> None:
    """A folder that is a link, and one whose files all are, as the hub's cache keeps them."""
    for layout in ("janus safetensors", "t5"):
        there, load = made[layout] / LAYOUTS[layout].model, LAYOUTS[layout].load
        (tmp_path / layout / "snapshot").mkdir(parents=True)
        (tmp_path / layout / "linked").symlink_to(there)
        for file in there.iterdir():
            (tmp_path / layout / "snapshot" / file.name).symlink_to(file)
        load(tmp_path / layout / "linked")
        load(tmp_path / layout / "snapshot")


@pytest.mark.skipif(os.name == "nt", reason="Windows lets not everybody make symbolic links")
def test_a_folder_with_bad_files_is_still_listed(made: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "gone.pt").symlink_to("nowhere.pt")
    (tmp_path / "again").symlink_to(tmp_path)
    shutil.copytree(made["janus bin"], tmp_path / "models")
    next(tmp_path.rglob("*.index.json")).write_text("[")
    assert [path.name for path in find_checkpoints([tmp_path])] == ["gone.pt", "Janus-Pro-1B"]


def test_what_files_are_known_to_carry_besides_is_left(made: dict[str, Path], tmp_path: Path) -> None:
    """A rotary table, what reads pictures, a counter of training: of any shape and kind, even broken."""
    nan = torch.full((3,), float("nan"))
    path = tmp_path / "mine.safetensors"
    path.write_bytes(save(bad_files.decoder() | {"freqs_cis": nan}, bad_files.NOTES))
    torch.save(
        {"model": bad_files.vq() | {"quantize.codebook_used": nan.int(), "loss.x": nan}}, tmp_path / "vq_ds16_c2i.pt"
    )
    bad_files.load_from(path)
    shutil.copytree(made["janus bin"], tmp_path / "janus")
    shard = sorted(tmp_path.glob("janus/*/*.bin"))[0]
    torch.save(torch.load(shard) | {"vision_model.more": nan, "language_model.lm_head.bias": nan}, shard)
    bad_files.load_from(tmp_path / "janus" / "Janus-Pro-1B")


@pytest.mark.parametrize("name", ["a.pt", "below/a.pt", "below\\a.pt", "..a.pt", "a..pt", "ä.pt", "~a.pt", "..."])
def test_names_that_stay(name: str) -> None:
    assert inside(Path("models"), name) == Path("models", name)


def test_what_training_saves_is_read(tmp_path: Path) -> None:
    """A pickle may name whatever torch writes of tensors, and what LlamaGen's script adds."""
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool,
             torch.float8_e4m3fn, torch.complex64]  # fmt: skip
    tensors = {str(kind): torch.zeros(3).to(kind) for kind in kinds}
    carrying = torch.ones(2)
    carrying.note = "makes torch name torch.Tensor"
    content = {"model": tensors | {"p": torch.nn.Parameter(torch.ones(2)), "t": torch.ones(2, 3).T, "c": carrying}}
    extra = bad_files.official.training({}) | {"module": torch.nn.Linear(2, 2).state_dict(), "dtype": torch.bfloat16,
                                               "size": torch.Size([1]), "device": torch.device("cpu")}  # fmt: skip
    torch.save(extra | content, tmp_path / "x.pt")
    read = read_weights(tmp_path / "x.pt").shapes
    assert content["model"].keys() == {key.removeprefix("model/") for key in read if key.startswith("model/")}
    assert not ALLOWED_GLOBALS.fullmatch("torch Tensors") and not ALLOWED_GLOBALS.fullmatch("torch float32x.y")

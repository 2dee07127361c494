"""bench/gpu.py without a GPU: every part in tiny sizes, and what one that fails, hangs or dies does to the others."""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch

from bench import gpu
from bench.gpu import PARTS, Ask, NotHere, supervise
from bench.gpu_parts import common
from bench.gpu_parts.correctness import outcome_of
from bench.gpu_parts.pictures import agreement
from bench.gpu_table import bars, table
from linear_core.cache.attention import SWITCH
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import llamagen

LACKING = ("PIL", "hypothesis", "aiohttp", "requests", "xdist", "pytest_cov", "matplotlib", "sentencepiece", "tqdm")


def asked() -> Ask:
    return Ask("cpu", True, time.monotonic() + 600)


@pytest.mark.parametrize("name", [part.name for part in PARTS if part.here and part.name != "correctness"])
def test_every_part_runs_dry(name, monkeypatch):
    """Each of its measurements gives numbers, none fails."""
    monkeypatch.setenv(SWITCH, "sdpa")  # which parts change
    try:
        found = list(importlib.import_module(f"bench.gpu_parts.{name}").run(asked()))
    except NotHere as missing:
        pytest.skip(str(missing))
    assert found and not [result for result in found if {"failed", "left_out"} & set(result)]
    numbers = [n for result in found for n in result.values() if isinstance(n, (int, float, list)) and n]
    assert len(numbers) >= len(found) - 1
    json.dumps(found)


def test_the_gpu_tests_are_found_where_little_is_installed(monkeypatch, tmp_path):
    """With PyTorch, transformers and pytest alone; `pytest -m gpu` reads only the files that have such tests."""
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({LACKING!r}))\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *os.environ.get("PYTHONPATH", "").split()]))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    (told,) = importlib.import_module("bench.gpu_parts.correctness").run(asked())
    assert told["complete"] and told["collected"] > 400, told["end"]


def test_what_pytest_says_is_read():
    for line, told in {
        "tests/a.py::test_b[c d] PASSED                      [ 50%]\n": ("tests/a.py::test_b[c d]", "PASSED"),
        "[gw1] [ 12%] FAILED tests/a.py::test_b[c d] \n": ("tests/a.py::test_b[c d]", "FAILED"),
        "FAILED tests/a.py::test_b - assert 1 == 2\n": ("", ""),
        "SKIPPED [12] tests/a.py:3: needs a GPU\n": ("", ""),
        "tests/a.py::test_b \n": ("", ""),
    }.items():
        assert outcome_of(line) == told


# -- one part does not cost another ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "ended", "says"),
    [
        ("print(3)", "", ""),
        ("raise ValueError('a cable was pulled')", "exit status 1", "a cable was pulled"),
        ("import time; time.sleep(60)", "out of time", ""),
        ("import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(60)", "out of time",
         "Timeout"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "signal 11", ""),
    ],
)  # fmt: skip
def test_a_process_ends_in_time_and_says_how(code, ended, says, tmp_path):
    if "signal" in ended and os.name != "posix":
        pytest.skip("signals are POSIX's")
    (tmp_path / "log").write_text("an older error\n")
    told = supervise([sys.executable, "-c", code], 2.0, tmp_path / "log")
    assert told[0] == ended and says in told[1] and "older" not in told[1]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="reads /proc")
def test_what_a_process_started_ends_with_it(tmp_path):
    code = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)'])\n"
        f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid))\n"
    )
    supervise([sys.executable, "-c", code], 20, tmp_path / "log")
    state = Path("/proc") / (tmp_path / "pid").read_text() / "stat"
    for _ in range(100):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it still runs")


def test_a_measurement_that_fails_costs_itself_alone():
    def fails():
        raise torch.OutOfMemoryError("out of memory")

    works = [({"n": 1}, fails), ({"n": 2}, lambda: {"seconds": 3.0})]
    first, second = common.attempts(asked(), works)
    assert first == {"n": 1, "failed": "OutOfMemoryError: out of memory"} and second == {"n": 2, "seconds": 3.0}
    assert list(common.attempts(Ask("cpu", True, 0.0), works)) == [{"left_out": [{"n": 1}, {"n": 2}]}]

    def breaks():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="CUDA error"):  # nothing after it could be trusted
        list(common.attempts(asked(), [({}, breaks), *works]))


def test_the_command_goes_through_the_parts(monkeypatch, tmp_path, capfd):
    """In processes of their own, one that works and one that does not exist yet."""
    monkeypatch.setattr(gpu, "PARTS", tuple(part for part in PARTS if part.name in ("card", "scales")))
    assert gpu.main(["--dry", "--out", str(tmp_path), "--commit", "abc"]) == 0
    document = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    card, scales = document["parts"]
    assert (card["state"], scales["state"]) == ("done", "not in this version") and card["seconds"] < 120
    assert [result["what"] for result in card["results"]][:2] == ["card", "copy"]
    assert document["circumstances"]["commit"] == "abc" and document["dry"]
    assert "scales (not in this version)" in capfd.readouterr().out
    assert gpu.main(["--table", str(tmp_path / "gpu.json")]) == 0
    assert "A dry run" in capfd.readouterr().out


def test_time_that_is_left_over_goes_to_the_next(monkeypatch, tmp_path):
    """A part that hangs has had its own time and what others left, no more; it is named, and the exit status is 1."""
    given = []

    def supervise(command, seconds, log):
        given.append(seconds - gpu.MARGIN)
        return ("out of time", "File x, line 3") if "batch" in command else ("", "")

    monkeypatch.setattr(gpu, "supervise", supervise)
    monkeypatch.setattr(gpu, "PARTS", tuple(gpu.Part(name, n, "") for name, n in (("card", 10), ("batch", 20))))
    assert gpu.main(["--minutes", "4", "--out", str(tmp_path)]) == 1
    assert given == [pytest.approx(5, abs=0.2), pytest.approx(15, abs=0.4)]
    card, batch = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))["parts"]
    assert (card["state"], batch["state"], batch["error"]) == ("done", "out of time", "File x, line 3")


def test_lines_that_were_cut_off_are_left_out(tmp_path):
    report = gpu.Report(tmp_path, {})
    report.lines.write_text('{"part": "card", "a": 1}\n{"part": "card", "b"', encoding="utf-8")
    report.parts.append({"name": "card", "state": "signal 9"})
    assert report.document["parts"][0]["results"] == [{"a": 1}]


def test_the_parts_fit_the_time_and_have_their_files():
    assert sum(part.seconds for part in PARTS) <= 60 * gpu.MINUTES
    files = {path.stem for path in (Path(gpu.__file__).parent / "gpu_parts").glob("*.py")} - {"common"}
    assert files == {part.name for part in PARTS if part.here}
    assert all(part.seconds for part in PARTS if part.here)


# -- what it says ------------------------------------------------------------------------------------------------------


def drawn(**more) -> dict:
    told = {"what": "drawing", "model": "LlamaGen-XL", "images": 256, "plan": "line 4/24", "step": "graph"}
    return told | {"attention": "sdpa", "step_ms": {"median": 9.0}, "images_per_second": 30.0, "peak_gb": 12.0} | more


def test_bars_are_held_against_what_was_measured():
    batch = [
        drawn(of_copy_bandwidth=0.6, line_end_share=0.04, peak_over_plan=1.02),
        drawn(what="whole images", whole_images_per_second=41.0),
        drawn(plan="full", images_per_second=5.0, peak_over_plan=0.95),
        {"plan": "line 4/24", "failed": "OutOfMemoryError"},
    ]
    one = [drawn(images=1, of_weight_bound=share, attention=how) for share, how in ((0.5, "sdpa"), (0.7, "kernel"))]
    parts = {"batch": batch, "latency": one, "correctness": [{"what": "tests", "failed_tests": 1}]}
    parts["published"] = [{"peer": "LlamaGen", "images": 256, "images_per_second": 4.0}]
    document = {"circumstances": {"device": "H100"}, "parts": [{"name": n, "results": r, "state": "done"}
                                                              for n, r in parts.items()]}  # fmt: skip
    told = {bar["bar"].split(":")[-1].strip(): (bar["found"], bar["met"]) for bar in bars(document)}
    assert told["images per second"] == (41.0, True) and told["times the published loop"] == (10.25, True)
    assert told["share of the weight-bandwidth bound"] == (0.7, True)
    assert told["GPU tests that failed, at most"] == (1, False)
    assert told["peak memory off the plan, at most"] == (pytest.approx(0.05), False)
    shown = table(document)
    assert (
        "| LlamaGen-XL | 256 | line 4/24 | graph | 9.00 | 30.00 | 12.0 | 7.5 |" in shown and "Not complete" not in shown
    )


def test_other_weights_are_seen_in_the_codes():
    """A decoder agrees with itself; with one that differs a little, it disagrees where codes were nearly tied."""
    sample, plan = SamplePlan(3, guidance=2.0), CachePlan("line", 2, 1, 1)
    model, near, other = llamagen(6, 5), llamagen(6, 5), llamagen(6, 5, seed=1)
    near.output.weight.add_(0.02 * torch.randn(near.output.weight.shape, generator=torch.Generator().manual_seed(0)))
    codes = torch.arange(60).view(2, 6, 5) % model.codes
    same, close, far = (agreement(model, m, class_prompt([1, 3]), codes, plan, sample) for m in (model, near, other))
    assert same["forced_codes"] == 60 and (same["forced_codes_that_differ"], same["largest_margin"]) == (0, 0)
    assert 0 < close["forced_codes_that_differ"] < 10 and 0 < close["largest_margin"] < 0.5
    assert far["forced_codes_that_differ"] > 30 and far["largest_margin"] > 1

"""`pytest -m gpu`, in a process of its own, with a process for every few cores where pytest-xdist is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from bench.gpu import Ask, tail

ROOT = Path(__file__).resolve().parents[2]
WORKERS = 6  # each has a CUDA context, and compiles kernels for itself
OUTCOMES = r"(PASSED|FAILED|SKIPPED|ERROR)"
ALONE, SHARED = re.compile(rf"^(\S+::.*) {OUTCOMES} "), re.compile(rf"^\[gw\d+\].*?\] {OUTCOMES} (\S+::.*)$")


def run(ask: Ask) -> Iterator[dict]:
    if find_spec("pytest") is None:
        yield {"what": "tests", "failed": "pytest is not installed"}
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", "-vv", "--color=no"]
    command += ["--tb=short", "--durations=8", "--continue-on-collection-errors", "-o", "faulthandler_timeout=60"]
    if ask.dry:
        command += ["--collect-only"]  # without a GPU each would only say that it is skipped
    elif find_spec("xdist"):
        command += ["-n", str(max(1, min(WORKERS, (os.cpu_count() or 1) // 2)))]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    # Ends it in time to report what there was by then; the loop below then meets the end of its output.
    clock = threading.Timer(max(ask.left, 1), process.kill)
    clock.start()
    counted: Counter[str] = Counter()
    output: list[str] = []
    assert process.stdout
    for line in process.stdout:
        output.append(line)
        name, outcome = outcome_of(line)
        counted[outcome] += 1
        if outcome in ("FAILED", "ERROR"):
            yield {"what": "test", "outcome": outcome, "test": name}
    clock.cancel()
    code, text = process.wait(), "".join(output)
    print(text, file=sys.stderr)
    collected = re.search(r"(\d+)(?:/\d+)? tests? collected", text)
    yield {
        "what": "tests",
        "passed": counted["PASSED"],
        "failed_tests": counted["FAILED"] + counted["ERROR"],
        "skipped": counted["SKIPPED"],
        "collected": int(collected[1]) if collected else None,
        "complete": code in (0, 1),
        "slowest": re.findall(r"^([\d.]+s call +.*\S)", text, re.MULTILINE),
        "end": "" if code == 0 else tail(text, 40),
    }


def outcome_of(line: str) -> tuple[str, str]:
    """The test that a line of pytest's output is about, and how it ended; empty for other lines."""
    if found := ALONE.match(line):
        return found[1], found[2]
    found = SHARED.match(line.rstrip())
    return (found[2], found[1]) if found else ("", "")

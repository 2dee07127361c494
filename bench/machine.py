"""The machine that a benchmark runs on: circumstances, copy bandwidth, memory of this process, output files."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch


def check_out(path: Path, parser: argparse.ArgumentParser, folder: bool = False) -> None:
    """Exit before any work is done if `path`, a file or a folder, cannot be written afterwards."""
    parent = path if folder else path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: the folder {parent} cannot be made ({error.strerror}).")
    if not folder and path.is_dir():
        parser.error(f"--out: {path} is a folder; give a file name.")
    if not os.access(path if path.exists() else parent, os.W_OK):
        parser.error(f"--out: {path} cannot be written.")


@contextlib.contextmanager
def in_any_case(write: Callable[[dict[str, str]], None]) -> Iterator[None]:
    """Call `write` at the end, even if the work fails or is interrupted; its argument then says why it stopped."""
    stopped = {}
    try:
        yield
    except BaseException as error:
        stopped = {"stopped": f"{type(error).__name__}: {error}".removesuffix(": ")}
        raise
    finally:
        write(stopped)


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(device: str, work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def load() -> list[float] | None:
    """Load average over 1, 5 and 15 minutes; None if the system does not tell."""
    return [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None


def circumstances(device: str) -> dict[str, Any]:
    """What a reader needs to know to judge a measurement."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "default"),
        "load": load(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The checkout's commit, with a + if files differ from it."""
    try:
        output = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=Path(__file__).parent, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return output.stdout.strip()


def copy_bandwidth(device: str, size: int = 2**28, repeat: int = 7) -> float:
    """Bytes read and written per second by a large copy, the best of several."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(repeat):
        synchronize(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * source.nbytes / best


class Peak:
    """Peak memory of this process, or of the GPU, since this object was made; NaN if the system does not tell."""

    def __init__(self, device: str):
        self.device = device
        if device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the peak to the current size

    @property
    def bytes(self) -> float:
        if self.device.startswith("cuda"):
            return torch.cuda.max_memory_allocated()
        return resident("VmHWM")


def resident(field: str = "VmRSS") -> float:
    """Memory of this process as Linux reports it, in bytes; NaN elsewhere."""
    if not sys.platform.startswith("linux"):
        return float("nan")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return float("nan")


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and quartiles in milliseconds."""
    ms = sorted(1e3 * s for s in seconds)
    low, high = (statistics.quantiles(ms, n=4)[i] for i in (0, 2)) if len(ms) > 1 else (ms[0], ms[0])
    return {"median": round(statistics.median(ms), 3), "low": round(low, 3), "high": round(high, 3), "n": len(ms)}

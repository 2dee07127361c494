"""Threads for computing on the CPU: no more than there are idle cores.

PyTorch takes a thread for every core and waits for all of them in every operation. A token takes thousands of small
operations, so one core that is busy elsewhere holds all the others up: with two threads beside another program on two
cores a step has taken 3.2 s in place of 0.06 s.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")
SECONDS = 0.1  # that the cores are watched for
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # who sets one of these has decided


def idle_cores(seconds: float = SECONDS) -> float | None:
    """How many cores of the machine are idle just now; None where the system does not tell without help (Linux does).

    The load average is no substitute: for a minute it still counts what has just ended.
    """
    try:
        before = _ticks()
        time.sleep(seconds)
        spent = [after - first for after, first in zip(_ticks(), before, strict=True)]
        idle = spent[3] + spent[4]  # idle, and waiting for a disk
        return (os.cpu_count() or 1) * idle / sum(spent)
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return None


def _ticks() -> list[int]:
    """Time that all cores have spent since the machine started, by kind."""
    return [int(number) for number in STAT.read_text().split("\n", 1)[0].split()[1:9]]


def limit_threads() -> str:
    """Leave the cores that other programs use to them. Returns what to tell the user; empty: nothing was changed.

    The number of threads does not change what is drawn.
    """
    if any(name in os.environ for name in CHOSEN) or (idle := idle_cores()) is None:
        return ""
    threads = torch.get_num_threads()
    room = max(1, round(idle))
    if room >= threads:
        return ""
    torch.set_num_threads(room)
    return (
        f"other programs keep {(os.cpu_count() or 1) - idle:.1f} of {os.cpu_count()} cores busy, so this computes on "
        f"{room} instead of {threads} (set OMP_NUM_THREADS to decide yourself)"
    )

"""CPU threads: no more than there are idle cores.

PyTorch uses a thread per core and waits for all of them in every operation. A token takes thousands of small
operations, so a single core that is busy elsewhere delays all of them: with two threads next to another program on two
cores, a step was seen to take 3.2 s instead of 0.06 s.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

STAT = Path("/proc/stat")
SECONDS = 0.1  # for which the cores are watched
CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # if one of these is set, the user has decided


def idle_cores(seconds: float = SECONDS) -> float | None:
    """How many cores of the machine are idle right now; None if the system does not tell (Linux does).

    The load average is no substitute: for a minute it still counts processes that have just ended.
    """
    try:
        before = _ticks()
        time.sleep(seconds)
        spent = [after - first for after, first in zip(_ticks(), before, strict=True)]
        idle = spent[3] + spent[4]  # idle, and waiting for I/O
        return (os.cpu_count() or 1) * idle / sum(spent)
    except (OSError, ValueError, IndexError, ZeroDivisionError):
        return None


def _ticks() -> list[int]:
    """Time that all cores have spent since the machine started, by state."""
    return [int(number) for number in STAT.read_text().split("\n", 1)[0].split()[1:9]]


def limit_threads() -> str:
    """Use no more threads than there are idle cores. Returns a message for the user; empty: nothing was changed.

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

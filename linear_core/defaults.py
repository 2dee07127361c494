"""What is on by default on which GPU: only what was measured to win there and draws the same codes. No torch.

`python bench/gpu.py` measures; a line in WINS names its results. Whatever this says, users decide: `--step` and
LINEAR_STEP for graphs, LINEAR_ATTENTION for the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Win:
    """A measurement that something wins.

    what       "graph": token and line end as CUDA graphs. "kernel": our attention for one query
    gpu        how the names of the GPUs begin for which it holds, as PyTorch gives them
    sequences  sizes of a batch for which it holds, from and to; with guidance an image is two sequences
    evidence   file in bench/results, and the measured commit
    """

    what: str
    gpu: str
    sequences: tuple[int, int]
    evidence: str


# No GPU has been measured yet, so nothing is on by default.
WINS: tuple[Win, ...] = ()


def wins(what: str, gpu: str, sequences: int) -> bool:
    """Whether `what` was measured to win on this GPU for a batch of so many sequences. `gpu` empty: there is none."""
    return any(
        win.what == what and gpu.startswith(win.gpu) and win.sequences[0] <= sequences <= win.sequences[1]
        for win in WINS
        if gpu
    )

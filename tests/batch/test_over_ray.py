"""`batch --ray`, with a real Ray on this machine: only where it is installed."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed, so nothing was drawn over it (pip install 'ray[data]')")

from linear_core.batch.draw import Job, batches_of, draw_here, pictures_of
from linear_core.batch.folder import Drawn
from linear_core.batch.over_ray import Workers, draw_over_ray
from linear_core.batch.table import Row
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, read_info
from linear_core.errors import UserError
from linear_core.plan import PRESETS


@pytest.fixture
def job(small_model: Path) -> Job:
    sample = read_info(small_model).defaults
    return Job(
        ModelFiles(small_model, find_tokenizer(small_model)), PRESETS["Smallest"], sample, device="cpu", codes=True
    )


def test_a_worker_that_is_killed_is_started_again_and_nothing_is_lost(job: Job) -> None:
    """All pictures, none twice, those of this process; the worker that drew the first batch is killed after it."""
    from bench.batch import workers_of

    batches = batches_of(pictures_of([Row(i + 1, "desert day") for i in range(24)], job), 2, job)
    here = {
        d.metadata["file_name"]: d for batch in draw_here(job, batches, print) for d in batch if isinstance(d, Drawn)
    }
    there, killed = [], 0
    for done in draw_over_ray(job, batches, Workers(count=2), print):
        there += [d for d in done if isinstance(d, Drawn)]
        if not killed:
            os.kill(killed := workers_of(os.getpid())[0], signal.SIGKILL)
    assert killed and len(there) == len(here) == 24
    assert {d.metadata["file_name"]: d for d in there} == here


def test_what_is_wrong_with_all_pictures_ends_the_run(job: Job, tmp_path: Path) -> None:
    from dataclasses import replace

    gone = replace(job, files=ModelFiles(tmp_path / "gone.pt", tmp_path / "gone.pt"))
    batches = batches_of(pictures_of([Row(1, "desert day")], job), 2, job)
    with pytest.raises(UserError, match=r"gone\.pt: there is no such file"):
        list(draw_over_ray(gone, batches, Workers(count=1), print))

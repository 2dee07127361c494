"""No more threads than there are idle cores, and the same pictures with any number of them."""

from __future__ import annotations

import os

import pytest
import torch

from linear_core.__main__ import main
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model
from linear_core.loop import threads
from linear_core.loop.generate import generate
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt


@pytest.fixture
def four(monkeypatch, tmp_path):
    """A machine of four cores on which nobody has chosen a number of threads; what its system tells is the test's."""
    for name in threads.CHOSEN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(threads, "STAT", tmp_path / "stat")
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield lambda *ticks: tell(monkeypatch, tmp_path / "stat", *ticks)
    torch.set_num_threads(before)


def tell(monkeypatch, stat, busy: int, idle: int, waiting: int = 0) -> None:
    """Let the cores be busy and idle for so many ticks while they are watched."""

    def write(user: int, free: int, disk: int) -> None:
        stat.write_text(f"cpu  {user} 7 90 {free} {disk} 0 5 1 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n")

    write(1000, 5000, 60)
    monkeypatch.setattr(threads.time, "sleep", lambda seconds: write(1000 + busy, 5000 + idle, 60 + waiting))


@pytest.mark.parametrize(
    ("ticks", "left"), [((0, 40), 4), ((2, 38), 4), ((20, 20), 2), ((20, 5, 15), 2), ((40, 0), 1), ((0, 0), 4)]
)
def test_as_many_threads_as_there_are_idle_cores(four, ticks, left):
    four(*ticks)
    note = threads.limit_threads()
    assert torch.get_num_threads() == left and bool(note) == (left < 4)
    if note:
        assert f"on {left} instead of 4" in note and f"{4 * ticks[0] / 40:.1f} of 4 cores" in note


def test_who_has_chosen_a_number_keeps_it(four, monkeypatch):
    four(40, 0)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.limit_threads() == "" and torch.get_num_threads() == 4


@pytest.mark.parametrize("text", [None, "", "cpu  none of this\n"])
def test_a_system_that_does_not_tell_changes_nothing(four, text):
    if text is not None:
        threads.STAT.write_text(text)
    assert threads.limit_threads() == "" and torch.get_num_threads() == 4


def test_the_command_line_says_so(four, small_model, tmp_path, capsys):
    four(30, 10)
    out = tmp_path / "a.png"
    assert main(["generate", str(small_model), "--device", "cpu", "--class", "desert day", "--out", str(out)]) == 0
    assert "note: other programs keep 3.0 of 4 cores busy" in capsys.readouterr().err


def test_any_number_of_threads_draws_the_same_to_the_bit(small_model):
    """Float32, where products could be added up in another order; wide enough for threads to share the work."""
    found, before = [], torch.get_num_threads()
    model = load_model(ModelFiles(small_model, find_tokenizer(small_model))).decoder
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            logits: list[torch.Tensor] = []

            def step(*given, logits=logits):
                logits.append(model.step(*given))
                return logits[-1]

            lines = generate(
                model, class_prompt([1, 3, 2, 5, 4, 7, 6, 0]), CachePlan("fold", 2, 2, 1), SamplePlan(5), step=step
            )
            found.append((torch.cat([line.tokens for line in lines]), torch.stack(logits)))
    finally:
        torch.set_num_threads(before)
    for codes, logits in found[1:]:
        assert torch.equal(codes, found[0][0]) and torch.equal(logits, found[0][1])

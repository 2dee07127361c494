"""Choosing among several pictures: the scores are those of the core, and the figures those of what they choose."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from bench import best_of
from linear_core.loop.forced import log_likelihood, prompt_match
from linear_core.loop.generate import Run, generate
from linear_core.plan import CachePlan, SamplePlan
from tests.loop.test_replay import setting


def test_scores_while_drawing_are_those_of_the_core():
    decoder, prompt = setting("class")
    plan, sample = CachePlan("fold", 2, 2, 1), SamplePlan(guidance=3.0)
    scored, run = best_of.Scored(decoder, sample, prompt.rows), Run()
    for line in generate(scored, prompt, plan, sample):
        run.add(line)
    scored.count(run.tokens[:, -1, -1])
    theirs = log_likelihood(decoder, prompt, run.tokens, plan, sample), prompt_match(decoder, prompt, run.tokens, plan)
    for ours, each in zip((scored.likelihood, scored.match), theirs, strict=True):
        torch.testing.assert_close(ours.float(), each.sum((1, 2)).float())


def made(count: int) -> tuple[list[dict], np.ndarray]:
    """Groups of which one picture in four shows its class and has features like the real ones; `match` knows it."""
    source = np.random.default_rng(0)
    groups = []
    for _ in range(count):
        right = np.zeros(best_of.GROUP, int)
        right[source.permutation(best_of.GROUP)[:4]] = 1
        features = source.normal(size=(best_of.GROUP, 4)) + 3 * (1 - right[:, None])
        noise = source.random(best_of.GROUP)
        groups.append(
            {
                "features": best_of.packed(features),
                "right": right.tolist(),
                "likelihood": noise.tolist(),
                "match": (right + noise / 2).tolist(),
            }
        )
    return groups, source.normal(size=(400, 4))


def test_figures_are_of_what_is_chosen_and_only_of_as_many_groups_of_each_class():
    groups, real = made(42)
    rows = {(row["score"], row["of"]): row for row in best_of.figures(groups, real, 4)}
    assert set(rows) == {("any", 1), *((score, of) for score in best_of.SCORES for of in (4, 16))}
    assert {row["groups"] for row in rows.values()} == {40}
    assert [rows["match", of]["pictures"] for of in (4, 16)] == [160, 40] and rows["any", 1]["pictures"] == 640
    assert rows["any", 1]["accuracy"] == 0.25 and rows["match", 16]["accuracy"] == 1
    quarters = np.array([group["right"] for group in groups[:40]]).reshape(40, 4, 4)
    assert rows["match", 4]["accuracy"] == quarters.any(2).mean(), "one of each quarter"
    assert rows["match", 16]["frechet"] < rows["match", 4]["frechet"] < rows["any", 1]["frechet"]
    assert rows["match", 16]["frechet_gain_ci"][1] < 0 < rows["match", 16]["accuracy_gain_ci"][0]
    low, high = rows["likelihood", 16]["accuracy_gain_ci"]
    assert low < 0 < high, "a score that knows nothing gains nothing"


def test_a_run_goes_on_where_it_stopped_and_not_under_other_settings(tmp_path, monkeypatch, capsys):
    out = tmp_path / "best.json"
    groups, _ = made(30)

    class Pool:
        """In place of processes, which would load the model."""

        def __init__(self, *how):
            pass

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *how: None  # noqa: E731

        def submit(self, work, number):
            return type("Done", (), {"result": lambda self: groups[number : number + best_of.TOGETHER]})()

    monkeypatch.setattr(best_of, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(best_of.Lab, "__init__", lambda self: None)
    monkeypatch.setattr(best_of.Lab, "real", lambda self: np.random.default_rng(1).normal(size=(480, 4)))
    run = ["best_of", "--out", str(out), "--groups"]
    monkeypatch.setattr(sys, "argv", [*run, "6"])
    assert best_of.main() == 0 and "no figures yet" in capsys.readouterr().out
    assert len(json.loads(out.read_text())["groups"]) == 6
    monkeypatch.setattr(sys, "argv", [*run, "27"])
    assert best_of.main() == 0
    data = json.loads(out.read_text())
    assert data["groups"] == groups[:27] and [r["from"] for r in data["runs"]] == [0, 6]
    assert {row["groups"] for row in data["figures"]} == {24}
    assert "| match | 16 | 24 |" in capsys.readouterr().out
    monkeypatch.setitem(best_of.SETTINGS, "seed", 1)
    with pytest.raises(SystemExit):
        best_of.main()
    assert "other settings" in capsys.readouterr().err

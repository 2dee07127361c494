"""The quality lab: teacher-forced figures are those of decoding, intervals are right, a run can be taken up again."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bench import quality, weights
from bench.forced import FULL, drift, forced_logits, reference
from bench.report import bars
from bench.rows import Field
from bench.uncertainty import frechet, frechet_excess, half_width, ratio_interval, share_interval
from linear_core.checkpoints.library import ModelFiles
from linear_core.plan import CachePlan, SamplePlan
from tests.loop.test_replay import setting
from tests.models import official
from tests.tiny import CODES, decode, janus, llamagen, words

PLANS = [
    CachePlan("line", 2, 2, 1),
    CachePlan("random", 2, 2, 1, "lazy"),
    CachePlan("h2o", 3, 2, 1, "fold"),
    CachePlan("fold", 2, 2, 1),
    CachePlan("adakv", 2, 2, 1),
    FULL,
]


def drawn(model: str, plan: CachePlan):
    """A picture drawn token by token, without guidance, and everything that was seen on the way."""
    decoder, prompt = (janus(6, 4, dtype=torch.float64), words([4, 2])) if model == "janus" else setting(model)
    return decoder, prompt, decode(decoder, prompt, plan, SamplePlan(seed=3, guidance=1.0))


@pytest.mark.parametrize("model", ["class", "text", "toy eol", "janus"])
@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.policy} {plan.release}")
def test_forced_logits_are_those_of_decoding(model, plan):
    """A line at a time gives, for the codes that were drawn, the logits that they were drawn from."""
    decoder, prompt, run = drawn(model, plan)
    grid = run.cache.grid
    codes = [row * grid.stride + column for row in range(grid.rows) for column in range(grid.cols)]  # no ends of lines
    expected = torch.stack([run.logits[number] for number in codes], 1)
    torch.testing.assert_close(forced_logits(decoder, prompt, run.tokens, plan), expected)


def test_nothing_drifts_from_the_full_cache_itself():
    decoder, prompt, run = drawn("class", FULL)
    full = reference(decoder, prompt, run.tokens)
    for plan in (FULL, CachePlan("line", 7), CachePlan("fold", 40)):
        found = drift(decoder, prompt, run.tokens, plan, full)
        assert found.kl.abs().max() < 1e-12 and found.dnll.abs().max() < 1e-12 and not found.lost.any()
        assert found.tokens == 6 * 5, "what is held when the last line begins"


def test_drift_is_what_plain_arithmetic_says(monkeypatch):
    """KL and dNLL from probabilities, lost attention from one uncached pass and the sets of indices held."""
    plan = CachePlan("line", 2, 2, 1)
    decoder, prompt, run = drawn("class", plan)
    grid, tokens = run.cache.grid, run.tokens
    found = drift(decoder, prompt, tokens, plan, reference(decoder, prompt, tokens))

    seen = []
    attend = F.scaled_dot_product_attention

    def watch(q, k, v, **kwargs):
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        seen.append(scores.masked_fill(later, float("-inf")).softmax(-1))
        return attend(q, k, v, **kwargs)

    monkeypatch.setattr("linear_core.models.llamagen.F.scaled_dot_product_attention", watch)
    full = decoder(prompt, tokens.flatten(1))[:, :-1].softmax(-1)
    few = torch.stack(run.logits, 1)[:, : grid.tokens].softmax(-1)
    torch.testing.assert_close(found.kl, (full * (full / few).log()).sum(-1).mean(1))
    picked = tokens.flatten(1)[..., None]
    torch.testing.assert_close(found.dnll, (full.gather(2, picked) / few.gather(2, picked)).log().mean((1, 2)))

    lost = torch.zeros(2, grid.rows, len(seen), 3, dtype=torch.float64)
    for row in range(1, grid.rows):
        first = grid.index(row)
        held = run.held(grid.stride * row)  # once its first token was fed
        for layer, shares in enumerate(seen):
            for image, head in np.ndindex(2, 3):
                gone = [i for i in range(1, first) if i not in held[layer][image][head]]
                lost[image, row, layer, head] = shares[image, head, first : first + grid.stride, gone].sum(-1).mean()
    assert lost[:, 3:].min() > 0.01, "something must be lost, or this says nothing"
    torch.testing.assert_close(found.lost, lost.mean((1, 2, 3)))
    assert found.tokens == plan.budget * grid.stride


def test_rows_of_quantised_weights():
    """Beside the cache's own, by the same arithmetic; 8 bits move the next token less than a few lines do."""
    plan = CachePlan("line", 2, 2, 1)
    decoder, prompt, run = drawn("class", plan)
    found = weights.rows(decoder, prompt, run.tokens, ["int8"], plan)
    assert [(r["weights"], r["cache"]) for r in found] == [
        ("int8", "full"), ("default", "line 2/7"), ("int8", "line 2/7")
    ]  # fmt: skip
    eight, few, both = found
    assert 0 < eight["kl"] < few["kl"] and eight["matrix_bytes"] < few["matrix_bytes"]
    full = reference(decoder, prompt, run.tokens)
    assert few["kl"] == pytest.approx(float(drift(decoder, prompt, run.tokens, plan, full).kl.mean()))
    assert both["kl"] != few["kl"] and weights.table([{"model": "tiny", **eight}]).count("\n") == 2


def test_intervals():
    values = np.array([1.0, 2.0, 4.0])
    assert half_width(values) == pytest.approx(4.30 * np.std(values, ddof=1) / 3**0.5)
    assert np.isnan(half_width(values[:1]))
    source = np.random.default_rng(0)
    draws = source.normal(3, 2, (2000, 24))
    covered = np.mean([abs(d.mean() - 3) <= half_width(d) for d in draws])
    assert 0.93 < covered < 0.97
    below = source.gamma(2.0, 1.0, 256)
    low, high = ratio_interval(below / 4 + source.normal(0, 0.05, 256), below)
    assert low < 0.25 < high and high - low < 0.03
    assert share_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)  # Wilson's, from tables
    assert share_interval(9, 10) == pytest.approx((0.5958, 0.9821), abs=1e-3)


def test_frechet_distance():
    """Of Gaussians whose distance is known."""
    a = np.random.default_rng(1).normal(0, 1, (4000, 3))
    assert frechet(a, a) == pytest.approx(0, abs=1e-9)
    assert frechet(a, a + np.array([1, 2, 0])) == pytest.approx(5)
    low, high = frechet_excess(a[:400] + np.array([1, 0, 0]), a[:400], a, 4)
    assert low < 1 < high and high - low < 0.5
    assert frechet_excess(a[:400], a[:400], a, 4) == (0, 0)
    assert frechet(a, 3 * (a - a.mean(0)) + a.mean(0)) == pytest.approx(4 * np.trace(np.cov(a, rowvar=False)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> ModelFiles:
    """A tiny model for classes, with a tokenizer of as many codes."""
    folder = tmp_path_factory.mktemp("model")
    found = ModelFiles(folder / "tiny.safetensors", folder / "tiny_vq.safetensors")
    notes = {"heads": "3", "grid": "12x4", "sampling": '{"guidance": 2.0}', "tokenizer": "tiny_vq.safetensors"}
    save_file(llamagen(12, 4).state_dict(), found.decoder, notes)
    save_file({k: v.contiguous() for k, v in official.tokenizer(8, 32, CODES).items()}, found.tokenizer)
    return found


def call(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["quality.py", *map(str, arguments)])
    quality.main()


def test_one_command_and_once_more(files, tmp_path, monkeypatch, capsys):
    """A run leaves rows, table and sheet; the next one computes nothing again, and only what is new."""
    monkeypatch.setattr(quality, "SCRATCH", tmp_path / "scratch")
    command = ("--model", files.decoder, "--out", tmp_path / "results", "--images", 3, "--choose-images", 2,
               "--samples", 2, "--seeds", 20011, 77)  # fmt: skip
    call(monkeypatch, *command, "--policies", "line", "random", "--shares", 6, 4)
    results = tmp_path / "results" / "quality-tiny.json"
    data = json.loads(results.read_text(encoding="utf-8"))
    assert {r["split"] for r in data["rows"]} == {"choose", "report"}
    for row in data["rows"]:
        assert row["images"] == len(row["each"]["kl"]) == {"choose": 2, "report": 3}[row["split"]]
        assert row["kl"] == pytest.approx(np.mean(row["each"]["kl"]), rel=1e-3) and row["kl"] > 0
        assert {"policy", "budget_lines", "budget_ratio", "kl_ci", "dnll", "dnll_ci", "seed", "bytes"} <= set(row)
        assert row["bytes"] == 2 * 2 * 3 * 8 * 4 * (1 + 4 * (row["budget"] + 1)), "layers, heads, numbers, bytes, slots"
        assert row["tokens"] == 4 * row["budget_lines"] and row["budget_ratio"] == row["budget_lines"] / 12
    seeds = {split: {r["seed"] for r in data["rows"] if r["split"] == split} for split in ("choose", "report")}
    assert seeds == {"choose": {9001}, "report": {20011, 77}}, "chosen on one set of pictures, reported on others"
    first, again = (
        {tuple(r["names"]): r["kl"] for r in data["rows"] if (r["seed"], r["budget"]) == (seed, 2)}
        for seed in (20011, 77)
    )
    assert set(again) == {("line (published)",), ("random",)} and all(first[n] != again[n] for n in again)
    assert [s["name"] for s in data["samples"]][:3] == ["full", "full, other noise", "line (published)"]
    assert data["samples"][0]["agreement"] == 1 and data["samples"][2]["agreement"] < 1
    assert "| random |" in results.with_suffix(".md").read_text(encoding="utf-8")
    assert (tmp_path / "results" / "quality-tiny-sheet.png").stat().st_size > 1000

    measured = []
    measure = quality.Lab.measure
    monkeypatch.setattr(quality.Lab, "measure", lambda *a, **k: measured.append(a[1]) or measure(*a, **k))
    call(monkeypatch, *command, "--policies", "line", "random", "--shares", 6, 4)
    assert measured == []
    call(monkeypatch, *command, "--policies", "line", "random", "tova", "--shares", 6, 4)
    assert {plan.policy for plan in measured} == {"tova"}
    again = json.loads(results.read_text(encoding="utf-8"))["rows"]
    assert again[: len(data["rows"])] == data["rows"]
    call(monkeypatch, *command, "--policies", "tova", "--shares", 6)
    final = json.loads(results.read_text(encoding="utf-8"))
    assert [s["name"] for s in final["samples"]][: len(data["samples"])] == [s["name"] for s in data["samples"]]
    assert "tova" in {s["name"] for s in final["samples"]} and final["rows"] == again


def test_the_smoke_run_runs(files, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quality, "SCRATCH", tmp_path / "scratch")
    call(monkeypatch, "--quick", "--model", files.decoder, "--out", tmp_path)
    rows = json.loads((tmp_path / "quality-tiny.json").read_text(encoding="utf-8"))["rows"]
    assert {r["names"][0] for r in rows if r["split"] == "report"} == {"line (published)", "fold", "random"}


def test_rows_of_other_code_are_tried_before_they_are_kept(files, tmp_path, monkeypatch, capsys):
    """A row whose first pictures come out the same is kept, one whose do not is computed again."""
    monkeypatch.setattr(quality, "SCRATCH", tmp_path / "scratch")
    lab, split = quality.Lab(files, tmp_path), replace(quality.REPORT, images=4)
    row = lab.row("tova", CachePlan("tova", 2, 4, 0), split)
    true = row["kl"]
    lab.core = "changed, and nothing that matters"
    row["kl"] = -1.0
    assert lab.row("tova", CachePlan("tova", 2, 4, 0), split)["kl"] == -1.0
    lab.core = "changed, and something that matters"
    row["each"]["kl"][0] *= 1.1
    assert lab.row("tova", CachePlan("tova", 2, 4, 0), split)["kl"] == pytest.approx(true)
    assert len(lab.data["rows"]) == 1


def test_what_is_protected_is_chosen_and_the_published_rule_is_left_alone(files, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "SCRATCH", tmp_path / "scratch")
    lab = quality.Lab(files, tmp_path)
    kl = {0: 0.3, 1: 0.1, 2: 0.2}
    monkeypatch.setattr(lab, "row", lambda name, plan, split: {"kl": kl[plan.recent]})
    published, free = quality.Contender("line", published=True), quality.Contender("line")
    assert (free.name, published.name) == ("line", "line (published)")
    assert [lab.chosen(free, b, quality.CHOOSE).recent for b in (6, 2, 1)] == [1, 1, 0]
    assert [lab.chosen(published, b, quality.CHOOSE).recent for b in (6, 2, 1)] == [2, 1, 0]


def made_up(name: str, budget: int, *kl: float) -> dict:
    return {"names": [name], "split": "report", "seed": 1, "model": "m", "images": len(kl), "budget": budget,
            "kl": float(np.mean(kl)), "each": {"kl": list(kl)}}  # fmt: skip


def test_bars_say_what_was_reached():
    rows = [
        made_up("line (published)", 4, 0.4, 0.8),
        made_up("random", 4, 0.1, 0.1),
        made_up("tova", 4, 0.2, 0.3),
        made_up("fold", 4, 0.1, 0.2),
        made_up("fold", 2, 0.3, 0.5),
        made_up("fold", 12, 0.0, 0.001),
        made_up("tova", 12, 0.003, 0.003),
    ]
    found = bars(Field(rows, "m", 24))
    assert [b["met"] for b in found] == [True, False, True, False]
    assert found[0]["kl_ratio"] == pytest.approx(0.25) and found[1]["b"] == "tova", "the control is no rival"
    assert found[3]["over"] == {"tova": 0.003}

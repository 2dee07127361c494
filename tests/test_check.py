"""`check`: what it says of a cache is what other roads find."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from bench.forced import drift, reference
from bench.uncertainty import half_width as bench_half_width
from linear_core.__main__ import main
from linear_core.check import FULL, check_plans, divergences, draw_together, half_width, joined, usual_classes
from linear_core.checkpoints.library import ModelFiles, find_tokenizer, load_model
from linear_core.grid import Grid
from linear_core.loop.scales import forced_scales
from linear_core.plan import PRESETS, CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.tiny import var

PLAN = CachePlan("streaming", budget=1, anchors=0, recent=0)


@pytest.fixture(scope="module")
def model(small_model: Path):
    return load_model(ModelFiles(small_model, find_tokenizer(small_model)))


def test_divergence_is_the_benchmarks(model) -> None:
    """The same number as bench/quality.py's, from batches of any size; a full cache has none."""
    prompt, sample = class_prompt([1, 4, 7]), model.info.defaults
    counted = []
    found = check_plans(model, prompt, [PLAN, FULL], sample, counted.append)
    tokens = found[0].run.tokens
    assert sum(counted) == 2 * 3 * 3 * model.info.grid.tokens
    theirs = drift(model.decoder, prompt, tokens, PLAN, reference(model.decoder, prompt, tokens)).kl
    torch.testing.assert_close(found[1].kl, theirs, rtol=1e-4, atol=1e-7)
    assert found[1].kl.min() > 1e-3 and found[2].kl.abs().max() < 1e-9 and found[2].same.min() == 1
    parts = [check_plans(model, prompt.select(rows), [PLAN], SamplePlan(**vars(sample) | {"seed": rows[0]}))
             for rows in ([0], [1, 2])]  # fmt: skip
    whole = joined(parts)[1]
    torch.testing.assert_close(whole.kl, found[1].kl, rtol=1e-4, atol=1e-7)
    assert torch.equal(whole.run.tokens, found[1].run.tokens) and torch.equal(whole.same, found[1].same)
    assert half_width(whole.kl) == pytest.approx(bench_half_width(whole.kl.numpy()))


def test_divergence_of_a_picture_drawn_in_scales() -> None:
    """Of every scale that is drawn: by hand, from the logits that a masked pass gives under both caches."""
    decoder, quantizer = var(1, 2, 3)
    info = SimpleNamespace(name="var", pyramid=decoder.pyramid)
    model = SimpleNamespace(info=info, decoder=decoder, tokenizer=SimpleNamespace(quantize=quantizer))
    plan, sample = CachePlan("random", share=0.3, anchors=0), SamplePlan(guidance=1.0)
    prompt = class_prompt([1, 3])
    full, few = draw_together(model, prompt, [FULL, plan], sample, lambda tokens: None)
    assert full.tokens.shape == few.tokens.shape == (2, 14)
    same, kl = divergences(model, prompt, full.tokens, [FULL, plan], lambda tokens: None)
    logits = [torch.cat(list(forced_scales(decoder, quantizer, prompt, full.tokens, each)), 1) for each in (FULL, plan)]
    by_hand = torch.nn.functional.kl_div(*(x.log_softmax(-1) for x in logits[::-1]), reduction="none", log_target=True)
    torch.testing.assert_close(kl, by_hand.sum(-1).double().mean(1))
    assert same.abs().max() == 0 and kl.min() > 1e-4


def test_the_command_writes_a_table_a_sheet_and_numbers(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "c.png"
    asked = ["check", str(small_model), "--device", "cpu", "--class", "desert day", "--images", "3", "--at-once", "2"]
    assert main([*asked, "--size", "0", "--out", str(out)]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("small: 3 pictures, 2 at a time, guidance 3, seed 0, float32 on ")
    plans = [plan.in_lines(Grid(8, 8)) for plan in PRESETS.values() if plan.policy != "full"]
    names = [line.split("  ")[0] for line in told[2 : 3 + len(plans)]]
    bits = {"full": "", "int8": ", 8 bits"}
    assert names == ["full cache", *(f"{p.budget} of 8 lines, {p.policy}{bits[p.storage]}" for p in plans)]
    assert "100%" in told[2] and str(out) in told and str(out.with_suffix(".json")) in told
    assert Image.open(out).width > 3 * 32
    rows = json.loads(out.with_suffix(".json").read_text())["plans"]
    assert [row["budget"] for row in rows[1:]] == [plan.budget for plan in plans]
    least = names.index(f"{min(plan.budget for plan in plans)} of 8 lines, fold")
    assert rows[0]["kl"] == 0 and rows[least]["kl"] > 0 and rows[0]["cache_bytes"] > rows[least]["cache_bytes"]
    capsys.readouterr()
    assert main([*asked, "--budget", "7", "--out", str(out)]) == 0
    assert "full cache" in capsys.readouterr().out.splitlines()[3], "a plan that keeps all is called so"


def test_classes_come_from_all_over_the_model(model) -> None:
    assert usual_classes(model.info, 4) == ["alpine dawn", "desert day", "ocean dusk", "winter snow"]
    assert len(usual_classes(model.info, 100)) == 12

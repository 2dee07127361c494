"""Published loops beside ours: each computes what we compute, with our weights, and goes with its own models alone."""

from __future__ import annotations

import sys

import pytest
import torch

from bench import peer_janus, speed
from bench.peer import Transformers, problem
from bench.shapes import SHAPES, ModelShape
from linear_core.grid import Grid
from linear_core.models.janus import Janus, JanusConfig
from linear_core.plan import CachePlan, SamplePlan
from tests.bench.command import last_line

SIZES = JanusConfig(2, 48, 3, 80, codes=40, vocabulary=60, head_hidden=48)
SHAPE = ModelShape("tiny Janus", Janus, SIZES, Grid(4, 5), SamplePlan(guidance=5.0, top_k=7), prompt_tokens=9)
IMAGES = 2

needs_transformers = pytest.mark.skipif(Transformers.missing("") != "", reason=Transformers.missing(""))
pytestmark = pytest.mark.usefixtures("nothing_deprecated")


def model_and_peer(scale: float = 1.0) -> tuple[Janus, Transformers]:
    """Ours, and transformers' with the same weights, times `scale`. Norms differ too, so that none is mixed up."""
    torch.manual_seed(0)
    model = SHAPE.make(torch.float32, "cpu")
    for weight in model.parameters():
        if weight.ndim == 1:
            weight.add_(0.2 * torch.randn_like(weight))
        else:
            weight.mul_(1.5)
    weights = {name: weight * scale if scale != 1 else weight for name, weight in model.state_dict().items()}
    return model, Transformers("transformers", model, weights, SHAPE, IMAGES)


@needs_transformers
@torch.inference_mode()
def test_transformers_loop_computes_what_one_pass_of_ours_does(monkeypatch):
    """Logits of every token that `generate` drew, of both halves, against our uncached pass over the same codes."""
    theirs = []

    class Recorder(peer_janus.Clock):
        def __call__(self, tokens, logits):
            theirs.append(logits.clone())
            return super().__call__(tokens, logits)

    monkeypatch.setattr(peer_janus, "Clock", Recorder)
    model, peer = model_and_peer()
    codes = peer.picture()
    rows = model.with_unconditional(SHAPE.prompt(IMAGES))
    ours = model(rows, codes.repeat(2, 1))[:, rows.length - 1 : -1]
    assert codes.shape == (IMAGES, 20) and len(codes.unique()) > 5
    torch.testing.assert_close(torch.stack(theirs, 1), ours, atol=1e-4, rtol=1e-4)
    assert ours.std() > 0.3 and (ours[:IMAGES] - ours[IMAGES:]).std() > 0.1, "large enough to tell them apart"


@needs_transformers
@torch.inference_mode()
def test_a_few_tokens_are_timed_over_a_cache_for_the_whole_image():
    """Its weights are ours in the same memory, and each token reads as many slots as in a whole image."""
    from linear_core.hf import CACHE_ARGUMENT

    model, peer = model_and_peer()
    llama, slots = peer.network.model.language_model, []
    llama.register_forward_pre_hook(
        lambda _, args, given: slots.append(given[CACHE_ARGUMENT].layers[0].max_cache_len), with_kwargs=True
    )
    seconds = peer.seconds(3)
    assert len(seconds) == 3 and min(seconds) > 0
    assert slots == [SHAPE.prompt_tokens + SHAPE.grid.tokens] * 4, "the prompt and three tokens"
    mine, same = model.layers[1].attention.wqkv.weight, llama.layers[1].self_attn.k_proj.weight
    assert same.data_ptr() == mine[SIZES.width :].data_ptr()


@needs_transformers
@torch.inference_mode()
def test_a_peer_that_computes_otherwise_is_refused():
    model, peer = model_and_peer(scale=1.1)
    one = speed.Ours("full", model, SHAPE, CachePlan("full"), IMAGES, "eager")
    with pytest.raises(SystemExit, match="logits of transformers differ from ours"):
        speed.same_logits(one, peer)


@needs_transformers
@pytest.mark.parametrize("how", [["--lines", "2"], []], ids=["lines", "whole"])
def test_speed_beside_transformers(how, monkeypatch, capsys):
    monkeypatch.setitem(SHAPES, SHAPE.name, SHAPE)
    told = ["--models", SHAPE.name, "--images", "2", "--plans", "full", "line:2", "--repeat", "9", "--device", "cpu"]
    document = last_line(speed.main, [*told, "--against", "transformers", *how], monkeypatch, capsys)
    assert [r["name"] for r in document["results"]] == ["full", "line 2/4", "transformers"]
    *ours, peer = document["results"]
    assert peer["times_published"] == 1.0
    for result in ours:
        assert result["times_published"] == pytest.approx(peer["image_seconds"] / result["image_seconds"], abs=0.01)
    assert document["circumstances"]["transformers"] and "transformers" in document["command"]
    if how:
        assert [r["step_ms"]["n"] for r in document["results"]] == [18, 18, 18], "turns of eight and one, in two lines"


@pytest.mark.parametrize(
    "against, model, words",
    [
        ("transformers", "LlamaGen-B", ["LlamaGen-B", "Janus-Pro"]),
        ("transformers", "Lumina-mGPT-768", ["Lumina-mGPT-768", "no peer"]),
        ("transformers", "landscapes", ["landscapes", "no peer"]),
        ("a folder", "Janus-Pro-1B", ["Janus-Pro-1B", "'transformers'"]),
        ("a folder", "LlamaGen-B", ["a folder", "generate.py"]),
    ],
)
def test_a_pair_that_does_not_fit_is_refused(against, model, words, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["speed.py", "--models", model, "--against", against])
    with pytest.raises(SystemExit):
        speed.main()
    said = capsys.readouterr().err
    assert all(word in said for word in ["--against", *words])


def test_without_transformers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'transformers" in problem("transformers", [SHAPES["Janus-Pro-1B"]])

"""Ours equals the published VAR on small random weights: recorded numbers, see var_reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.checkpoints.library import ModelFiles, load_model
from linear_core.loop.sampling import filter_logits
from linear_core.loop.scales import generate_scales, scale_cache, scale_policy, scale_scores
from linear_core.models import var
from linear_core.models.var import VAR, read_config
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers import network
from linear_core.tokenizers.pyramid import PUBLISHED_PHI, PyramidTokenizer, phi_of_stage
from tests.drawn import digest
from tests.models import var_reference as upstream

TOLERANCE = 1e-4
KINDS = ("unit", "shared", "plain")
PYRAMID = Pyramid.square(*upstream.SIDES)
SAMPLE = SamplePlan(guidance=1 + upstream.CFG, top_k=upstream.TOP_K, top_p=upstream.TOP_P)


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture(scope="module")
def official(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with small files in the official layouts, under official names, and one by another name."""
    folder = tmp_path_factory.mktemp("var")
    for kind in KINDS:
        torch.save(upstream.var_weights(kind), folder / f"{kind}.pth")
    torch.save(upstream.vae_weights(), folder / "vae_ch160v4096z32.pth")
    return folder


@pytest.fixture(autouse=True)
def published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real files are wide enough that all have 32 groups, and are recognised by their number of tokens."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setitem(var.PYRAMIDS, PYRAMID.tokens, PYRAMID)
    monkeypatch.setattr(var, "HEAD_DIM", upstream.WIDTH // upstream.HEADS)


def load(folder: Path, kind: str):
    return load_model(ModelFiles(folder / f"{kind}.pth", folder / "vae_ch160v4096z32.pth"))


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest number."""
    theirs = torch.from_numpy(theirs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_the_weights_are_those_that_were_recorded(recorded: dict[str, np.ndarray]) -> None:
    for kind in KINDS:
        assert (recorded[f"{kind}_digest"] == digest(upstream.var_weights(kind))).all(), kind
    assert (recorded["vae_digest"] == digest(upstream.vae_weights())).all()


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_logits_of_every_scale(kind: str, official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Through the full cache, both guidance rows, with the recorded tokens; raw, and after guidance."""
    model = load(official, kind)
    decoder, quantizer = model.decoder, model.tokenizer.quantize
    state = decoder.begin(decoder.with_unconditional(class_prompt(list(upstream.LABELS))))
    plan = CachePlan("full")
    cache = scale_cache(decoder, 4, plan, scale_policy(plan, PYRAMID))
    canvas, tokens = quantizer.empty(2, PYRAMID), upstream.tokens()
    logits, guided, inputs = [], [], []
    for stage in range(PYRAMID.stages):
        cache.begin(stage)
        below = quantizer.shrink(PYRAMID, stage, canvas) if stage else None
        logits.append(decoder.stage(stage, below, state, cache))
        guided.append(scale_scores(decoder, logits[-1], stage, 2, SamplePlan(guidance=SAMPLE.guidance)))
        inputs += [] if below is None else [below]
        now = tokens[:, PYRAMID.index(stage) : PYRAMID.index(stage + 1)].unflatten(1, PYRAMID.sides[stage])
        canvas = quantizer.add(PYRAMID, stage, now, canvas)
    every = slice(None, None, upstream.EVERY)
    assert difference(torch.cat(logits, 1)[:, every], recorded[f"{kind}_logits"]) < TOLERANCE
    assert difference(torch.cat(guided, 1)[:, every], recorded[f"{kind}_guided"]) < TOLERANCE
    if kind == "unit":
        assert difference(torch.cat(inputs, 1), recorded["unit_inputs"]) < TOLERANCE
        assert difference(canvas, recorded["unit_canvas"]) < TOLERANCE
        kept = filter_logits(torch.cat(guided, 1)[:, every], upstream.TOP_K, upstream.TOP_P) > float("-inf")
        assert (kept.numpy() == recorded["unit_kept"]).all()


@torch.inference_mode()
def test_the_uncached_pass(official: Path, recorded: dict[str, np.ndarray]) -> None:
    """One block-causal pass over the conditional rows gives the same logits."""
    model = load(official, "unit")
    below = torch.from_numpy(recorded["unit_inputs"]).split([PYRAMID.size(n) for n in range(1, PYRAMID.stages)], 1)
    logits = model.decoder(class_prompt(list(upstream.LABELS)), list(below))
    assert difference(logits[:, :: upstream.EVERY], recorded["unit_logits"][:2]) < TOLERANCE


@pytest.mark.parametrize("smooth", [False, True])
def test_the_loop_ends_with_the_published_canvas(
    smooth: bool, official: Path, recorded: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the recorded draws, the canvas after all scales is upstream's, and with more_smooth its mixture."""
    model, tokens, noise = load(official, "unit"), upstream.tokens(), upstream.noise()
    place = iter(range(PYRAMID.stages))

    def drawn(logits: Tensor, race: Tensor, temperature: float) -> Tensor:
        stage = next(place)
        return tokens[:, PYRAMID.index(stage) : PYRAMID.index(stage + 1)]

    monkeypatch.setattr("linear_core.loop.scales.sample_codes", drawn)
    monkeypatch.setattr("linear_core.loop.scales.Noise.exponential", lambda self, number: noise[:, number])
    sample = SamplePlan(guidance=SAMPLE.guidance, top_k=SAMPLE.top_k, top_p=SAMPLE.top_p, smooth=smooth)
    stages = list(
        generate_scales(
            model.decoder, model.tokenizer.quantize, class_prompt(list(upstream.LABELS)), CachePlan("full"), sample
        )
    )
    expected = recorded["smooth_canvas" if smooth else "unit_canvas"]
    # The mixture of the last scale divides logits by 0.0135, and so multiplies their rounding.
    assert difference(stages[-1].canvas, expected) < (20 if smooth else 1) * TOLERANCE
    assert torch.equal(torch.cat([stage.tokens for stage in stages], 1), tokens)


@torch.inference_mode()
def test_the_tokenizer(official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Features, codes of all scales and the picture."""
    tokenizer: PyramidTokenizer = load(official, "unit").tokenizer
    pictures = upstream.pictures()
    assert difference(tokenizer.features(pictures), recorded["vae_features"]) < TOLERANCE
    codes = torch.cat([scale.flatten(1) for scale in tokenizer.encode(pictures, PYRAMID)], 1)
    assert (codes.numpy() == recorded["vae_codes"]).all()
    picture = tokenizer.decode(torch.from_numpy(recorded["unit_canvas"]))
    assert difference(picture[..., ::4, ::4], recorded["vae_picture"]) < TOLERANCE


def test_which_convolution_a_scale_uses() -> None:
    """Written out for the published ten scales, where two are ties; else the nearest of numpy's ticks."""
    assert phi_of_stage(10, 4) == PUBLISHED_PHI
    assert phi_of_stage(9, 4) == (0, 0, 1, 1, 2, 2, 2, 3, 3)
    assert phi_of_stage(13, 4) == (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    for phis in (1, 2, 3, 4, 5):
        edge = 1 / 3 / phis if phis == 4 else 1 / 2 / phis
        ticks = np.linspace(edge, 1 - edge, phis)
        for stages in range(2, 15):
            expected = [int(np.argmin(np.abs(ticks - stage / (stages - 1)))) for stage in range(stages)]
            assert list(phi_of_stage(stages, phis)) == expected


def test_published_sizes_follow_from_the_shapes() -> None:
    """Every published file's parameters, counted from its width and depth, are those of its size on the hub."""
    for depth, tokens, shared, millions in (
        (16, 680, False, 310.3),
        (30, 680, False, 2010.0),
        (36, 2240, True, 2353.9),
    ):
        pyramid = var.PYRAMIDS[tokens]
        config = var.VARConfig(depth, 64 * depth, depth, 256 * depth, 4096, 1000, 32, pyramid, shared)
        with torch.device("meta"):
            model = VAR(config)
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        assert read_config(shapes) == config
        assert round(sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6, 1) == millions

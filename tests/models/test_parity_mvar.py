"""Ours equals the published M-VAR on small random weights, and its carried state equals going over the past again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from linear_core.cache.carried_state import CarriedState
from linear_core.checkpoints.library import ModelFiles, load_model
from linear_core.loop.scales import forced_scales, generate_scales, scale_scores
from linear_core.models import mvar as model_file
from linear_core.models import var
from linear_core.models.mvar import MVAR, MVARConfig, read_config, scan
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers import network
from tests.drawn import digest
from tests.models import mvar_reference as upstream
from tests.models import var_reference
from tests.tiny import CODES, mvar

TOLERANCE = 1e-4
KINDS = ("unit", "plain")
PYRAMID = Pyramid.square(*var_reference.SIDES)
SIDES = (1, 2, 3, 9)  # the last is scanned in two parts
FULL = CachePlan("full")


@pytest.fixture(scope="module")
def recorded() -> dict[str, np.ndarray]:
    return upstream.reference()


@pytest.fixture
def official(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with small files in the official layouts. Real ones are recognised by their number of tokens."""
    monkeypatch.setattr(network, "groups", lambda channels: 32)
    monkeypatch.setitem(var.PYRAMIDS, PYRAMID.tokens, PYRAMID)
    monkeypatch.setattr(var, "HEAD_DIM", var_reference.WIDTH // var_reference.HEADS)
    for kind in KINDS:
        torch.save(upstream.mvar_weights(kind), tmp_path / f"{kind}.pth")
    torch.save(var_reference.vae_weights(), tmp_path / "vae_ch160v4096z32.pth")
    return tmp_path


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative to the largest number."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_every_scale(kind: str, official: Path, recorded: dict[str, np.ndarray]) -> None:
    """Both guidance rows, with the recorded tokens; raw, and after guidance; whatever the plan says."""
    assert (recorded[f"{kind}_digest"] == digest(upstream.mvar_weights(kind))).all()
    model = load_model(ModelFiles(official / f"{kind}.pth", official / "vae_ch160v4096z32.pth"))
    assert model.info.family.name == "M-VAR" and model.info.config.unit_qk is (kind == "unit")
    decoder, tokens = model.decoder, var_reference.tokens()
    prompt = decoder.with_unconditional(class_prompt(list(var_reference.LABELS)))
    sample, places = SamplePlan(guidance=1 + var_reference.CFG), range(0, PYRAMID.tokens, var_reference.EVERY)
    scales = forced_scales(decoder, model.tokenizer.quantize, prompt, tokens, CachePlan("line", share=0.3, recent=0))
    expected = [torch.from_numpy(recorded[f"{kind}_{what}"]) for what in ("logits", "guided")]
    for stage, logits in enumerate(scales):
        guided = scale_scores(decoder, logits, stage, 2, sample)
        here = [n for n, place in enumerate(places) if PYRAMID.stage_of(place) == stage]
        which = [places[n] - PYRAMID.index(stage) for n in here]
        for ours, theirs in zip((logits, guided), expected, strict=True):
            assert not here or difference(ours[:, which], theirs[:, here]) < TOLERANCE, f"scale {stage + 1}"


@torch.inference_mode()
def test_a_scan_in_parts_is_the_recurrence() -> None:
    """Matrix products, with a state from before, against one token after the other."""
    torch.manual_seed(0)
    tokens, heads, channels, size = 37, 3, 4, 5
    state = start = torch.randn(2, heads, channels, size, dtype=torch.float64)
    x = torch.randn(2, tokens, heads, channels, dtype=torch.float64)
    decay = -torch.rand(2, tokens, heads, dtype=torch.float64)
    write, read = torch.randn(2, 2, tokens, size, dtype=torch.float64)
    expected = []
    for t in range(tokens):
        state = decay[:, t].exp()[..., None, None] * state + x[:, t, ..., None] * write[:, t, None, None]
        expected.append((state * read[:, t, None, None]).sum(-1))
    y, after = scan(start, x, decay, write, read)
    torch.testing.assert_close(y, torch.stack(expected, 1))
    torch.testing.assert_close(after, state)


def drawn(images: int, seed: int = 0) -> Tensor:
    return torch.randint(CODES, (images, Pyramid.square(*SIDES).tokens), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_a_carried_state_is_all_that_is_needed_of_the_past(monkeypatch: pytest.MonkeyPatch) -> None:
    """At every scale the logits are those of one pass over all tokens, while only the scale's own are computed."""
    (decoder, quantizer), prompt, tokens = mvar(*SIDES), class_prompt([1, 3]), drawn(2)
    pyramid, seen = decoder.pyramid, []
    decoder.blocks[0].mamba.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))
    scales = list(forced_scales(decoder, quantizer, prompt, tokens, FULL))
    assert seen == [pyramid.size(stage) for stage in range(pyramid.stages)]
    canvas, below = quantizer.empty(2, pyramid), []
    for stage in range(pyramid.stages - 1):
        now = tokens[:, pyramid.index(stage) : pyramid.index(stage + 1)].unflatten(1, pyramid.sides[stage])
        canvas = quantizer.add(pyramid, stage, now, canvas)
        below.append(quantizer.shrink(pyramid, stage + 1, canvas))
    monkeypatch.setattr(model_file, "CHUNK", 1000)
    whole = decoder(prompt, below)
    for stage, ours in enumerate(scales):
        assert difference(ours, whole[:, pyramid.index(stage) : pyramid.index(stage + 1)]) < 1e-5, f"scale {stage + 1}"
    # What earlier scales left matters: with an empty state the last scale's logits are others.
    monkeypatch.setattr(CarriedState, "layer", lambda self, number: [torch.zeros_like(s[number]) for s in self.state])
    assert difference(list(forced_scales(decoder, quantizer, prompt, tokens, FULL))[-1], scales[-1]) > 0.01


@torch.inference_mode()
def test_a_batch_is_its_pictures_one_by_one() -> None:
    decoder, quantizer = mvar(*SIDES, dtype=torch.float64)
    tokens = drawn(3)
    together = list(forced_scales(decoder, quantizer, class_prompt([0, 2, 4]), tokens, FULL))
    for i, label in enumerate((0, 2, 4)):
        alone = forced_scales(decoder, quantizer, class_prompt([label]), tokens[i : i + 1], FULL)
        for ours, single in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[i : i + 1], single)


@torch.inference_mode()
def test_scales_that_are_given_leave_the_state_that_drawing_them_left() -> None:
    (decoder, quantizer), prompt, sample = mvar(*SIDES), class_prompt([1, 3]), SamplePlan(seed=2, guidance=3.0)
    whole = list(generate_scales(decoder, quantizer, prompt, FULL, sample))
    given = torch.cat([stage.tokens for stage in whole[:2]], 1)
    again = list(generate_scales(decoder, quantizer, prompt, FULL, sample, given=given))
    assert [stage.replayed for stage in again] == [True, True, False, False]
    assert torch.equal(again[-1].canvas, whole[-1].canvas)


@torch.inference_mode()
def test_conditional_rows_go_on_when_guidance_ends() -> None:
    (decoder, quantizer), sample = mvar(*SIDES), SamplePlan(seed=2, guidance=3.0, guidance_interval=3, temperature=0)
    stages = list(generate_scales(decoder, quantizer, class_prompt([1, 3]), FULL, sample))
    tokens = torch.cat([stage.tokens for stage in stages], 1)
    alone = list(forced_scales(decoder, quantizer, class_prompt([1, 3]), tokens, FULL))
    for stage in (2, 3):  # after token 3, so without guidance
        best = alone[stage].max(-1).values - alone[stage].gather(-1, stages[stage].tokens[..., None])[..., 0]
        assert float(best.max()) < 1e-4


@torch.inference_mode()
def test_nothing_is_held_and_the_state_is_as_large_as_planned() -> None:
    (decoder, quantizer), shape = mvar(*SIDES), mvar(*SIDES)[0].cache_shape()
    sample = SamplePlan(guidance=2.0)
    for stage in generate_scales(decoder, quantizer, class_prompt([1, 3, 0]), CachePlan("fold", share=0.5), sample):
        assert stage.held == 0 and not stage.share.any() and not stage.by_head.any() and stage.stands is None
        assert stage.cache_bytes == shape.scales_bytes(decoder.pyramid, FULL, 6) == 2 * 6 * 4 * (3 * 58 + 48 * 5)
    half = decoder.to(torch.bfloat16)
    state = CarriedState(half.cache_shape(), half.carried, 1, half.pyramid, dtype=half.dtype, device="cpu")
    assert all(part.dtype == torch.float32 for part in state.state)
    last = list(generate_scales(half, quantizer, class_prompt([1]), FULL, sample))[-1]
    assert last.canvas.dtype == torch.float32 and bool(last.canvas.isfinite().all())


@pytest.mark.parametrize(
    ("depth", "millions", "mib"),
    [(12, 198.4, 9.5), (16, 464.2, 16.8), (20, 900.5, 26.2), (24, 1550, 37.8), (32, 3659, 67.1)],
)
def test_published_sizes_follow_from_the_shapes(depth: int, millions: float, mib: float) -> None:
    """Parameters as counted from the published module, and the state of one guided picture."""
    width = 64 * depth
    sizes = (depth, width, depth, 4 * width, 4096, 1000, 32, var.PYRAMIDS[680])
    config = MVARConfig(*sizes, inner=2 * width, scan_heads=width // 32, scan_size=64, span=4)
    with torch.device("meta"):
        model = MVAR(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert read_config(shapes) == config
    parameters = sum(tensor.numel() for tensor in model.state_dict().values()) / 1e6
    assert parameters == pytest.approx(millions, rel=3e-4)
    assert round(config.cache_shape(0, 2).state_bytes(2) / 2**20, 1) == mib

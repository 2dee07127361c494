"""The loop over scales, around the cache: micro-batches, previews, maps, memory, refusals."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.errors import UserError
from linear_core.events import Stage
from linear_core.loop.memory import scales_run_bytes
from linear_core.loop.micro_batches import MicroBatches
from linear_core.loop.sampling import Noise
from linear_core.loop.scales import ALL_PAIRS, generate_scales, scale_policy
from linear_core.models.var import PYRAMIDS
from linear_core.pictures.heatmap import LABEL, lifetime_of_scales, over_scales, scale_maps, strip
from linear_core.pictures.preview import CanvasPreview, Sketch, decode
from linear_core.plan import CachePlan, SamplePlan
from linear_core.policies import OVER_SCALES, POLICIES
from linear_core.prompts import Prompt, class_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers.pyramid import PyramidConfig, PyramidTokenizer
from tests.tiny import CODES, var

SIDES = (1, 2, 3, 4)
PLAN = CachePlan("fold", share=0.5)
SAMPLE = SamplePlan(seed=3, guidance=2.0)


@pytest.fixture(scope="module")
def model():
    return var(*SIDES)


def draw(model, labels=(1, 3), plan=PLAN, sample=SAMPLE, **more) -> list[Stage]:
    return list(generate_scales(*model, class_prompt(list(labels)), plan, sample, **more))


def test_several_tokens_get_the_noise_of_each() -> None:
    noise = Noise(2**40 + 5, 3, 7, "cpu")
    several = noise.exponential(torch.arange(4, 9))
    assert torch.equal(several, torch.stack([noise.exponential(token) for token in range(4, 9)], 1))


@pytest.mark.parametrize("fails_at", [1, 3])
def test_a_batch_goes_on_in_halves_when_memory_runs_out(model, fails_at: int) -> None:
    """Finished scales are passed on, not drawn again, and the pictures are those of the whole batch."""
    whole = draw(model, (0, 1, 2, 3))
    batches, failed = MicroBatches(class_prompt([0, 1, 2, 3]), SAMPLE, 4, advice="draw fewer"), False
    replayed = []
    for part in batches:
        with batches.watch(part):
            stages = generate_scales(*model, part.prompt, PLAN, part.sample, given=part.above[0])
            for stage in stages:
                part.runs[0].add(stage)
                replayed.append(stage.replayed)
                if stage.stage == fails_at and not failed:
                    failed = True
                    raise MemoryError("not enough memory")
    (run,) = batches.runs
    assert sum(replayed) == 2 * min(fails_at + 1, len(SIDES) - 1)
    assert torch.equal(run.tokens, torch.cat([stage.tokens for stage in whole], 1))
    torch.testing.assert_close(run.canvas, whole[-1].canvas)
    assert run.shares.shape == (4, len(SIDES), 30) and run.held == 7


def test_stop_after(model) -> None:
    """The canvas of the scales drawn is that of the whole picture so far."""
    whole, two = draw(model), draw(model, stop_after=2)
    assert len(two) == 2 and torch.equal(two[-1].canvas, whole[1].canvas)


def bad(edit: str, **more):
    return pytest.param(more, edit, id=edit)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        bad("no whole scales of the model's", given=torch.zeros(1, 3, dtype=torch.int64)),
        bad("lines of another model's picture", given=torch.zeros(1, 3, 3, dtype=torch.int64)),
        bad("3 pictures, but 2 are drawn", given=torch.zeros(3, 5, dtype=torch.int64)),
        bad("of another model; this one has codes 0 to 22", given=torch.full((1, 5), CODES)),
        bad("draws 4 scales", stop_after=5),
        bad("connect a Class Prompt", labels=None),
        bad("this model has 5 classes", labels=(7,)),
        bad("it is empty", labels=()),
    ],
)
def test_bad_input(model, more: dict, words: str) -> None:
    labels = more.pop("labels", (1, 3))
    if labels is None:
        prompt = Prompt(torch.zeros(1, 4, 8), torch.zeros(1, dtype=torch.int64))
        run = partial(generate_scales, *model, prompt, PLAN, SAMPLE)
    else:
        run = partial(generate_scales, *model, class_prompt(list(labels)), PLAN, SAMPLE, **more)
    with pytest.raises(UserError, match=words):
        next(run())


def test_logits_that_are_not_finite_end_the_run() -> None:
    decoder, quantizer = var(*SIDES)
    decoder.head.bias[3] = float("nan")
    with pytest.raises(UserError, match=r"little: its logits are not finite .* in scale 1 of 4"):
        next(generate_scales(decoder, quantizer, class_prompt([1]), PLAN, SAMPLE, name="little"))


def test_bfloat16_keeps_the_canvas_in_float32() -> None:
    decoder, quantizer = var(*SIDES)
    last = list(generate_scales(decoder.to(torch.bfloat16), quantizer, class_prompt([1]), PLAN, SAMPLE))[-1]
    assert last.canvas.dtype == torch.float32 and bool(last.canvas.isfinite().all())


def tokenizer_and_pyramid() -> tuple[PyramidTokenizer, Pyramid]:
    torch.manual_seed(0)
    config = PyramidConfig(CODES, 6, (16, 8, 8, 8), 1)
    return PyramidTokenizer(config).eval().requires_grad_(False), Pyramid.square(1, 2, 3, 4, 8)


def test_previews_grow_with_the_scales_and_what_they_may_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """With time, each is decoded at twice its scale's side, the last ones as they are; with little, at fewer rows; with
    next to none it is a sketch."""
    tokenizer, pyramid = tokenizer_and_pyramid()
    sketch, canvas = Sketch(), torch.randn(3, 6, 8, 8)
    sketch.prepare(tokenizer, pyramid)
    preview = CanvasPreview(tokenizer, pyramid, sketch)
    assert [preview.pictures(stage, canvas[:2]).shape for stage in range(5)] == [
        (2, 8 * side, 8 * side, 3) for side in (2, 4, 6, 8, 8)
    ]
    assert torch.equal(preview.pictures(4, canvas), decode(tokenizer, canvas, batch=3))
    sketch.seconds = 0.1  # a place
    assert [preview.side(3, canvas, 30 * seconds) for seconds in (1, 0.65, 0.63, 0.17, 0.1, 0)] == [8, 8, 6, 4, 3, 0]
    assert preview.pictures(3, canvas, elapsed=0.0).shape == (3, 64, 64, 3)
    preview.spent, spent = 0.0, []
    monkeypatch.setattr(sketch, "decode", lambda tokenizer, canvas: torch.zeros(0))  # else it would measure anew
    for elapsed in (2000.0, 2000.0, 4000.0):  # what is spent is not there a second time
        preview.pictures(4, canvas, elapsed)
        spent.append(round(preview.spent, 3))
    assert spent == [19.2, 19.2, 38.4]


def test_a_sketch_learns_colours_from_decoded_pictures() -> None:
    """Of a decoder that is linear in every place it finds the map; random washes alone come close."""
    mix = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)) * 0.1
    tokenizer, pyramid = tokenizer_and_pyramid()

    def linear(canvas: Tensor) -> Tensor:
        return F.interpolate(torch.einsum("bzhw,zc->bchw", canvas, mix), scale_factor=8, mode="nearest")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "decode", linear)
        sketch, canvas = Sketch(), 0.5 * torch.randn(2, 6, 8, 8)
        sketch.prepare(tokenizer, pyramid)
        truth = linear(canvas) / 2 + 0.5
        errors = []
        for _ in range(2):
            drawn = sketch.picture(canvas, least=8).permute(0, 3, 1, 2)
            errors.append(float((drawn - F.interpolate(truth, (8, 8), mode="area")).abs().mean()))
            sketch.decode(tokenizer, canvas)
    assert errors[1] < errors[0] < 0.1 * float((truth - truth.mean()).abs().mean()) + 0.02


def test_maps_of_scales() -> None:
    """One map a scale; over the picture each counts by what is held of it; the last, never held, counts nothing."""
    pyramid = Pyramid.square(1, 2, 4)
    share = torch.cat([torch.ones(1, 1), torch.tensor([[1.0, 0, 0, 0]]), torch.zeros(1, 16)], 1)
    assert [tuple(one.shape) for one in scale_maps(share, pyramid)] == [(1, 1, 1), (1, 2, 2), (1, 4, 4)]
    over = over_scales(share, pyramid)[0]
    assert torch.equal(over[:2, :2], torch.ones(2, 2)) and torch.equal(over[2:], torch.full((2, 4), 0.5))
    drawn: Tensor = strip(share, pyramid, side=8, gap=2)
    assert drawn.shape == (1, 8 + 2 * 2 + LABEL, 3 * 8 + 2 * 2, 3)
    assert torch.equal(drawn[0, :8, 8:10], torch.ones(8, 2, 3)) and not torch.equal(drawn[0, 0, 10], drawn[0, 0, 16])
    written = [bool((drawn[0, 10:, left : left + 8] < 0.5).any()) for left in (0, 10, 20)]
    assert written == [True] * 3, "a number below each map"


def test_how_long_tokens_of_scales_were_kept() -> None:
    """As a share of the scale ends since their own."""
    pyramid = Pyramid.square(1, 2, 3)
    shares = torch.zeros(1, 3, 14)
    shares[0, 0, 0], shares[0, 1, :3], shares[0, 2, 0] = 1.0, torch.tensor([1.0, 1.0, 0.5]), 1.0
    kept = lifetime_of_scales(shares, pyramid)[0]
    assert kept[:5].tolist() == [1.0, 0.5, 0.25, 0, 0] and not kept[5:].any()


def test_large_maps_choose_by_attention() -> None:
    """Comparing all pairs of keys is for small maps; on large ones fold's victims are chosen by attention."""
    small, large = PYRAMIDS[680], PYRAMIDS[2240]
    assert CachePlan("fold", share=0.9).work_slots(large) > ALL_PAIRS >= CachePlan("fold", share=0.9).work_slots(small)
    assert scale_policy(CachePlan("fold", share=0.9), large) is POLICIES["line"]
    assert scale_policy(CachePlan("fold", share=0.9), small) is OVER_SCALES["fold"]


def test_memory_of_a_run(model) -> None:
    """More than the cache, growing with images, and less with a smaller share."""
    shape, pyramid = model[0].cache_shape(), PYRAMIDS[680]
    few, full = CachePlan("fold", share=1 / 6), CachePlan("full")
    needed = [scales_run_bytes(shape, pyramid, few, rows, 4096, 96, "cpu") for rows in (2, 4)]
    assert shape.scales_bytes(pyramid, few, 2) < needed[0] < needed[1]
    assert needed[0] < scales_run_bytes(shape, pyramid, full, 2, 4096, 96, "cpu")

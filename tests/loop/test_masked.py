"""The loop of masked models: noise and order belong to a picture, and what is kept changes nothing it should not.

In double precision, so that equal means equal whatever the shapes. Denoising starts at 950: from 999 on, random weights
multiply every difference by hundreds.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear_core.cache.refresh import chosen, scores
from linear_core.cache.step_cache import StepCache
from linear_core.errors import UserError
from linear_core.events import Step
from linear_core.loop.graph import CapturedHead
from linear_core.loop.masked import OFF, Masked, forced_masked, generate_masked
from linear_core.loop.micro_batches import MicroBatches, is_out_of_memory
from linear_core.loop.sampling import Noise
from linear_core.models.denoise import schedule
from linear_core.models.mar import MAR, Active
from linear_core.plan import SamplePlan
from linear_core.prompts import class_prompt
from linear_core.steps import RULES, STEP_CACHES, MaskedPlan, StepCachePlan, StepCacheShape
from tests.tiny import mar

PLAN = MaskedPlan(steps=9, denoising=6, start=950)
SAMPLE = SamplePlan(seed=5, guidance=2.0)
PROMPT = class_prompt([1, 4, 2])
NONE_FULL = StepCachePlan(full_every=0, full_first=1, full_last=0)


@pytest.fixture(scope="module")
def model() -> MAR:
    return mar()


@pytest.fixture(scope="module")
def plain(model: MAR) -> list[Step]:
    return draw(model)


def draw(model: MAR, cache: StepCachePlan = OFF, **more) -> list[Step]:
    return list(generate_masked(model, more.pop("prompt", PROMPT), more.pop("sample", SAMPLE), PLAN, cache, **more))


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max())


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [OFF, StepCachePlan(7, "oldest", 4, 2, 1), STEP_CACHES["LazyMAR"]])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_image_i_of_a_batch_is_the_image_alone(model: MAR, cache: StepCachePlan, guidance: float) -> None:
    batch = draw(model, cache, sample=replace(SAMPLE, guidance=guidance))
    for image in range(3):
        alone = draw(
            model, cache, prompt=PROMPT.select([image]), sample=replace(SAMPLE, seed=5 + image, guidance=guidance)
        )
        assert same(alone[-1].latents[0], batch[-1].latents[image])
        assert torch.equal(alone[4].age[0], batch[4].age[image])
        assert torch.equal(alone[4].drawn[0], batch[4].drawn[image])


def test_a_step_draws_as_many_tokens_as_published_and_each_place_once(model: MAR, plain: list[Step]) -> None:
    drawn = torch.stack([step.drawn for step in plain])
    assert drawn.sum(0).eq(1).all()
    assert tuple(drawn.flatten(2).sum(2)[:, 0].cumsum(0).tolist()) == PLAN.known(36)
    assert PLAN.known(36) == (1, 3, 5, 9, 13, 18, 24, 30, 36)
    orders = [drawn[:, image].flatten(1).float().argmax(0) for image in range(3)]
    assert not torch.equal(orders[0], orders[1]), "each picture has an order of its own"
    for step, event in enumerate(plain):
        assert event.latents.isfinite().sum() == 3 * 4 * PLAN.known(36)[step]


def test_settings_change_the_picture_and_the_seed_repeats_it(model: MAR, plain: list[Step]) -> None:
    last = plain[-1].latents
    assert torch.equal(draw(model)[-1].latents, last)
    for sample in (replace(SAMPLE, seed=6), replace(SAMPLE, guidance=3.0), replace(SAMPLE, temperature=0.5)):
        assert not same(draw(model, sample=sample)[-1].latents, last, 0.01)
    for plan in (replace(PLAN, schedule="constant"), replace(PLAN, denoising_last=3), replace(PLAN, start=900)):
        assert not same(list(generate_masked(model, PROMPT, SAMPLE, plan))[-1].latents, last, 0.01)


def test_normal_noise_is_normal_and_belongs_to_seed_and_token() -> None:
    token = torch.arange(4000)
    found = Noise(3, 2, 16, "cpu").normal(token)
    assert found.shape == (2, 4000, 8)
    assert abs(float(found.mean())) < 0.01 and abs(float(found.std()) - 1) < 0.01
    assert abs(float((found**4).mean()) - 3) < 0.15
    assert float((found[..., 0] * found[..., 1]).mean().abs()) < 0.03, "numbers of a token are independent"
    assert torch.equal(found[1:], Noise(4, 1, 16, "cpu").normal(token))
    assert torch.equal(found[1:], Noise(3, 2, 16, "cpu").select(torch.tensor([1])).normal(token))


# -- places that are given ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [3, 7])
def test_a_stopped_picture_goes_on_to_the_same_end(model: MAR, plain: list[Step], cut: int) -> None:
    rest = draw(model, given=plain[cut].latents)
    assert [step.step for step in rest] == list(range(cut + 1, 9))
    assert same(rest[-1].latents, plain[-1].latents)


def test_unequal_masks_in_a_batch_are_each_the_picture_alone(model: MAR, plain: list[Step]) -> None:
    """Half a picture, a few places in the middle, and nothing given; what is given stays to the bit."""
    given = plain[-1].latents.clone()
    given[0, :, :, 3:] = float("nan")
    given[1, :, 2:4, 1:3] = float("nan")
    given[2] = float("nan")
    other = replace(SAMPLE, seed=50)
    batch = draw(model, given=given, sample=other)
    for image in range(3):
        alone = draw(
            model, given=given[image : image + 1], prompt=PROMPT.select([image]), sample=replace(other, seed=50 + image)
        )
        known = given[image].isfinite()
        assert same(alone[-1].latents[0], batch[-1].latents[image])
        assert torch.equal(batch[-1].latents[image][known], given[image][known])
        assert len(alone) == (3, 1, 9)[image], "as many steps as the published schedule has left"
    assert not same(batch[-1].latents[1], plain[-1].latents[1], 0.01)
    assert batch[0].computed.tolist() == [0, 0, 39]
    assert not batch[0].drawn[:2].any()


def test_a_batch_that_ran_out_of_memory_is_drawn_in_parts_from_where_it_was(model: MAR, plain: list[Step]) -> None:
    batches, failed = MicroBatches(PROMPT, SAMPLE, 3, advice="use fewer"), []
    for part in batches:
        with batches.watch(part):
            for step in generate_masked(model, part.prompt, part.sample, PLAN, given=part.above[0]):
                part.runs[0].add(step)
                if step.step == 4 and not failed:
                    failed.append(True)
                    error = RuntimeError("out of memory")
                    assert is_out_of_memory(error)
                    raise error
    assert [part.runs[0].lines[0].step for part in batches.done] == [5, 5, 5]
    assert same(batches.runs[0].latents, plain[-1].latents)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"given": torch.zeros(1, 4, 5, 6)}, "4 x 5 x 6 numbers, but this model draws 4 x 6 x 6"),
        ({"given": torch.zeros(2, 4, 6, 6)}, "there are 2 pictures, but 3 are drawn"),
        ({"given": torch.zeros(1, 4, 6, 6)}, "every place of a picture is given"),
        ({"prompt": class_prompt([5])}, "class 5, but this model has 5 classes"),
        ({"prompt": class_prompt([])}, "prompt: it is empty"),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_drawn(model: MAR, more, words: str) -> None:
    with pytest.raises(UserError, match=words):
        next(iter(generate_masked(model, more.pop("prompt", PROMPT), SAMPLE, PLAN, **more)))


def test_numbers_that_are_not_finite_are_reported(model: MAR) -> None:
    with pytest.raises(UserError, match=r"little: its latents are not finite.*step 1 of 9"):
        draw(model, denoise=lambda z, noise, *rest: noise[0] * float("inf"), name="little")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MaskedPlan(steps=0), "steps: 0 is out of range"),
        (lambda: MaskedPlan(steps=37).check(36), "steps: 37 are more than the picture has tokens; choose at most 36"),
        (lambda: MaskedPlan(denoising=1), "denoising: 1 is out of range"),
        (lambda: MaskedPlan(denoising_last=200), "denoising last: 200 is out of range"),
        (lambda: MaskedPlan(start=1000), "start: 1000 is out of range"),
        (lambda: MaskedPlan(schedule="cosine"), "guidance schedule: 'cosine' is unknown"),
        (lambda: StepCachePlan(rule="best"), "rule: 'best' is unknown"),
        (lambda: StepCachePlan(-1), "refresh: -1 is out of range"),
        (lambda: StepCachePlan(full_first=0), "full first: 0 is out of range; choose 1 or more"),
    ],
)
def test_settings_out_of_range(make, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


# -- the head ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("ahead", [1, 2**30])
def test_modulation_computed_ahead_is_exact(
    model: MAR, guidance: float, ahead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the network as it is written down, one denoising step after the other, both rows carried along."""
    monkeypatch.setattr("linear_core.models.denoise.AHEAD_BYTES", ahead)
    head, numbers, source = model.head, model.config.numbers, torch.Generator().manual_seed(1)
    schedule_ = schedule((900, 500, 100, 0), torch.device("cpu"))
    z = torch.randn(6, 24, generator=source).double()
    noise = torch.randn(4, 3, numbers, generator=source).double()

    def network(x: Tensor, t: Tensor) -> Tensor:
        y, h = head.time_embed(t.double()[None]) + head.cond_embed(z), head.input_proj(x)
        for block in head.res_blocks:
            shift, scale, gate = block.adaLN_modulation(y).chunk(3, -1)
            h = h + gate * block.mlp(block.in_ln(h) * (1 + scale) + shift)
        shift, scale = head.final_layer.adaLN_modulation(y).chunk(2, -1)
        h = torch.nn.functional.layer_norm(h, h.shape[-1:], eps=1e-6)
        return head.final_layer.linear(h * (1 + scale) + shift)

    x = noise[0]
    for step in range(4):
        eps, variance = network(torch.cat([x, x]), schedule_.timesteps[step]).split(numbers, -1)
        eps = eps[3:] + guidance * (eps[:3] - eps[3:])
        share = (variance[:3] + 1) / 2
        log = share * schedule_.most[step] + (1 - share) * schedule_.least[step]
        x = schedule_.keep[step] * x - schedule_.take[step] * eps
        if step < 3:
            x = x + torch.exp(log / 2) * noise[step + 1] * 0.9
    torch.testing.assert_close(head(z, noise, schedule_, guidance, 0.9), x, rtol=1e-9, atol=1e-9)


def test_a_recorded_head_draws_the_same(model: MAR, plain: list[Step]) -> None:
    """A stand-in for CUDA graphs that does what they do: read and write the same memory each time."""
    captured = []

    def capture(run):
        captured.append(run)
        kept = torch.empty(0)

        def replay() -> Tensor:
            nonlocal kept
            result = run()
            kept = result if not kept.numel() else kept.copy_(result)
            return kept

        return replay

    head = CapturedHead(model.head, capture=capture, device="cpu")
    assert same(draw(model, denoise=head)[-1].latents, plain[-1].latents)
    assert not head.why
    assert len(captured) == 3, "3 and 6, 12 and 15, and 18 tokens: one graph for 8, 16 and 24"
    unused = CapturedHead(model.head)
    assert same(draw(model, denoise=unused)[-1].latents, plain[-1].latents)
    assert "graphs need cuda" in unused.why


def test_denoising_steps_fall_and_start_where_asked() -> None:
    plan = MaskedPlan(steps=64, denoising=50, denoising_last=5, start=950)
    assert [plan.denoising_steps(step) for step in (0, 32, 63)] == [50, 27, 5]
    assert plan.timesteps(63) == (950, 749, 500, 250, 0)
    assert len(plan.timesteps(0)) == 48 and plan.timesteps(0)[:2] == (950, 938), "those above 950 are one"
    assert MaskedPlan().timesteps(0)[0] == 999


# -- what is kept from step to step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_everything_computed_again_is_the_plain_pass(model: MAR, guided: bool) -> None:
    """Through the path of partial steps, with places given in another order for each image."""
    source = torch.Generator().manual_seed(2)
    order = torch.stack([torch.randperm(36, generator=source) for _ in range(2)])
    tokens = torch.randn(2, 36, 4, generator=source).double()
    state = model.begin(class_prompt([1, 3]), order, guided)
    cache = StepCache(
        model.config.step_cache_shape(8), 2, len(state.encoder), dtype=torch.float64, device=order.device, looks=False
    )
    with torch.inference_mode():
        model.conditions(state, Active(3, 4), cache)
        model.feed(state, tokens[:, :4], 0)
        model.conditions(state, Active(7, 3), cache)
        model.feed(state, tokens[:, 4:7], 4)
        rest = torch.tensor([slot for slot in range(39) if not 7 <= slot < 15]).expand(2, -1)
        kept = model.conditions(state, Active(10, 5, new=7), cache)
        again = model.conditions(state, Active(10, 5, new=7, extra=rest), cache)
        plain = model.conditions(state, Active(10, 5))
    assert same(again, plain, 1e-12)
    assert not same(kept, plain, 1e-4), "otherwise this shows nothing"


@pytest.mark.parametrize("rule", RULES)
def test_every_rule(model: MAR, plain: list[Step], rule: str) -> None:
    """With room for all it is the plain pass; with less it computes what it says, and comes near."""
    whole = draw(model, replace(NONE_FULL, rule=rule, refresh=1000))
    assert same(whole[-1].latents, plain[-1].latents) and all(step.full for step in whole)
    assert same(draw(model, StepCachePlan(5, rule, full_every=1))[-1].latents, plain[-1].latents)
    few = draw(model, replace(NONE_FULL, rule=rule, refresh=5))
    assert not same(few[-1].latents, plain[-1].latents, 1e-4)
    copies = 3 if rule == "nearest" else 0
    new = (0, 1, 2, 2, 4, 4, 5, 6, 6)
    wanted = (1, 2, 2, 4, 4, 5, 6, 6, 6)
    counts = [39, *(new[step] + wanted[step] + 5 + copies for step in range(1, 9))]
    assert [step.computed.tolist() for step in few] == [[count] * 3 for count in counts]
    for step in few[1:]:  # a place's age is 0 exactly if it was computed
        assert (step.age == 0).sum() <= 3 * counts[step.step]
        assert (step.age[step.drawn] == 0).all()
    shape = model.config.step_cache_shape(4)
    assert few[0].cache_bytes == 2 * shape.bytes(NONE_FULL, 9, 6), "these are kept in double precision"


def test_full_steps_are_where_the_plan_says() -> None:
    plan = StepCachePlan(full_every=4, full_first=10, full_last=2)
    full = [step for step in range(64) if plan.full(step, 64)]
    assert full == [*range(10), *range(13, 62, 4), 62, 63]
    lazy = STEP_CACHES["LazyMAR"]
    assert [step for step in range(64) if lazy.full(step, 64)] == [0, 1, 2, 3, 4, 13, 22, 31, 40, 49, 58]
    assert not StepCachePlan(full_every=1).keeps(64) and not STEP_CACHES["Off"].keeps(64)
    assert not StepCachePlan(full_first=64).keeps(64) and plan.keeps(64)


def test_the_first_step_of_a_given_picture_is_full(model: MAR, plain: list[Step]) -> None:
    """There is nothing to use yet, whatever the plan says of that step."""
    steps = draw(model, NONE_FULL, given=plain[4].latents)
    assert [step.full for step in steps] == [True, False, False, False]


def test_scores_by_hand() -> None:
    """Two copies and six tokens on a grid of 2 x 3, drawn in raster order; the third and fourth are new."""
    cache = StepCache(StepCacheShape(0, 1, 1, 1, 8, 4), 1, 1, dtype=torch.float32, device="cpu", looks=True)
    cache.age[0] = torch.tensor([5, 1, 4, 2, 0, 0, 3, 3])
    assert cache.mass is not None
    cache.mass[0] = torch.tensor([0.12, 0.1, 0.1, 0.3, 0.0, 0.0, 0.25, 0.15])
    places = torch.stack([torch.arange(6) // 3, torch.arange(6) % 3], -1)[None]
    lot = torch.tensor([[0.1, 0.9, 0.2, 0.3, 0.8, 0.7, 0.4, 0.5]])
    taken = slice(4, 6)
    for rule, count, expected in (
        ("oldest", 2, [0, 2]),
        ("oldest", 3, [0, 2, 7]),
        ("random", 2, [1, 7]),
        ("attention", 2, [3, 6]),
        ("attention x age", 2, [3, 6]),
        ("attention x age", 3, [0, 3, 6]),
        ("nearest", 4, [0, 1, 6, 7]),
    ):
        found = chosen(scores(StepCachePlan(1, rule), cache, taken, places, lot), count, taken)
        assert found.tolist() == [expected], rule


def test_attention_is_that_of_the_queries_named() -> None:
    """Mean over heads, queries and both rows of an image; divided by the layers that add to it."""
    shape = StepCacheShape(1, 2, heads=2, head_dim=4, slots=5, bytes_per_element=8)
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, 2, 5, 4, generator=source).double() for _ in range(3))
    cache = StepCache(shape, 2, 4, dtype=torch.float64, device="cpu", looks=True)
    cache.attend(1, q, k, v, slice(0, 5), look=slice(3, 5))
    expected = (q[:, :, 3:] @ k.transpose(-1, -2) / 2).softmax(-1).mean((1, 2))
    expected = (expected[:2] + expected[2:]) / 2 / 2
    torch.testing.assert_close(cache.mass.double(), expected, rtol=1e-5, atol=1e-6)


def test_work_is_counted_as_it_is_done(model: MAR) -> None:
    """`plan` predicts the slots of each step, and of the transformer's work what the rule makes of it."""
    shape = model.config.step_cache_shape(4)
    for rule in ("oldest", "nearest", "values"):
        cache = StepCachePlan(5, rule, 4, 2, 1)
        work, steps = shape.work(PLAN, cache, 36), draw(model, cache)
        partial = [float(step.computed[0]) for step in steps if not step.full]
        assert work.full == tuple(step.full for step in steps)
        assert work.partial == pytest.approx(sum(partial) / len(partial))
    full = shape.work(PLAN, OFF, 36)
    assert full.rows == sum(2 * (3 + known) + 4 * 39 for known in (0, *PLAN.known(36)[:-1])) and full.partial == 0


def test_forced_conditions_are_those_of_the_loop(model: MAR, plain: list[Step]) -> None:
    found: list[Tensor] = []

    def denoise(z: Tensor, *rest) -> Tensor:
        found.append(z)
        return model.head(z, *rest)

    last = draw(model, NONE_FULL, denoise=denoise)[-1].latents
    forced = list(forced_masked(model, PROMPT, last, SAMPLE, PLAN, NONE_FULL))
    assert all(same(ours, theirs) for ours, theirs in zip(forced, found, strict=True))


def test_nothing_is_kept_for_full_steps(model: MAR) -> None:
    run = Masked(model, PROMPT, SAMPLE, PLAN, OFF, None)
    assert run.cache_bytes == 0 and all(group.cache is None for group in run.groups)


def test_half_precision_stays_near(plain: list[Step]) -> None:
    """The transformer in bfloat16, the head and the residual stream in float32."""
    from linear_core.checkpoints.families.mar import precise

    model = mar(dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if not precise(name):
            parameter.data = parameter.data.bfloat16()
    assert model.dtype == torch.bfloat16
    found = [step.latents for step in draw(model, StepCachePlan(5, "attention x age", 4, 2, 1))]
    assert found[-1].isfinite().all()
    assert same(found[0].nan_to_num(), plain[0].latents.nan_to_num(), 0.05)

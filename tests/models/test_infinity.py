"""Infinity beyond parity: its cache, batches, bits, sizes and dtypes."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch

from linear_core.errors import UserError
from linear_core.events import Stage
from linear_core.grid import Grid
from linear_core.loop.sampling import Noise
from linear_core.loop.scales import forced_scales, generate_scales
from linear_core.models.infinity import PYRAMIDS, pyramid_of
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, class_prompt
from linear_core.pyramid import Pyramid
from linear_core.tokenizers.bits import BitPyramid
from tests.tiny import CAPTION, caption_prompt, infinity

SIDES = ((1, 1), (2, 2), (3, 2), (4, 3), (5, 4))  # 43 tokens, 23 of them ever held
SAMPLE = SamplePlan(seed=3, guidance=2.0, temperature=3.0, top_p=0.97)  # hot: few bits are certain
FULL = CachePlan("full")


@cache
def model(dtype: torch.dtype = torch.float32):
    return infinity(*SIDES, dtype=dtype)


def draw(prompt: Prompt, plan: CachePlan = FULL, sample: SamplePlan = SAMPLE, **more) -> list[Stage]:
    return list(generate_scales(*model(), prompt, plan, sample, **more))


def numbers(stages: list[Stage]) -> torch.Tensor:
    return torch.cat([stage.tokens for stage in stages], 1)


@pytest.mark.parametrize("name", ["full", "line", "fold"])
@torch.inference_mode()
def test_eviction_is_masking(name: str) -> None:
    """Each logit equals that of one uncached pass in which a scale sees itself and what was held before it."""
    decoder, quantizer = model(torch.float64)
    pyramid, prompt = decoder.pyramid, caption_prompt([3, CAPTION], dtype=torch.float64)
    tokens = torch.randint(64, (2, pyramid.tokens), generator=torch.Generator().manual_seed(5))
    held = []
    plan = CachePlan(name, share=0.6, release="strict")
    logits = list(
        forced_scales(
            decoder, quantizer, prompt, tokens, plan,
            lambda stage, cache: held.append(torch.stack([cache.held_by_head(row) for row in range(2)])),
        )
    )  # fmt: skip
    visible = torch.zeros(2, 2, 3, pyramid.tokens, pyramid.tokens, dtype=torch.bool)
    canvas, below = quantizer.empty(2, pyramid).double(), []
    for stage in range(pyramid.stages):
        own = slice(pyramid.index(stage), pyramid.index(stage + 1))
        if stage:
            visible[..., own, :] = held[stage - 1].transpose(0, 1)[..., None, :]
            below.append(quantizer.shrink(pyramid, stage, canvas))
        visible[..., own, own] = True
        canvas = quantizer.add(pyramid, stage, tokens[:, own].unflatten(1, pyramid.sides[stage]), canvas)
    expected = decoder(prompt, below, visible)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-6, rtol=1e-6)  # rotated in float32
    assert (name == "full") == bool(held[-2][..., : pyramid.index(4)].all()), (
        "something was evicted, but by the full cache"
    )


def test_a_batch_is_its_pictures_one_by_one() -> None:
    """Texts of unequal length, guided away from the learned embedding, or from a text of yet another length."""
    texts = caption_prompt([3, CAPTION, 5])
    for prompt in (texts, replace(texts, negative=caption_prompt([2, 4, 4], seed=9))):
        together = draw(prompt)
        assert numbers(together).unique(dim=0).shape[0] == 3
        for row in range(3):
            alone = draw(prompt.select([row]), sample=replace(SAMPLE, seed=SAMPLE.seed + row))
            assert torch.equal(numbers(alone)[0], numbers(together)[row])
            torch.testing.assert_close(alone[-1].canvas[0], together[-1].canvas[row])


def test_padding_is_not_read() -> None:
    """What stands in the padded slots changes nothing."""
    prompt = caption_prompt([3, 5])
    noisy = prompt.tokens.clone()
    noisy[0, : CAPTION - 3], noisy[1, : CAPTION - 5] = 7.0, -3.0
    assert torch.equal(numbers(draw(prompt)), numbers(draw(replace(prompt, tokens=noisy))))


def test_bits_are_drawn_by_their_probability() -> None:
    """Each bit of the first token: likely ones always, and else what the race between its two outcomes says."""
    decoder, _ = model()
    prompt, sample = caption_prompt([3]), SAMPLE
    rows = decoder.with_unconditional(prompt)
    logits = next(iter(forced_scales(*model(), rows, torch.zeros(2, decoder.pyramid.tokens).long(), FULL)))
    guided = (logits[1] + (logits[0] - logits[1]) * sample.guidance)[0].view(6, 2) / sample.temperature
    chance = guided.softmax(-1)
    assert 0 < int((chance.amax(-1) > sample.top_p).sum()) < 6, "top-p decides some bits, and not all"
    for seed in range(40):
        drawn = numbers(draw(prompt, sample=replace(sample, seed=seed), stop_after=1))
        race = guided - Noise(seed, 1, 12, "cpu").exponential(0).view(6, 2).log()
        bits = [int(c.argmax() if c.max() > sample.top_p else r.argmax()) for c, r in zip(chance, race, strict=True)]
        assert int(drawn) == sum(bit << 5 - place for place, bit in enumerate(bits))


@pytest.mark.parametrize("plan", [FULL, CachePlan("fold", share=0.6)])
def test_given_scales_are_replayed(plan: CachePlan) -> None:
    """The rest of a picture follows from its first scales, bit for bit; with another seed only the rest changes."""
    prompt = caption_prompt([3, 5])
    whole, first = draw(prompt, plan), Pyramid(SIDES).index(3)
    again = draw(prompt, plan, given=numbers(whole)[:, :first])
    assert (
        torch.equal(numbers(again), numbers(whole)) and [stage.replayed for stage in again] == [True] * 3 + [False] * 2
    )
    other = numbers(draw(prompt, plan, replace(SAMPLE, seed=50), given=numbers(whole)[:, :first]))
    assert torch.equal(other[:, :first], numbers(whole)[:, :first]) and not torch.equal(other, numbers(whole))


def test_guidance_may_end() -> None:
    """After its interval the conditional rows go on alone, as if there had been no others."""
    prompt, end = caption_prompt([3, 5]), Pyramid(SIDES).index(3)
    guided = draw(prompt)
    part = draw(prompt, sample=replace(SAMPLE, guidance_interval=end - 2))
    assert torch.equal(numbers(part)[:, :end], numbers(guided)[:, :end])
    rest = draw(prompt, sample=replace(SAMPLE, guidance=1.0), given=numbers(guided)[:, :end])
    assert torch.equal(numbers(part), numbers(rest))


def test_another_size_shares_the_weights() -> None:
    decoder, _ = model()
    other = decoder.with_grid(Grid(14, 21))
    assert other.pyramid.sides[-1] == (14, 21) and decoder.pyramid.sides == SIDES
    assert all(a is b for a, b in zip(other.parameters(), decoder.parameters(), strict=True))
    assert decoder.with_grid(None) is decoder
    with pytest.raises(UserError, match="draws no picture of 5 x 7"):
        pyramid_of(Grid(5, 7))


@pytest.mark.parametrize("patch", [1, 2])
def test_a_token_is_its_bits(patch: int) -> None:
    """Numbers become corners and back, the first bit the highest; 56 bits fit; encoding a canvas gives its tokens."""
    channels = 14 if patch == 2 else 32
    quantizer, pyramid = BitPyramid(channels, patch), Pyramid(SIDES)
    bits = channels * patch**2
    tokens = torch.randint(2**bits, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    entries = quantizer.entries(tokens)
    assert entries.shape == (2, channels, 5 * patch, 4 * patch)
    torch.testing.assert_close(entries.square().sum(1), torch.ones(2, 5 * patch, 4 * patch))
    assert torch.equal(quantizer.number(entries), tokens)
    assert (quantizer.entries(torch.tensor([[[1 << bits - 1]]]))[0, 0, 0, 0] > 0).item()  # the first bit
    maps = quantizer.encode(pyramid, torch.randn(1, channels, 5 * patch, 4 * patch))
    assert [tuple(one.shape[1:]) for one in maps] == list(SIDES)
    canvas = quantizer.canvas(pyramid, maps)
    rest = canvas - quantizer.canvas(pyramid, maps[:-1])
    assert torch.equal(quantizer.number(rest), maps[-1])
    assert quantizer.shrink(pyramid, 4, canvas).shape == (1, 20, bits)


def test_blocks_compute_in_half_and_the_rest_does_not() -> None:
    """bfloat16 in the blocks: logits, conditions and canvas stay float32, and close to those of float32."""
    decoder, quantizer = infinity(*SIDES)
    prompt = caption_prompt([3, 5])
    for name, parameter in decoder.named_parameters():
        if name.startswith("blocks.") and not any(part in name for part in ("ada_gss", "ca_norm", "scale_mul")):
            parameter.data = parameter.data.bfloat16()
    tokens = torch.randint(64, (2, decoder.pyramid.tokens), generator=torch.Generator().manual_seed(5))
    assert decoder.dtype == torch.bfloat16
    half, whole = (
        torch.cat(list(forced_scales(one, quantizer, prompt, tokens, FULL)), 1) for one in (decoder, model()[0])
    )
    assert half.dtype == torch.float32
    assert 0 < float((half - whole).abs().max() / whole.abs().max()) < 0.05


@pytest.mark.parametrize(
    ("prompt", "sample", "words"),
    [
        (class_prompt([1]), SAMPLE, "draws from texts; connect a Text Prompt"),
        (caption_prompt([3], places=CAPTION + 2), SAMPLE, "prepared for another model; connect this model"),
        (Prompt(torch.zeros(1, CAPTION, 4), torch.zeros(1).long()), SAMPLE, "gives 4 features per token"),
        (caption_prompt([3]), replace(SAMPLE, smooth=True), "draws single bits, and has no codes to mix"),
    ],
)
def test_what_it_refuses(prompt: Prompt, sample: SamplePlan, words: str) -> None:
    with pytest.raises(UserError, match=words):
        draw(prompt, sample=sample)


def test_published_sizes() -> None:
    """Fifteen shapes of each size, all different, and square ones of 256, 512 and 1024 pixels."""
    last = [pyramid.sides[-1] for pyramids in PYRAMIDS.values() for pyramid in pyramids]
    assert len(set(last)) == 45 and {(16, 16), (32, 32), (64, 64)} <= set(last)
    full = pyramid_of(Grid(64, 64))
    assert (full.tokens, full.kept) == (10521, 6425)

"""The loop of next-scale models: from a prompt to one Stage per scale. One forward pass draws a whole scale."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cache.carried_state import CarriedState
from ..cache.stage_cache import StageCache
from ..cache.view import View
from ..errors import UserError
from ..events import Stage
from ..plan import CachePlan, CacheShape, PrunePlan, SamplePlan
from ..policies import OVER_SCALES, POLICIES, Policy, choose, get_policy
from ..profile import Profile
from ..pyramid import Pyramid
from .memory import fold_pairs
from .pruning import Pruning
from .sampling import Noise, apply_guidance, as_number, filter_logits, not_finite, sample_codes

SCORED = 2**26  # pairs of slots at once where nothing is folded, so that a part's temporaries stay small
ALL_PAIRS = 1536  # slots a head whose pairs the policy `fold` compares; beyond, attention chooses what is folded


class ScaleDecoder(Protocol):
    """What `generate_scales` needs of a model. Shapes are those of models.scales.Scales."""

    pyramid: Pyramid
    codes: int
    digits: int
    outcomes: int
    dtype: torch.dtype
    device: torch.device
    profile: Profile | None
    prunes: bool
    drafter: tuple[Any, int] | None
    carried: tuple[tuple[int, ...], ...]

    def with_grid(self, grid: Any) -> Any: ...
    def cache_shape(self, prompt: int = 0) -> CacheShape: ...
    def with_unconditional(self, prompt: Any) -> Any: ...
    def begin(self, prompt: Any) -> Any: ...
    def select_rows(self, state: Any, rows: int) -> Any: ...
    def stage(self, stage: int, below: Tensor | None, state: Any, cache: Any, **more: Any) -> Tensor: ...
    def guidance(self, stage: int, scale: float) -> float: ...
    def rotate_ahead(self, stage: int, queries: Tensor) -> Tensor: ...


class Quantizer(Protocol):
    """What `generate_scales` needs of a tokenizer. Shapes are those of tokenizers.pyramid.ResidualPyramid.

    `add_mixture` is for models whose tokens are one draw each.
    """

    def empty(self, images: int, pyramid: Pyramid) -> Tensor: ...
    def shrink(self, pyramid: Pyramid, stage: int, canvas: Tensor) -> Tensor: ...
    def add(self, pyramid: Pyramid, stage: int, tokens: Tensor, canvas: Tensor) -> Tensor: ...
    def add_mixture(self, pyramid: Pyramid, stage: int, logits: Tensor, noise: Tensor, canvas: Tensor) -> Tensor: ...


@torch.inference_mode()
def generate_scales(
    decoder: ScaleDecoder,
    quantizer: Quantizer,
    prompt: Any,
    plan: CachePlan,
    sample: SamplePlan,
    *,
    given: Tensor | None = None,
    stop_after: int = 0,
    prune: PrunePlan | None = None,
    name: str = "the model",
) -> Iterator[Stage]:
    """Draw one image for each row of `prompt`; yields a Stage when a scale is finished.

    decoder     if it has a drafter (`with_drafter`), that one draws the first scales
    plan        what the cache keeps, as a share; a model without a cache is drawn the same under every plan
    sample      how tokens are sampled
    given       codes B N, or one image's for all: tokens of the first scales, which exist already. They are passed
                through the model with the same eviction, so the cache is as if they had been drawn
    stop_after  scales that are drawn; the canvas so far is the picture. 0: all
    prune       tokens of the last scales that are not computed; None: all are
    name        what error messages call the model

    Raises UserError before anything is allocated if the settings do not fit the model, and at the end of a scale whose
    logits are not finite. Dropping the iterator frees all memory.
    """
    more: dict[str, Any] = {"prune": prune, "name": name}
    check_sample(decoder, sample, name, paired=decoder.drafter is not None)
    if decoder.drafter is None:
        yield from _draw_scales(decoder, quantizer, prompt, plan, sample, given=given, stop_after=stop_after, **more)
        return
    (drafter, scales), pyramid = decoder.drafter, decoder.with_grid(prompt.grid).pyramid
    check_stop(stop_after, pyramid)
    _, done = _check_given(given, prompt.rows, pyramid, decoder.codes)
    tokens, stop = given, stop_after or pyramid.stages
    if done < scales:
        own: dict[str, Any] = {
            "given": given,
            "stop_after": min(scales, stop),
            "prune": prune if stop <= scales else None,
        }
        drafted: list[Stage] = []
        heads = decoder.cache_shape()
        for stage in _draw_scales(drafter, quantizer, prompt, plan, sample, **own, name="the drafter"):
            # Its layers and heads are others, and only the refiner's are told apart.
            held = (stage.share[0] > 0).expand(heads.layers, heads.heads, -1)
            drafted.append(replace(stage, by_head=held))
            yield drafted[-1]
        tokens = torch.cat([stage.tokens for stage in drafted], 1)
    if stop <= max(scales, done):
        return
    seconds = 0.0
    for stage in _draw_scales(decoder, quantizer, prompt, plan, sample, given=tokens, stop_after=stop_after, **more):
        if stage.replayed and done < scales:  # by the refiner, to fill its cache
            seconds += stage.seconds
            continue
        yield replace(stage, seconds=stage.seconds + seconds)
        seconds = 0.0


def with_drafter(refiner: Any, drafter: Any, scales: int) -> Any:
    """The model `refiner` with its first `scales` scales drawn by `drafter`: CoDe's collaborative decoding.

    Paper: Chen et al., "Collaborative Decoding Makes Visual Auto-Regressive Modeling Efficient", arXiv 2411.17787 (CVPR
    2025); code github.com/czg1225/CoDe (MIT). A large model draws the coarse scales, a small one the fine ones, which
    take most of the time and of the cache. The refiner first passes the given tokens through, scale by scale; the
    published code does so in one pass, with the same result. Its temperatures of single scales are left out.

    Raises UserError if the two do not draw the same codes over the same scales.
    """
    if drafter.pyramid != refiner.pyramid:
        raise UserError(
            f"drafter: it draws scales {drafter.pyramid.text}, the model {refiner.pyramid.text}; choose two models of "
            "the same scales."
        )
    if (drafter.codes, drafter.digits) != (refiner.codes, refiner.digits):
        raise UserError("drafter: its codes are not the model's; choose two models of the same tokenizer.")
    if not 1 <= scales < refiner.pyramid.stages:
        raise UserError(
            f"drafter scales: {scales} is out of range; choose 1 to {refiner.pyramid.stages - 1} of "
            f"{refiner.pyramid.stages}."
        )
    paired = copy.copy(refiner)
    paired.drafter = (drafter, scales)
    return paired


def _draw_scales(
    decoder: ScaleDecoder,
    quantizer: Quantizer,
    prompt: Any,
    plan: CachePlan,
    sample: SamplePlan,
    *,
    given: Tensor | None,
    stop_after: int,
    prune: PrunePlan | None,
    name: str,
) -> Iterator[Stage]:
    """`generate_scales` by one model."""
    decoder = decoder.with_grid(prompt.grid)
    pyramid = decoder.pyramid
    images, device = prompt.rows, decoder.device
    if images < 1:
        raise UserError("prompt: it is empty; give at least one class or text.")
    check_stop(stop_after, pyramid)
    pruning = _pruning(decoder, prune, stop_after, name)
    seeds = sample.image_seeds(images)
    tokens_given, scales_given = _check_given(given, images, pyramid, decoder.codes)
    prompt = prompt.to(device)
    rows = decoder.with_unconditional(prompt) if sample.guided else prompt
    plan = plan.resolve(decoder.cache_shape(), pyramid, rows.rows)
    policy = scale_policy(plan, pyramid)
    cache = scale_cache(decoder, rows.rows, plan, policy, stop_after, name)
    noise = Noise(seeds, images, decoder.digits * decoder.outcomes, device)

    started = time.perf_counter()
    state = decoder.begin(rows)
    canvas = quantizer.empty(images, pyramid).to(device)
    for stage in range(stop_after or pyramid.stages):
        first, size = pyramid.index(stage), pyramid.size(stage)
        if cache.rows > images and not sample.guides(first):
            cache.keep_rows(images)
            state = decoder.select_rows(state, images)
        cache.begin(stage)
        below = quantizer.shrink(pyramid, stage, canvas) if stage else None
        if pruning is not None:
            pruning.begin(stage)
        logits = decoder.stage(stage, below, state, cache, **({} if pruning is None else {"prune": pruning}))
        non_finite = logits.sum() * 0  # NaN and infinity times 0 are NaN
        replayed = stage < scales_given
        if replayed:
            tokens = tokens_given[:, first : first + size].to(device)
        else:
            guided = scale_scores(decoder, logits, stage, images, sample)
            number = torch.arange(first, first + size, device=device)
            race = noise.exponential(number)
            tokens = _draw(decoder, guided, race, sample.temperature)
        if sample.smooth and not replayed:
            canvas = quantizer.add_mixture(pyramid, stage, guided, race, canvas)
        else:
            canvas = quantizer.add(pyramid, stage, tokens.unflatten(1, pyramid.sides[stage]), canvas)
        share, stands = cache.share_held(images), cache.stands_for(images)
        tokens_now = tokens.cpu()  # the only point in a stage where the host waits for the device
        if non_finite != 0:
            raise UserError(not_finite(name, decoder.dtype, f"scale {stage + 1} of {pyramid.stages}"))
        now = time.perf_counter()
        yield Stage(
            stage, pyramid.stages, tokens_now, canvas.cpu(), share.cpu(), round(float(share.sum()) / images, 3),
            now - started, cache.peak, cache.held_by_head(0).cpu(), replayed, None if stands is None else stands.cpu(),
        )  # fmt: skip
        started = time.perf_counter()


@torch.inference_mode()
def forced_scales(
    decoder: ScaleDecoder,
    quantizer: Quantizer,
    prompt: Any,
    tokens: Tensor,
    plan: CachePlan,
    observe: Callable[[int, Any], None] = lambda stage, cache: None,
) -> Iterator[Tensor]:
    """For each scale of the pictures `tokens` B N, the logits of its codes under the plan: float32 B n V.

    Nothing is sampled: every cache sees the same canvas, so differences come from the cache alone.

    prompt   rows as the model is to see them, a whole number of times B: guidance is the caller's business
    observe  called with the stage and the cache after each scale
    """
    decoder = decoder.with_grid(prompt.grid)
    plan = plan.resolve(decoder.cache_shape(), decoder.pyramid, prompt.rows)
    cache = scale_cache(decoder, prompt.rows, plan, scale_policy(plan, decoder.pyramid))
    for stage, logits in enumerate(force(decoder, quantizer, prompt, tokens, cache)):
        yield logits
        observe(stage, cache)


def force(decoder: ScaleDecoder, quantizer: Quantizer, prompt: Any, tokens: Tensor, cache: Any) -> Iterator[Tensor]:
    """`forced_scales` with a given cache, empty: a StageCache, or what has its `begin` and `attend`."""
    pyramid, state = decoder.pyramid, decoder.begin(prompt)
    tokens = tokens.to(decoder.device)
    canvas = quantizer.empty(len(tokens), pyramid).to(decoder.device)
    for stage in range(pyramid.stages):
        cache.begin(stage)
        below = quantizer.shrink(pyramid, stage, canvas) if stage else None
        yield decoder.stage(stage, below, state, cache)
        first = pyramid.index(stage)
        drawn = tokens[:, first : first + pyramid.size(stage)].unflatten(1, pyramid.sides[stage])
        canvas = quantizer.add(pyramid, stage, drawn, canvas)


def scale_policy(plan: CachePlan, pyramid: Pyramid) -> Policy:
    """The plan's policy for a picture drawn in scales. Raises UserError if it, or the plan, needs lines."""
    policy = OVER_SCALES.get(plan.policy) or get_policy(plan.policy)
    if policy.lines:
        raise UserError(f"policy: {plan.policy} {policy.lines}; choose fold for a model that draws in scales.")
    plan.check_scales(pyramid)
    if plan.policy == "fold" and plan.work_slots(pyramid) > ALL_PAIRS:
        return POLICIES["line"]  # what victims are hardly matters once they are folded, and pairs are many
    return policy


def scale_cache(
    decoder: ScaleDecoder, rows: int, plan: CachePlan, policy: Policy, stages: int = 0, name: str = "the model"
) -> StageCache | CarriedState:
    """An empty cache for `rows` sequences of which `stages` scales are drawn (0: all), or for a model without one, the
    state that joins its scales.

    Raises UserError if the model's profile does not fit it.
    """
    shape, dtype, device = decoder.cache_shape(), decoder.dtype, decoder.device
    if decoder.carried:
        return CarriedState(shape, decoder.carried, rows, decoder.pyramid, dtype=dtype, device=device)
    reads = policy.reads | ({"ahead"} if plan.release == "fold" else set())
    found = None
    if policy.profile is not None and decoder.profile is not None:
        decoder.profile.check(shape.layers, shape.heads, decoder.pyramid, name)
        known = policy.profile(decoder.profile, decoder.pyramid).to(device)
        found = known[:, None].expand(-1, rows, *known.shape[1:])
    return StageCache(
        shape, rows, decoder.pyramid, plan, settler(plan, policy), dtype=dtype, device=device, reads=reads,
        survey=policy.survey, found=found, rotate=decoder.rotate_ahead, stages=stages,
    )  # fmt: skip


def surveys(plan: CachePlan, decoder: ScaleDecoder) -> str:
    """A sentence if the plan's policy has to judge heads while it draws, as no profile of the model is there; or ""."""
    policy = get_policy(plan.policy)
    if policy.profile is None or decoder.profile is not None or decoder.carried:
        return ""
    return (
        f"policy {plan.policy} judges the model's heads by the first scales it draws, as there is no profile of them; "
        "`python -m linear_core calibrate MODEL` makes one"
    )


def settler(plan: CachePlan, policy: Policy) -> Callable[[StageCache, list[View]], None]:
    """What a layer does when it holds more than its budget: the policy scores, the others leave.

    The policy sees a part of the layer at a time, as many rows and heads as fit; who leaves is decided over all of it.
    """

    def settle(cache: StageCache, views: list[View]) -> None:
        pairs = fold_pairs(views[0].index.device.type) if plan.release == "fold" else SCORED
        parts = [(number, part) for number, view in enumerate(views) for part in view.parts(pairs)]
        whole = cache.whole(views)
        scores = _all_scores(whole, [(part, policy.score(part)) for _, part in parts])
        keep = None if policy.keep is None else policy.keep(whole, scores, plan)
        victims = choose(
            scores, whole, whole.index.shape[-1] - whole.keeps, anchors=plan.protected(cache.pyramid), recent=0,
            prompt_slots=0, keep=keep,
        )  # fmt: skip
        for number, part in parts:
            own = victims if part.rows is None else victims[:, part.rows, part.heads]
            cache.release(number, part, own.masked_fill(own >= part.index.shape[-1], -1))

    return settle


def _all_scores(whole: View, parts: list[tuple[View, Tensor]]) -> Tensor:
    """The scores of a layer's parts as one: L R H S."""
    if len(parts) == 1 and parts[0][0].rows is None:
        return parts[0][1]
    found = parts[0][1].new_full(whole.index.shape, float("-inf"))
    for part, scores in parts:
        found[:, part.rows, part.heads, : scores.shape[-1]] = scores
    return found


def scale_scores(decoder: ScaleDecoder, logits: Tensor, stage: int, images: int, sample: SamplePlan) -> Tensor:
    """Guided logits of a scale, -inf for codes that may not be drawn: B n V."""
    if len(logits) > images:
        logits = apply_guidance(logits, images, decoder.guidance(stage, sample.guidance))
    draws = logits.unflatten(-1, (decoder.digits, -1))
    return filter_logits(draws, sample.top_k, sample.top_p, sample.temperature).flatten(-2)


def _draw(decoder: ScaleDecoder, logits: Tensor, race: Tensor, temperature: float) -> Tensor:
    """Tokens int64 B n from guided logits and exponential noise, both B n V."""
    if decoder.digits == 1:
        return sample_codes(logits, race, temperature)
    logits, race = (x.unflatten(-1, (decoder.digits, -1)) for x in (logits, race))
    return as_number(sample_codes(logits, race, temperature), decoder.outcomes)


def _pruning(decoder: ScaleDecoder, plan: PrunePlan | None, stop_after: int, name: str) -> Pruning | None:
    """What leaves tokens out, if any are. Raises UserError if the model or the run cannot."""
    if plan is None:
        return None
    if not decoder.prunes:
        raise UserError(f"prune: {name} carries all tokens from scale to scale and leaves none out; leave it out.")
    stages = stop_after or decoder.pyramid.stages
    plan.check(stages, decoder.cache_shape().layers)
    return Pruning(plan, decoder.pyramid, stages)


def check_sample(decoder: ScaleDecoder, sample: SamplePlan, name: str, paired: bool = False) -> None:
    """Raise UserError if the model, or a pair of a drafter and a refiner, cannot sample like that."""
    if sample.smooth and paired:
        raise UserError("smooth: two models hand on tokens, and a mixture of codes is none; switch it off.")
    if sample.smooth and decoder.digits > 1:
        raise UserError(f"smooth: {name} draws single bits, and has no codes to mix; switch it off.")
    if sample.drafts > 0:
        raise UserError(f"drafts: {name} draws a whole scale in one pass, and guesses nothing; set drafts to 0.")


def check_stop(stop_after: int, pyramid: Pyramid) -> None:
    """Raise UserError if there are not so many scales."""
    if not 0 <= stop_after <= pyramid.stages:
        raise UserError(
            f"stop after: {stop_after} is out of range; the model draws {pyramid.stages} scales (0: all of them)."
        )


def _check_given(given: Tensor | None, images: int, pyramid: Pyramid, codes: int) -> tuple[Tensor, int]:
    """`given` for every image, int64 B N, and how many scales it is. Raises UserError if it does not fit."""
    if given is None or given.numel() == 0:
        return torch.empty(images, 0, dtype=torch.int64), 0
    ends = [pyramid.index(n) - pyramid.prompt for n in range(pyramid.stages)]
    if given.ndim != 2:
        raise UserError(
            "tokens: they are lines of another model's picture, but this model draws in scales; give tokens that it "
            "drew itself."
        )
    if given.shape[1] not in ends:
        raise UserError(
            f"tokens: there are {given.shape[1]}, which are no whole scales of the model's ({pyramid.text}); give at "
            f"most {pyramid.stages - 1} scales, from the first one on."
        )
    if len(given) not in (1, images):
        raise UserError(f"tokens: there are {len(given)} pictures, but {images} are drawn; give one, or one for each.")
    if int(given.min()) < 0 or int(given.max()) >= codes:
        raise UserError(f"tokens: they are of another model; this one has codes 0 to {codes - 1}.")
    return given.expand(images, -1), ends.index(given.shape[1])

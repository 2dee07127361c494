"""Drafts change nothing: codes, logits and the cache are those of one token after another, whatever the window.

In double precision, where nothing but the last digits of a logit differs. What float32 adds to that is counted on 200
pictures by `bench/drafts.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.errors import UserError
from linear_core.events import totals
from linear_core.loop.drafts import Drafts, Passes, check, window_size
from linear_core.loop.generate import Run, generate
from linear_core.loop.micro_batches import MicroBatches
from linear_core.plan import AUTO, RELEASES, STORAGES, CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import Prompt, class_prompt
from tests import tiny

ROWS, COLS = 7, 5
SAMPLE = SamplePlan(3, guidance=2.0)
MODELS: dict[str, Callable[[], tuple[Any, Prompt]]] = {
    "class": lambda: (tiny.llamagen(ROWS, COLS, dtype=torch.float64), class_prompt([1, 3])),
    "caption": lambda: (
        tiny.llamagen(ROWS, COLS, text=True, dtype=torch.float64),
        tiny.caption_prompt([4, 2], dtype=torch.float64),
    ),
    "janus": lambda: (tiny.janus(ROWS, COLS, dtype=torch.float64), tiny.words([5, 3])),
    "lumina": lambda: (tiny.lumina(ROWS, COLS, dtype=torch.float64), tiny.lumina_words([5, 3])),
    "toy": lambda: (toy := tiny.Toy(ROWS, COLS, length=4, eol=True, dtype=torch.float64), toy.prompt([4, 2])),
}
BUFFERS = ("bias", "index", "queries", "mass", "count", "target")


class Drawn(NamedTuple):
    tokens: Tensor  # B rows cols
    logits: dict[int, Tensor]  # of each code that was sampled but the first: sequences V
    caches: list[dict[str, Tensor]]  # after each line: every buffer, whole
    run: Run
    numbers: list[list[int]]  # of each image, before each pass


def contents(cache: LineCache) -> dict[str, Tensor]:
    found = {name: getattr(cache, name) for name in BUFFERS}
    for name in ("keys", "values"):
        stored = vars(getattr(cache, name))
        found |= {f"{name} {part}": x for part, x in stored.items() if isinstance(x, Tensor) and part != "table"}
    return {name: x.clone() for name, x in found.items() if x is not None}


class Watched:
    """A decoder, and what it was asked to compute."""

    def __init__(self, decoder: Any):
        self.decoder, self.number = decoder, 0
        self.logits: dict[int, Tensor] = {}
        self.numbers: list[list[int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.decoder, name)

    def prefill(self, prompt: Prompt, cache: LineCache) -> Tensor:
        self.cache = cache
        return self.decoder.prefill(prompt, cache)

    def _after(self, index: Tensor, logits: Tensor) -> Tensor:
        self.logits[int(index[-1]) - self.cache.grid.prompt + 1] = logits
        return logits

    def step(self, token: Tensor, index: Tensor, *given: Any) -> Tensor:
        return self._after(index, self.decoder.step(token, index, *given))

    def feed(self, tokens: Tensor, index: Tensor, *given: Any) -> Tensor:
        return self._after(index, self.decoder.feed(tokens, index, *given))

    def peek(self, *given: Any) -> Any:
        self.window, peeked = self.decoder.peek(*given)
        return self.window, peeked

    def check(self, drafts: Drafts, stop: int) -> None:
        before = drafts.number.tolist()
        assert stop - max(before) >= 0 and min(before) < stop, "a pass with nothing to do"
        check(drafts, stop)
        self.numbers.append(before)
        for row in range(self.cache.rows):
            image = row % drafts.images
            for place in range(int(drafts.number[image]) - before[image]):
                number = before[image] + place + 1
                whole = self.logits.setdefault(number, torch.full_like(self.window[:, 0], float("nan")))
                whole[row] = self.window[row, place]


def draw(model: Any, prompt: Prompt, plan: CachePlan, sample: SamplePlan, **more: Any) -> Drawn:
    watched, caches, run = Watched(model), [], Run()
    for line in generate(watched, prompt, plan, sample, check_drafts=watched.check, **more):
        run.add(line)
        caches.append(contents(watched.cache))
    return Drawn(run.tokens, watched.logits, caches, run, watched.numbers)


def same(ours: Drawn, theirs: Drawn) -> None:
    """The same codes; logits, and all that the cache holds after every line, but for rounding."""
    assert torch.equal(ours.tokens, theirs.tokens)
    assert len(ours.caches) == len(theirs.caches)
    for mine, others in zip(ours.caches, theirs.caches, strict=True):
        assert mine.keys() == others.keys()
        for name in mine:
            torch.testing.assert_close(
                mine[name], others[name], atol=1e-9, rtol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
    compared = ours.logits.keys() & theirs.logits.keys()
    assert len(compared) >= (len(theirs.caches) - 1) * (COLS - 1)
    for number in compared:
        torch.testing.assert_close(ours.logits[number], theirs.logits[number], atol=1e-5, rtol=1e-5)


@cache
def reference(kind: str, plan: CachePlan, sample: SamplePlan) -> tuple[Any, Prompt, Drawn]:
    """One token after another."""
    model, prompt = MODELS[kind]()
    return model, prompt, draw(model, prompt, plan, sample)


def compare(kind: str, plan: CachePlan, sample: SamplePlan, size: int) -> Drawn:
    model, prompt, theirs = reference(kind, plan, sample)
    ours = draw(model, prompt, plan, replace(sample, drafts=size))
    same(ours, theirs)
    assert ours.run.passes == len(ours.numbers) > 0 == theirs.run.passes
    return ours


PLANS = [CachePlan(name, 2, 2, 1) for name in POLICIES] + [
    CachePlan(name, 2, 2, 1, release) for name in ("line", "h2o", "fold", "prefixkv") for release in RELEASES
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.policy}-{plan.release}")
def test_every_policy_and_release(plan):
    compare("class", plan, SAMPLE, 6)


# Releases and storages take turns, so that each pair of all four is met.
WINDOWS = [
    (kind, size, RELEASES[(k + s) % 3], STORAGES[(k + 2 * s) % 3])
    for k, kind in enumerate(MODELS)
    for s, size in enumerate((1, 2, 5, 2 * COLS))
]


@pytest.mark.parametrize(("kind", "size", "release", "storage"), WINDOWS)
def test_every_model_and_window(kind, size, release, storage):
    """Windows within a line, as long as one, and of two; with and without tokens that end a line."""
    compare(kind, CachePlan("h2o" if release != "fold" else "fold", 2, 2, 1, release, storage), SAMPLE, size)


@pytest.mark.parametrize(
    "sample",
    [
        SamplePlan(5, guidance=1.0),
        SamplePlan(5, guidance=3.0, temperature=0.0),
        SamplePlan(5, guidance=3.0, top_k=4, temperature=0.7),
        SamplePlan(5, guidance=1.0, top_p=0.8, temperature=1.5),
        SamplePlan(5, guidance=3.0, top_k=9, top_p=0.9),
    ],
    ids=lambda s: f"{s.guidance}-{s.temperature}-{s.top_k}-{s.top_p}",
)
@pytest.mark.parametrize("kind", ["class", "lumina"])
def test_every_way_of_sampling(kind, sample):
    compare(kind, CachePlan("fold", 2, 2, 1), sample, 5)


@pytest.mark.parametrize(
    ("kind", "interval", "storage"),
    [
        (kind, interval, ("full", "int8")[(k + n) % 2])
        for k, kind in enumerate(("class", "lumina"))
        for n, interval in enumerate((0, 1, 7, 9, 10, 11, 12, 33))
    ],
)
def test_guidance_that_ends(kind, interval, storage):
    """At the first token, within a line and at its last tokens: no window goes across, and then its rows are gone."""
    ours = compare(kind, CachePlan("fold", 2, 2, 1, storage=storage), replace(SAMPLE, guidance_interval=interval), 6)
    fed = sorted({number for numbers in ours.numbers for number in numbers})
    last = ROWS * COLS - 1  # whose code may come with the pass before
    assert interval + 1 in {*fed, last}, "an image went beyond the last token with guidance"


@pytest.mark.parametrize("rows", [1, 3, ROWS - 1])
@pytest.mark.parametrize("kind", ["class", "lumina"])
@pytest.mark.parametrize("interval", [-1, 9])
def test_below_lines_that_are_given(kind, rows, interval):
    model, prompt = MODELS[kind]()
    above = torch.arange(2 * rows * COLS).view(2, rows, COLS) % model.codes
    plan, sample = CachePlan("fold", 2, 2, 1), replace(SAMPLE, guidance_interval=interval)
    theirs = draw(model, prompt, plan, sample, above=above)
    ours = draw(model, prompt, plan, replace(sample, drafts=6), above=above)
    assert torch.equal(ours.tokens, theirs.tokens) and torch.equal(ours.tokens[:, :rows], above)
    for mine, others in zip(ours.caches, theirs.caches, strict=True):
        for name in others:
            torch.testing.assert_close(mine[name], others[name], atol=1e-9, rtol=1e-9)
    assert [line.passes > 0 for line in ours.run.lines] == [row >= rows for row in range(ROWS)]


@pytest.mark.parametrize("kind", ["class", "janus", "lumina"])
def test_images_of_a_batch_do_not_wait_for_each_other_within_a_line(kind):
    """Each is the image that it is alone, and the batch takes as many passes a line as its slowest image."""
    model, prompt = MODELS[kind]()
    plan, sample = CachePlan("fold", 2, 2, 1), replace(SAMPLE, drafts=5)
    both = draw(model, prompt, plan, sample)
    alone = [draw(model, prompt.select([i]), plan, replace(sample, seed=sample.seed + i)) for i in range(2)]
    for i, one in enumerate(alone):
        assert torch.equal(one.tokens[0], both.tokens[i])
    assert any(len(set(numbers)) == 2 for numbers in both.numbers), "they are at different places"
    for line, *others in zip(both.run.lines, *(one.run.lines for one in alone), strict=True):
        assert line.passes <= sum(other.passes for other in others)
        # An image that waits guesses on meanwhile, so the next line may take it fewer passes than alone.
        assert line.passes >= 1


def test_a_static_cache_draws_the_same():
    model, prompt, theirs = reference("class", PLANS[0], SAMPLE)
    assert torch.equal(draw(model, prompt, PLANS[0], replace(SAMPLE, drafts=6), static=True).tokens, theirs.tokens)


def test_micro_batches_report_their_mean():
    model, prompt = MODELS["class"]()
    micro_batches = MicroBatches(prompt, replace(SAMPLE, drafts=5), 1, advice="draw fewer")
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            for line in generate(model, micro_batch.prompt, CachePlan("full"), micro_batch.sample):
                micro_batch.runs[0].add(line)
    (run,), parts = micro_batches.runs, [each.runs[0] for each in micro_batches.done]
    assert run.passes == pytest.approx(sum(part.passes for part in parts) / 2)
    assert run.tokens_per_pass == pytest.approx(ROWS * COLS / run.passes)
    assert torch.equal(run.tokens, reference("class", CachePlan("full"), SAMPLE)[2].tokens)


def test_what_is_told_of_passes():
    """By image, what was checked and right; over lines, as many passes count as much as they are."""
    passes = Passes()
    passes.add([10, 10, 14], [13, 11, 14], [4, 4, 0])  # two right and one wrong, one wrong, one image waits
    passes.add([13, 11, 14], [14, 14, 14], [1, 3, 0])  # nothing to check, two right
    assert (passes.count, passes.checked, passes.right, passes.accepted) == (2, 6, 4, 4 / 6)
    lines = [SimpleNamespace(passes=1, accepted=1.0), SimpleNamespace(passes=3, accepted=0.6)]
    assert totals([*lines, SimpleNamespace(passes=0, accepted=0.0)]) == (4, 0.7)
    assert totals([]) == (0, 0.0)


def test_few_passes_where_every_guess_is_right():
    """A model that always says the same: a pass a window, and none goes across the end of a line."""
    model, prompt = MODELS["class"]()
    model.output.weight.zero_()
    sample = SamplePlan(0, guidance=1.0, temperature=0.0, drafts=COLS)
    ours = draw(model, prompt, CachePlan("full"), sample)
    assert ours.tokens.unique().tolist() == [0] and [line.passes for line in ours.run.lines] == [1] * ROWS
    assert ours.numbers == [[row * COLS] * 2 for row in range(ROWS)]


def test_logits_that_are_not_finite_are_told_of_known_tokens_alone():
    """A guess may lead anywhere; what leads to a known token must be finite."""
    model, prompt = MODELS["class"]()
    plan, sample = CachePlan("line", 2, 2, 1), replace(SAMPLE, drafts=6)
    theirs = reference("class", plan, SAMPLE)[2]

    class Broken(Watched):
        known = False

        def peek(self, *given: Any) -> Any:
            logits, window = super().peek(*given)
            logits[:, 0 if self.known else -1] = float("nan")
            return logits, window

        def check(self, drafts: Drafts, stop: int) -> None:
            drafts.size = 6
            check(drafts, stop)

    broken = Broken(model)
    few = [line.tokens for line in generate(broken, prompt, plan, sample, check_drafts=broken.check)]
    assert torch.equal(torch.stack(few, 1), theirs.tokens)
    broken.known = True
    with pytest.raises(UserError, match=r"not finite .* line 1 of 7"):
        list(generate(broken, prompt, plan, sample, check_drafts=broken.check))


def test_what_cannot_be_drafted_is_said():
    model, prompt = MODELS["class"]()
    with pytest.raises(UserError, match="drafts: -2 is out of range; choose 0"):
        SamplePlan(drafts=-2)
    with pytest.raises(UserError, match=r"drafts: 11 tokens are more than two lines of 5; choose at most 10\."):
        next(generate(model, prompt, CachePlan("full"), SamplePlan(drafts=11)))

    class OneByOne:
        """A decoder that somebody else wrote."""

        grid, codes, dtype, device = model.grid, model.codes, model.dtype, model.device

    with pytest.raises(UserError, match="drafts: this model cannot check several tokens in one pass; set drafts to 0"):
        next(generate(OneByOne(), prompt, CachePlan("full"), SamplePlan(drafts=4)))
    assert window_size(OneByOne(), SamplePlan(drafts=AUTO), 1, model.grid) == 0


def test_by_itself_for_a_single_image_on_a_cpu():
    single = tiny.llamagen(ROWS, 3)
    sizes = [window_size(single, SamplePlan(drafts=AUTO), images, single.grid) for images in (1, 2)]
    assert sizes == [2 * 3, 0], "no more than two lines"
    assert window_size(tiny.llamagen(30, 30), SamplePlan(drafts=AUTO), 1, tiny.llamagen(30, 30).grid) == 8
    assert window_size(single.double(), SamplePlan(drafts=AUTO), 1, single.grid) == 0
    assert window_size(single, SamplePlan(), 1, single.grid) == 0

"""The loop: what stays the same whatever the batch, the padding and the cache, and what it owes to its users."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_core.cache.line_cache import LineCache
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.generate import Run, generate
from linear_core.loop.sampling import Noise, apply_guidance, filter_logits, sample_codes
from linear_core.plan import RELEASES, CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import Prompt, class_prompt
from tests.tiny import CAPTION, CODES, Recorder, Toy, caption_prompt, decode, janus, llamagen, words

PLAN = CachePlan(budget=2, anchors=2, recent=1)
GUIDED = SamplePlan(seed=3, guidance=2.5)
EVERY_WAY = [(name, "strict") for name in POLICIES] + [("line", "lazy"), ("h2o", "lazy")]
every_way = pytest.mark.parametrize(("name", "release"), EVERY_WAY)
# In double precision a batch and its singles differ in the last of 16 digits, so no near-tie between two scores or two
# codes can be decided differently.
DOUBLE = torch.float64


def plan_of(name: str, release: str) -> CachePlan:
    return CachePlan(name, PLAN.budget, PLAN.anchors, PLAN.recent, release)


def same_run(one: Recorder, other: Recorder, rows: list[int], offset: int = 0) -> None:
    """`rows` of `other` are what `one` did: the same logits, tokens and indices held (`other`'s moved by `offset`)."""
    images = [row for row in rows if row < len(other.tokens)]
    assert torch.equal(one.tokens, other.tokens[images])
    for a, b in zip(one.logits, other.logits, strict=True):
        torch.testing.assert_close(a, b[rows], atol=1e-5, rtol=1e-5, equal_nan=True)
    prompts = one.prompt_slots, other.prompt_slots
    for a, b in zip(one.index, other.index, strict=True):
        a, b = (index[..., slots:].sort(-1).values for index, slots in zip((a, b[:, rows]), prompts, strict=True))
        assert torch.equal(torch.where(a >= 0, a + offset, a), b)


# -- the same picture, whatever else is going on -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "plan", [CachePlan("full"), CachePlan(budget=6), CachePlan(budget=5), CachePlan("h2o", 40, 99, 99)]
)
@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_a_full_budget_is_plain_causal_attention(plan, text):
    """With room for every line, whatever the policy, the logits are those of an ordinary causal pass."""
    model = llamagen(6, 5, text=text)
    recorder = decode(model, caption_prompt([3, CAPTION]) if text else class_prompt([1, 3]), plan, GUIDED)
    expected = model.forward(recorder.prompt, torch.stack(recorder.fed, 1))[:, recorder.prompt.length - 1 :]
    torch.testing.assert_close(torch.stack(recorder.logits, 1), expected, atol=2e-5, rtol=1e-5)


@every_way
def test_a_batch_equals_its_singles(name, release):
    """Image i of a batch with seed s is the image of a batch of one with seed s + i: logits, tokens and tokens held."""
    model, labels = llamagen(6, 5, dtype=DOUBLE), [1, 4, 1]
    batch = decode(model, class_prompt(labels), plan_of(name, release), GUIDED)
    for i, label in enumerate(labels):
        alone = decode(
            model, class_prompt([label]), plan_of(name, release), SamplePlan(GUIDED.seed + i, GUIDED.guidance)
        )
        same_run(alone, batch, [i, 3 + i])
    assert not torch.equal(batch.tokens[0], batch.tokens[2]), "the same class with another seed is another picture"


@every_way
def test_a_padded_pair_equals_each_alone(name, release):
    """A short caption beside a longer one, behind padding, gives what it gives alone without padding."""
    model, lengths = llamagen(6, 5, text=True, dtype=DOUBLE), [CAPTION, 3]
    pair = decode(model, caption_prompt(lengths, dtype=DOUBLE), plan_of(name, release), GUIDED)
    for i, length in enumerate(lengths):
        prompt = caption_prompt([length], places=length, dtype=DOUBLE)
        alone = decode(model, prompt, plan_of(name, release), SamplePlan(GUIDED.seed + i, GUIDED.guidance))
        same_run(alone, pair, [i, 2 + i], offset=CAPTION - length)


@every_way
def test_a_padded_pair_equals_each_alone_in_slots_of_its_own(name, release):
    """The same where a prompt token has a slot, positions skip padding and unconditional rows are one token long."""
    lengths = [6, 2]
    toy = Toy(6, 4, length=6, eol=True, dtype=DOUBLE)
    pair = decode(toy, toy.prompt(lengths), plan_of(name, release), GUIDED)
    for i, length in enumerate(lengths):
        small = Toy(6, 4, length=length, eol=True, dtype=DOUBLE)
        sample = SamplePlan(GUIDED.seed + i, GUIDED.guidance)
        same_run(decode(small, small.prompt([length]), plan_of(name, release), sample), pair, [i, 2 + i], 6 - length)


def test_small_caches_start_like_large_ones():
    """The noise is the same whatever is kept, so until the first line leaves the runs are one."""
    model, prompt = llamagen(6, 5), class_prompt([1, 3])
    small, large = decode(model, prompt, PLAN, GUIDED), decode(model, prompt, CachePlan("full"), GUIDED)
    together = (PLAN.budget + 1) * 5
    for number in range(together):
        torch.testing.assert_close(small.logits[number], large.logits[number])
    assert torch.equal(small.tokens[:, :3], large.tokens[:, :3])
    assert not torch.equal(small.logits[together + 1], large.logits[together + 1])


# -- drawing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "sample",
    [
        SamplePlan(5, guidance=3.0),
        SamplePlan(5, guidance=1.0),
        SamplePlan(5, guidance=3.0, top_k=4),
        SamplePlan(5, guidance=3.0, top_p=0.6),
        SamplePlan(5, guidance=3.0, temperature=0.0),
        SamplePlan(5, guidance=3.0, temperature=0.5, top_k=5),
        SamplePlan(5, guidance=3.0, guidance_interval=11),
    ],
    ids=["guided", "plain", "top-k", "top-p", "greedy", "cold", "interval"],
)
@pytest.mark.parametrize("model", ["class", "toy"])
def test_every_token_is_drawn_as_the_plan_says(sample, model):
    """From the recorded logits: guided, restricted, and raced with the noise of (seed + image, token number)."""
    if model == "toy":
        decoder = Toy(5, 4, length=3, eol=True)
        prompt = decoder.prompt([3, 1])
    else:
        decoder, prompt = llamagen(5, 4), class_prompt([1, 3])
    recorder = decode(decoder, prompt, PLAN, sample)
    grid = recorder.cache.grid
    noise = Noise(sample.seed, 2, decoder.codes, "cpu")
    drawn = recorder.tokens
    for number, logits in enumerate(recorder.logits):
        row, column = divmod(number, grid.stride)
        if column == grid.cols:
            continue  # an end-of-line token is not drawn
        scores = apply_guidance(logits, 2, sample.guidance) if sample.guides(number) else logits[:2]
        expected = sample_codes(
            filter_logits(scores, sample.top_k, sample.top_p), noise.exponential(number), sample.temperature
        )
        assert torch.equal(drawn[:, row, column], expected), f"token {number}"


def test_top_p_is_taken_of_the_tempered_shares():
    """Published order: guidance, temperature, top-k, top-p. Heat spreads the mass, so more codes are within it."""
    model = llamagen(4, 4)
    sample = SamplePlan(2, guidance=1.0, temperature=4.0, top_p=0.9)
    recorder = decode(model, class_prompt([0] * 8), CachePlan("full"), sample)
    noise = Noise(sample.seed, 8, CODES, "cpu")
    for number, logits in enumerate(recorder.logits):
        expected = sample_codes(filter_logits(logits / 4.0, 0, 0.9), noise.exponential(number), 1.0)
        assert torch.equal(recorder.tokens.flatten(1)[:, number], expected)


def test_what_is_drawn_is_fed():
    """Each step is fed the token before it, end-of-line tokens too, to both halves alike; the last code to nobody."""
    toy = Toy(4, 3, length=3, eol=True)
    recorder = decode(toy, toy.prompt([3, 1]), PLAN, GUIDED)
    newline = torch.full((2, 4, 1), toy.grid.eol)
    expected = torch.cat([recorder.tokens, newline], 2).flatten(1)
    fed = torch.stack(recorder.fed, 1)
    assert torch.equal(fed, expected[:, :-2].repeat(2, 1))


class OneByOne(Toy):
    """Feeds what it is given together one after the other."""

    def feed(self, tokens: Tensor, index: Tensor, pad: Tensor, columns: Tensor, cache: LineCache) -> Tensor:
        for n in range(len(columns)):
            logits = self.step(tokens[:, n], index[n : n + 1], pad, columns[n : n + 1], cache)
        return logits


@pytest.mark.parametrize(
    ("name", "release", "interval"),
    # 13: guidance ends between a line's last code and its end
    [(*way, (-1, 12, 13, 14)[n % 4]) for n, way in enumerate(EVERY_WAY)],
)
def test_a_lines_end_is_fed_with_its_last_code(name, release, interval):
    """Together they give what they give one after the other, in one call, and the last line's are fed to nobody."""
    sample = SamplePlan(seed=5, guidance=2.5, guidance_interval=interval)
    together, apart = (kind(6, 4, length=4, eol=True, dtype=DOUBLE) for kind in (Toy, OneByOne))
    calls = []

    def step(token: Tensor, *rest: Any) -> Tensor:
        calls.append(token)
        return together.step(token, *rest)

    plan = plan_of(name, release)
    ours = [line.tokens for line in generate(together, together.prompt([4, 2]), plan, sample, step=step)]
    assert len(calls) == 6 * (4 - 1), "a line's end costs no step"
    pair, single = (decode(toy, toy.prompt([4, 2]), plan, sample) for toy in (together, apart))
    assert torch.equal(torch.stack(ours, 1), pair.tokens) and torch.equal(pair.tokens, single.tokens)
    for a, b in zip(pair.logits, single.logits, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
    for a, b in zip(pair.index, single.index, strict=True):
        assert torch.equal(a, b)


def test_seeds_make_pictures():
    """The same seed twice is the same picture; another seed is another one; greedy needs no seed."""
    model, prompt = llamagen(4, 4), class_prompt([1])
    first, again, other = (decode(model, prompt, PLAN, SamplePlan(seed)).tokens for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    greedy = [decode(model, prompt, PLAN, SamplePlan(seed, temperature=0)).tokens for seed in (1, 2)]
    assert torch.equal(*greedy)


# -- guidance ----------------------------------------------------------------------------------------------------------


def test_without_guidance_there_is_no_second_half():
    """Guidance of 1 and less costs nothing: one row an image, and half the cache."""
    model, prompt = llamagen(4, 4), class_prompt([1, 3])
    plain, guided = (decode(model, prompt, PLAN, SamplePlan(guidance=g)) for g in (1.0, 1.5))
    assert (plain.cache.rows, guided.cache.rows) == (2, 4)
    assert {logits.shape[0] for logits in plain.logits} == {2}
    assert 2 * plain.lines[0].cache_bytes == guided.lines[0].cache_bytes


@pytest.mark.parametrize("interval", [0, 3, 7, 17, 27, 28, 40])
@pytest.mark.parametrize(("name", "release"), [("line", "strict"), ("line", "lazy"), ("h2o", "strict")])
def test_guidance_interval_drops_the_unconditional_half(name, release, interval):
    """Token 0 is always guided; token i + 1, which LlamaGen's decode step i draws, is guided up to i = interval.

    After the last guided token the unconditional rows are gone from the cache, and everything goes on as in a run that
    computes both halves to the end, as upstream does, but draws from the conditional logits alone.
    """
    model, prompt, guided = llamagen(6, 5, dtype=DOUBLE), class_prompt([1, 3]), interval + 2

    def conditional_only(number: int, logits: Tensor) -> Tensor:
        return logits if number < guided else logits[:2].repeat(2, 1)  # guidance between equals changes nothing

    plan = plan_of(name, release)
    short = decode(model, prompt, plan, SamplePlan(3, guidance=2.5, guidance_interval=interval))
    whole = decode(model, prompt, plan, SamplePlan(3, guidance=2.5), conditional_only)
    assert torch.equal(short.tokens, whole.tokens)
    for number, (a, b) in enumerate(zip(short.logits, whole.logits, strict=True)):
        assert a.shape[0] == (4 if number < guided else 2)
        torch.testing.assert_close(a[:2], b[:2], atol=1e-5, rtol=1e-5)
    for number, (a, b) in enumerate(zip(short.index, whole.index, strict=True)):  # after token `number` was fed
        assert a.shape[1] == (4 if number + 1 < guided else 2)
        assert torch.equal(a[:, :2].sort(-1).values, b[:, :2].sort(-1).values)
    assert short.cache.rows == (4 if guided >= 30 else 2)


def test_guidance_interval_goes_on_with_the_padding_of_the_rows_that_stay():
    """The same where positions depend on padding, and the rows that go have another one."""
    toy, guided = Toy(5, 4, length=5, dtype=DOUBLE), 8

    def conditional_only(number: int, logits: Tensor) -> Tensor:
        return logits if number < guided else logits[:2].repeat(2, 1)

    prompt = toy.prompt([5, 2])
    short = decode(toy, prompt, PLAN, SamplePlan(3, guidance=2.5, guidance_interval=guided - 2))
    whole = decode(toy, prompt, PLAN, SamplePlan(3, guidance=2.5), conditional_only)
    assert torch.equal(short.tokens, whole.tokens)
    for a, b in zip(short.logits, whole.logits, strict=True):
        torch.testing.assert_close(a[:2], b[:2], atol=1e-5, rtol=1e-5)


# -- what people are told ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "release"), [("class", "strict"), ("class", "lazy"), ("toy", "strict")])
def test_a_line_tells_what_happened(model, release):
    """One Line a row, in order: its tokens, the memory, and the share of layers and heads that hold each token.

    What is held is taken from the cache's record one step later, less the token written by that step.
    """
    if model == "toy":
        decoder = Toy(5, 4, length=3, eol=True)
        prompt = decoder.prompt([3, 1])
    else:
        decoder, prompt = llamagen(5, 4), class_prompt([1, 3])
    recorder = decode(decoder, prompt, CachePlan("line", 2, 2, 1, release), GUIDED)
    grid, cache = recorder.cache.grid, recorder.cache
    assert [(line.row, line.rows) for line in recorder.lines] == [(row, 5) for row in range(5)]
    for line in recorder.lines:
        assert line.tokens.shape == (2, 4) and line.tokens.dtype == torch.int64
        assert line.seconds >= 0
        assert line.cache_bytes == cache.shape.bytes(grid, cache.plan, 4) == cache.keys.nbytes * 2
        ended = (line.row + 1) * grid.stride - 1
        index = recorder.index[min(ended, len(recorder.index) - 1)]
        if release == "strict" and line.row + 1 < grid.rows:
            index = recorder.index[ended + 1]
            index = torch.where(index == grid.index(line.row + 1), -1, index)
        share = torch.zeros(2, grid.tokens)
        for token in range(grid.tokens):
            share[:, token] = (index[:, :2] == grid.prompt + token).any(-1).float().mean((0, 2))
        share = share.view(2, grid.rows, grid.stride)[..., : grid.cols]
        torch.testing.assert_close(line.share, share)
        assert line.held == pytest.approx(float(share.sum()) / 2, abs=1e-3)


def test_strict_holds_exactly_its_budget():
    """`held` climbs by a line until the budget and stays; after the last line nothing is evicted."""
    recorder = decode(llamagen(6, 5), class_prompt([1]), PLAN, GUIDED)
    assert [line.held for line in recorder.lines] == [5, 10, 10, 10, 10, 14]


def test_run_adds_lines_up():
    """Tokens and shares of the rows so far, and the numbers people ask for."""
    run = Run()
    recorder = decode(llamagen(4, 3), class_prompt([1, 2]), PLAN, GUIDED)
    for line in recorder.lines:
        run.add(line)
        assert run.tokens.shape == (2, line.row + 1, 3) and run.shares.shape == (2, line.row + 1, 4, 3)
    assert torch.equal(run.tokens, recorder.tokens)
    assert torch.equal(run.shares[:, 2], recorder.lines[2].share)
    assert run.seconds == sum(line.seconds for line in recorder.lines) > 0
    assert run.tokens_per_second == pytest.approx(24 / run.seconds)
    assert Run().held == 0 and run.held == 6, (
        "two lines of 3; the last line, after which nothing leaves, is not counted"
    )


# -- what the loop leaves behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["closed", "dropped", "exhausted", "failed"])
def test_nothing_is_left_in_memory(how):
    """The cache goes with the iterator: closed early, dropped, run to its end or stopped by an error."""
    model, caches, calls = llamagen(4, 3), [], 0

    def step(token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        nonlocal calls
        calls += 1
        caches[:] = weakref.ref(cache), weakref.ref(cache.keys.data), weakref.ref(cache.queries)
        if how == "failed" and calls == 8:
            raise ZeroDivisionError
        return model.step(token, index, pad, column, cache)

    lines = generate(model, class_prompt([1]), PLAN, GUIDED, step=step)
    next(lines)
    assert all(cache() is not None for cache in caches)
    if how == "closed":
        lines.close()
    elif how == "dropped":
        del lines
    elif how == "exhausted":
        assert len(list(lines)) == 3
    else:
        with pytest.raises(ZeroDivisionError):
            list(lines)
    assert all(cache() is None for cache in caches)


def test_inference_mode_stays_inside():
    """Between two lines the caller's own tensors work as ever."""
    lines = generate(llamagen(4, 3), class_prompt([1]), PLAN, GUIDED)
    next(lines)
    assert not torch.is_inference_mode_enabled()
    x = torch.ones(1, requires_grad=True)
    (x * 2).backward()
    assert x.grad == 2


def test_no_gradient_is_recorded():
    """Weights that could learn cost nothing: neither logits nor the cache carry a history."""
    recorder = decode(llamagen(4, 3).requires_grad_(True), class_prompt([1]), PLAN, GUIDED)
    assert not any(logits.requires_grad for logits in recorder.logits)
    assert not recorder.cache.keys.data.requires_grad and not recorder.cache.values.data.requires_grad


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "prompt", "word"),
    [
        (CachePlan("lin"), class_prompt([1]), "policy: 'lin'"),
        (CachePlan(budget=1, anchors=1, recent=1), class_prompt([1]), "budget: 1 lines"),
        (PLAN, Prompt(torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)), "prompt"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_allocated(plan, prompt, word, monkeypatch):
    """A UserError that names the setting, before a cache exists or the model has run."""

    def never(*_, **__):
        raise AssertionError("allocated first")

    model = llamagen(6, 5)
    monkeypatch.setattr("linear_core.loop.generate.LineCache", never)
    monkeypatch.setattr(model, "prefill", never)
    with pytest.raises(UserError, match=word):
        next(generate(model, prompt, plan, GUIDED))


# -- a compiled step ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("kind", ["llamagen", "janus"])
@pytest.mark.parametrize("release", RELEASES)
def test_the_step_is_one_graph_for_the_whole_image(release, kind):
    """`torch.compile(fullgraph=True, dynamic=False)` captures the static step whole, once.

    A cache that fills, evicts or folds adds no other, and neither does a second image. The graph computes what the
    plain step computes.
    """
    graphs = []

    def capture(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, prompt, plan = llamagen(6, 3, layers=1), class_prompt([1, 3]), plan_of("line", release)
    if kind == "janus":
        model, prompt = janus(6, 3, layers=1), words([5, 3])
    compiled = torch.compile(model.step, backend=capture, fullgraph=True, dynamic=False)
    counts = []
    for seed in (1, 2):
        sample, logits = SamplePlan(seed, guidance=2.0), []

        def step(*inputs, logits=logits):
            logits.append(compiled(*inputs))
            return logits[-1]

        for _ in generate(model, prompt, plan, sample, step=step, static=True):
            counts.append(len(graphs))
        expected = decode(model, prompt, plan, sample).logits[1:]
        torch.testing.assert_close(torch.stack(logits), torch.stack(expected), atol=1e-5, rtol=1e-5)
    assert counts == [1] * 12


def test_a_step_can_be_replaced():
    """`step` takes the decoder's place for every token after the first."""
    model, seen = llamagen(3, 3), []

    def step(token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        seen.append((int(index), int(column), token.shape, pad.shape, cache.grid))
        return model.step(token, index, pad, column, cache)

    assert len(list(generate(model, class_prompt([1, 2]), PLAN, GUIDED, step=step))) == 3
    assert seen == [(1 + n, n % 3, (4,), (4,), Grid(3, 3, prompt=1)) for n in range(8)]


@pytest.mark.parametrize("text", [False, True])
def test_rows_alike_are_prefilled_once(text, monkeypatch):
    """Two prompts, four pictures each, with guidance: three rows in place of sixteen, and the logits of all sixteen."""
    model, seen = llamagen(4, 3, text=text), []
    prompt = caption_prompt([6, 4]) if text else class_prompt([1, 3])
    embed = model.cls_embedding.forward
    rows = model.with_unconditional(prompt.repeat(4))
    expected = model.forward(rows, torch.zeros(16, 0, dtype=torch.int64))[:, -1]
    cache = LineCache(
        model.cache_shape(rows.length), 16, model.grid.after(rows.length), CachePlan("full"), dtype=torch.float32,
        device="cpu",
    )  # fmt: skip
    monkeypatch.setattr(model.cls_embedding, "forward", lambda tokens: seen.append(len(tokens)) or embed(tokens))
    torch.testing.assert_close(model.prefill(rows, cache), expected, atol=1e-5, rtol=1e-5)
    assert seen == [4 if text else 3], "texts of two lengths are guided from two unconditional rows"
    values, weight = cache.values.data, cache.bias[..., 0].exp()
    assert torch.equal(values[:, 8], values[:, 11]) and not torch.equal(values[:, 0], values[:, 4])
    assert weight[0, ::4, 0].tolist() == pytest.approx([6, 4, 6, 4] if text else [1] * 4)

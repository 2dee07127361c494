"""What is recorded and replayed: the step and a line's end. And what must be so for it: within a line nobody waits.

Without a GPU two doubles stand in for one. `unseen` runs the real code on tensors that have a shape and no numbers, so
that whoever asks for a number is found out. `Tape` records operations and replays those alone, on the memory and with
the numbers of the recording, as a graph does.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise, product
from typing import Any, NamedTuple
from weakref import ref

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linear_core.cache.line_cache import LineCache
from linear_core.cache.view import View
from linear_core.loop import generate as loop
from linear_core.loop.drafts import Drafts, check
from linear_core.loop.generate import draw, evict, generate, room_after
from linear_core.loop.graph import CapturedCheck, CapturedEnd, CapturedStep
from linear_core.loop.sampling import Noise
from linear_core.plan import ONLY_SCALES, RELEASES, STORAGES, UNEVEN, CachePlan, SamplePlan
from linear_core.policies import POLICIES, get_policy
from linear_core.prompts import class_prompt
from tests.tiny import janus, llamagen, lumina, lumina_words, words

PROMPT = class_prompt([1, 3])
SAMPLE = SamplePlan(3, guidance=2.0)
MODELS = {
    "llamagen": (llamagen, PROMPT),
    "janus": (janus, words([5, 3])),
    "lumina": (lumina, lumina_words([5, 3])),
}
ASKING = {  # operations that hand the host a number, or a shape that hangs on one
    getattr(torch.ops.aten, name).default for name in ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "equal")
}
EVICTING = [name for name in POLICIES if name != "full"]
# Every policy; releases take turns, and three policies meet each of them.
WAYS = dict.fromkeys(
    [
        *((name, RELEASES[n % len(RELEASES)]) for n, name in enumerate(EVICTING)),
        *product(("line", "h2o", "fold"), RELEASES),
    ]
)


def in_turns(name: str, values: Sequence[Any]):
    """Every model in every storage; `values` take turns, so that each meets every model and every storage."""
    pairs = product(enumerate(MODELS), enumerate(STORAGES))
    return pytest.mark.parametrize(
        (name, "kind", "storage"), [(values[(k + s) % len(values)], kind, storage) for (k, kind), (s, storage) in pairs]
    )


# -- nobody waits within a line ----------------------------------------------------------------------------------------


class OnDevice(TorchDispatchMode):
    """Every tensor must be on "meta", where there are no numbers: one elsewhere comes from the host or goes there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            assert not isinstance(x, Tensor) or x.device.type == "meta", f"{func} on {x.device}"
        return result


class NothingSent(TorchFunctionMode):
    """No tensor is made of numbers of the host, nor indexed by a list of them: on a GPU that is a copy to wait for."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.tensor, torch.as_tensor, torch.from_numpy), f"{func} sends numbers"
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            places = args[1] if isinstance(args[1], tuple) else args[1:2]
            assert not any(isinstance(x, list) for x in places), "a list sends numbers"
        return func(*args, **(kwargs or {}))


@contextmanager
def unseen():
    with torch.no_grad(), OnDevice(), NothingSent():
        yield


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: x.sum().item(),
        lambda x: int(x[0]),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: max(x[0], 3),
        lambda x: x.tolist(),
        lambda x: x[: x.argmax()],
        lambda x: torch.arange(x[0], 9, device=x.device),
        lambda x: torch.tensor([3], device=x.device),
        lambda x: x.cpu(),
        lambda x: x + torch.ones(4),
        lambda x: x * torch.tensor(2.0),
        lambda x: x[[0, 1]],
        lambda x: x[None, [0, 1]],
    ],
)
def test_who_waits_is_found_out(ask):
    with unseen(), pytest.raises((AssertionError, RuntimeError, NotImplementedError, TypeError)):
        ask(torch.zeros(4, device="meta"))


def without_numbers(kind: str, plan: CachePlan):
    """A model and its cache on "meta", after the prompt: the model, the cache, the turn of its queries, images."""
    make, prompt = MODELS[kind]
    model = make(5, 4, layers=1).to("meta")
    grid, shape = model.grid.after(prompt.length), model.cache_shape(prompt.length)
    reads = get_policy(plan.policy).reads | ({"ahead"} if plan.release == "fold" else set())
    cache = LineCache(shape, 2 * prompt.rows, grid, plan, dtype=model.dtype, device=model.device, reads=reads)
    cache.extend()
    return model, cache, partial(model.rotate_ahead, grid), prompt.rows


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("kind", MODELS)
def test_nobody_waits_within_a_line(kind, storage):
    """A token is drawn and fed, then the last code with what ends the line, without a number from the device."""
    model, cache, _, images = without_numbers(kind, CachePlan("line", 2, 2, 1, storage=storage))
    sample, noise = SamplePlan(3, guidance=2.0, top_k=5, top_p=0.9), Noise(3, images, model.codes, model.device)
    logits = torch.zeros(cache.rows, model.codes, device=model.device)
    pad = torch.zeros(cache.rows, dtype=torch.int64, device=model.device)
    index, columns = (torch.arange(n, n + 4, device=model.device) for n in (cache.grid.prompt, 0))
    with unseen():
        token = draw(logits, 0, images, sample, noise).repeat(2)
        logits = model.step(token, index[:1], pad, columns[:1], cache)
        token = draw(logits, 1, images, sample, noise).repeat(2)
        model.feed(token[:, None].expand(-1, 2), index[2:], pad, columns[2:], cache)


@in_turns("release", RELEASES)
def test_nobody_waits_within_a_pass(kind, storage, release):
    """Drafts are checked, accepted and guessed anew without a number from the device."""
    model, cache, _, images = without_numbers(kind, CachePlan("fold", 2, 2, 1, release, storage))
    sample, noise = SamplePlan(3, guidance=2.0, top_k=5, top_p=0.9), Noise(3, images, model.codes, model.device)
    pad = torch.zeros(cache.rows, dtype=torch.int64, device=model.device)
    drafts = Drafts(model, cache, sample, noise, pad, images, 3)
    with unseen():
        drafts.begin(0, drafts.number)
        check(drafts, 4)
        check(drafts, torch.full((), 4, device=model.device))


@pytest.mark.parametrize(
    ("name", "release", "kind", "storage"),
    [("full", "strict", "llamagen", "full")]
    + [(name, release, "llamagen", "full") for name, release in WAYS if name not in UNEVEN]
    + [
        (name, "fold", "llamagen", "full") for name in sorted(UNEVEN - ONLY_SCALES)
    ]  # slow, and how they let go asks nothing more
    + [("fold", release, kind, "int8") for release in RELEASES for kind in MODELS],
)
def test_nobody_waits_at_a_lines_end(name, release, kind, storage):
    """Lines end without a number from the device: while there is room, with a survey, and as one is recorded."""
    plan, policy = CachePlan(name, 1, 1, 0, release, storage), get_policy(name)
    _, cache, rotate, _ = without_numbers(kind, plan)
    with unseen():
        room_after(cache, policy, rotate, 0, cache.grid.stride)
        for column in plan.ends(cache.grid, 1):
            room_after(cache, policy, rotate, 1, column)
        if plan.evicts(cache.grid):
            evict(cache, policy, torch.full((), 2, device=cache.bias.device), rotate)


def test_a_line_asks_for_numbers_at_its_end_alone(monkeypatch):
    """The whole loop, by what it asks real tensors for: nothing between a line's first token and its end."""
    asked, told = [], []

    class Asked(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in ASKING:
                asked.append(func)
            return func(*args, **(kwargs or {}))

    def ended(*args, **kwargs):
        told.append(len(asked))
        room_after(*args, **kwargs)
        told.append(len(asked))

    monkeypatch.setattr(loop, "room_after", ended)
    model = llamagen(6, 5)
    sample = SamplePlan(3, guidance=2.0, guidance_interval=12, top_k=5, top_p=0.9)
    lines = generate(model, PROMPT, CachePlan("line", 2, 1, 1), sample)
    with Asked():
        next(lines)  # the prompt is looked at as it comes in
        for _ in range(4):
            before = len(asked)
            next(lines)
            assert told[-2:] == [before, before] and len(asked) > before


# -- recorded and replayed ---------------------------------------------------------------------------------------------


class Tape(TorchDispatchMode):
    """A graph without a GPU. Recording leaves no trace, as a graph's does not compute; what asks for a number fails.

    Operations are written down with the tensors that they met and replayed on those, whatever Python would do by then.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded = self.replayed = 0

    def __call__(self, run):
        self.recorded += 1
        self.operations, self.before = [], {}
        with self:
            result = run()
        for storage, numbers in self.before.values():
            storage.copy_(numbers)
        return partial(self.replay, self.operations, result)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in ASKING:
            raise RuntimeError("operation not permitted when stream is capturing")
        for x in tree_leaves((args, kwargs)):
            if (
                isinstance(x, Tensor)
                and x.layout == torch.strided
                and (storage := x.untyped_storage()).data_ptr() not in self.before
            ):
                self.before[storage.data_ptr()] = storage, storage.clone()
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result

    def replay(self, operations, result):
        self.replayed += 1
        for func, args, kwargs, place in operations:
            for old, new in zip(tree_leaves(place), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # else it is a view, or done in place
                    old.copy_(new)
        return result


class Seen(NamedTuple):
    tokens: Tensor  # B rows cols
    logits: list[Tensor]  # of every token that was fed by a step
    held: list[Tensor]  # by line, the tokens held: L B H S


def drawn(model, prompt, plan, sample, step=None, line_end=None, static=True, above=None) -> Seen:
    """A picture, and what could tell whether the cache that drew it was another."""
    logits, held, caches = [], [], []

    def watched(*inputs):
        logits.append((step or model.step)(*inputs).clone())
        caches.append(inputs[-1])
        return logits[-1]

    lines = []
    for line in generate(model, prompt, plan, sample, step=watched, line_end=line_end, static=static, above=above):
        lines.append(line.tokens)
        held.extend(cache.index.clone() for cache in caches[-1:])  # none yet where the line was given
    return Seen(torch.stack(lines, 1), logits, held)


def same(ours: Seen, theirs: Seen) -> None:
    """To the bit."""
    assert torch.equal(ours.tokens, theirs.tokens)
    for a, b in zip([*ours.logits, *ours.held], [*theirs.logits, *theirs.held], strict=True):
        assert torch.equal(a, b)


def captured(model) -> tuple[CapturedStep, CapturedEnd, Tape, Tape]:
    first, second = Tape(), Tape()
    step = CapturedStep(model.step, capture=first, device="cpu")
    return step, CapturedEnd(evict, capture=second, device="cpu"), first, second


def parts_of(plan: CachePlan, model) -> int:
    """How often room is made in a line once the cache is full: each time has a graph of its own."""
    return len(plan.ends(model.grid, plan.budget + 1))


@pytest.mark.parametrize(("name", "release"), WAYS)
def test_a_recorded_line_end_draws_the_same(name, release):
    """Every policy, over more lines than the budget: recorded at the first eviction, replayed at all that follow."""
    model, plan = llamagen(7, 4), CachePlan(name, 2, 2, 1, release)
    _, end, _, tape = captured(model)
    same(drawn(model, PROMPT, plan, SAMPLE, line_end=end), drawn(model, PROMPT, plan, SAMPLE))
    # Lines 2 to 5 evict: the first of them is done as it is. Two folded lines make room several times a line.
    parts = parts_of(plan, model)
    assert (tape.recorded, tape.replayed, end.why) == (parts, 3 * parts, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_both_recorded_draw_the_same_in_half_precision(dtype):
    model, plan = llamagen(6, 4, dtype=dtype), CachePlan("fold", 2, 2, 1, storage="int8")
    step, end, *_ = captured(model)
    same(drawn(model, PROMPT, plan, SAMPLE, step, end), drawn(model, PROMPT, plan, SAMPLE))
    assert (step.why, end.why) == ("", "")


@in_turns("name", ["fold", "headkv"])
def test_both_recorded_draw_the_same(name, kind, storage):
    """Step and line's end, of every model, in every storage; a second picture with the same two is recorded anew."""
    make, prompt = MODELS[kind]
    model, plan = make(7, 4), CachePlan(name, 2, 2, 1, storage=storage)
    step, end, *tapes = captured(model)
    for seed in (3, 4):
        sample = SamplePlan(seed, guidance=2.0)
        same(drawn(model, prompt, plan, sample, step, end), drawn(model, prompt, plan, sample))
    assert (step.why, end.why) == ("", "")
    # Lumina's last code of a line is fed with the line's end, not as a step; nothing is drawn after the last code.
    fed = 7 * 4 - 1 if kind != "lumina" else 7 * 3
    parts = parts_of(plan, model)
    assert [(t.recorded, t.replayed) for t in tapes] == [(2, 2 * (fed - 1)), (2 * parts, 2 * 3 * parts)]


@pytest.mark.parametrize("name", ["line", "fold", "h2o", "cake", "ssd"])
def test_recorded_anew_when_rows_are_dropped(name):
    """Guidance ends in the middle of a line, after the first evictions: the graphs of all rows would be wrong."""
    model, plan, sample = llamagen(9, 4), CachePlan(name, 2, 2, 1), SamplePlan(3, guidance=2.0, guidance_interval=17)
    step, end, *tapes = captured(model)
    same(drawn(model, PROMPT, plan, sample, step, end), drawn(model, PROMPT, plan, sample))
    # Of 35 steps, and of 6 evictions at lines 2 to 7, the first and the first without guidance's rows are not replayed.
    parts = parts_of(plan, model)
    assert [(t.recorded, t.replayed) for t in tapes] == [(2, 33), (2 * parts, 4 * parts)]


@pytest.mark.parametrize("name", ["line", "fold", "h2o", "cake", "prefixkv"])
@pytest.mark.parametrize("rows", [1, 5])
def test_recorded_below_rows_that_are_given(name, rows):
    """Rows given above end as others do: the first eviction may be one of theirs."""
    model, plan = llamagen(8, 4), CachePlan(name, 2, 2, 1)
    above = torch.arange(2 * rows * 4).view(2, rows, 4) % model.codes
    step, end, *tapes = captured(model)
    parts = parts_of(plan, model)
    same(drawn(model, PROMPT, plan, SAMPLE, step, end, above=above), drawn(model, PROMPT, plan, SAMPLE, above=above))
    given = [end - start for row in range(rows) for start, end in pairwise([0, *plan.ends(model.grid, row)])]
    steps = (8 - rows) * 4 - 1 + given.count(1)  # a single token is fed as a step
    assert [(t.recorded, t.replayed) for t in tapes] == [(1, steps - 1), (parts, 4 * parts)]


@in_turns("how", [("fold", "fold"), ("h2o", "lazy")])
def test_recorded_passes_draw_the_same(how, kind, storage):
    """A pass over drafts has one shape for the whole image: recorded once, and once more when rows are dropped.

    Where room is made in parts of a line, each part has its own, as it has its own slots.
    """
    (make, prompt), (name, release) = MODELS[kind], how
    model, plan = make(7, 4), CachePlan(name, 2, 2, 1, release, storage)
    for interval in (-1, 13):
        sample, tape, places = SamplePlan(3, guidance=2.0, guidance_interval=interval, drafts=5), Tape(), set()
        passes = CapturedCheck(check, capture=tape, device="cpu")

        def noted(drafts, stop, passes=passes, places=places):
            places.add((drafts.cache.rows, drafts.cache.part))
            passes(drafts, stop)

        lines = list(generate(model, prompt, plan, sample, check_drafts=noted, static=True))
        ours = torch.stack([line.tokens for line in lines], 1)
        eager = list(generate(model, prompt, plan, sample, static=True))
        assert torch.equal(ours, torch.stack([line.tokens for line in eager], 1)) and passes.why == ""
        assert [line.passes for line in lines] == [line.passes for line in eager]
        recorded = len(places)
        assert name == "fold" or recorded == (1 if interval < 0 else 2)
        assert (tape.recorded, tape.replayed) == (recorded, sum(line.passes for line in lines) - recorded)


def test_nothing_is_recorded_while_lines_are_free():
    model = llamagen(5, 4)
    for plan in (CachePlan("full"), CachePlan("line", 4, 2, 1)):
        step, end, tape, other = captured(model)
        same(drawn(model, PROMPT, plan, SAMPLE, step, end), drawn(model, PROMPT, plan, SAMPLE))
        assert (tape.recorded, other.recorded, end.why) == (1, 0, "")


def test_what_a_recorded_step_returned_stays():
    """The graph's own memory is written over by the next token."""
    model, kept = llamagen(4, 3), []
    captured_step, *_ = captured(model)

    def step(*inputs):
        kept.append((captured_step(*inputs), model.step(*inputs)))
        return kept[-1][0]

    drawn(model, PROMPT, CachePlan("line", 2, 1, 1), SAMPLE, step)
    for replayed, plain in kept:
        assert torch.equal(replayed, plain)


def test_a_recording_does_not_keep_the_cache():
    """Or the next picture's would have to lie beside it."""
    model, caches = llamagen(6, 4), []
    # What replays is made without the work, as a graph is: only the recording itself could hold the cache.
    step = CapturedStep(model.step, capture=lambda run: lambda: torch.zeros(4, model.codes), device="cpu")
    end = CapturedEnd(evict, capture=lambda run: lambda: None, device="cpu")

    def watched(*inputs):
        caches.append(ref(inputs[-1]))
        return step(*inputs)

    for _ in generate(model, PROMPT, CachePlan("line", 2, 1, 1), SAMPLE, step=watched, line_end=end, static=True):
        pass
    gc.collect()
    assert caches[-1]() is None and (step.why, end.why) == ("", "")


# -- what is not recorded ----------------------------------------------------------------------------------------------


def test_what_is_not_recorded_says_why():
    model, plan = llamagen(4, 3), CachePlan("line", 2, 1, 1)
    for make, static, words_of in (
        (partial(dict), True, ("cuda", "cuda")),
        (partial(dict, device="cpu"), False, ("grows", "")),
    ):
        tapes = Tape(), Tape()
        step, end = CapturedStep(model.step, capture=tapes[0], **make()), CapturedEnd(evict, capture=tapes[1], **make())
        drawn(model, PROMPT, plan, SAMPLE, step, end, static=static)
        for work, word in zip((step, end), words_of, strict=True):
            assert word in work.why and bool(word) == bool(work.why)


def test_a_recording_that_fails_costs_no_picture(monkeypatch):
    """A policy that asks for a number cannot be recorded: its lines end as they are, tried once, and `why` says so."""

    def asks(view: View) -> Tensor:
        return view.index.float() % (2 + int(view.index.max()) % 3)

    monkeypatch.setitem(POLICIES, "line", replace(POLICIES["line"], score=asks))
    model, plan = llamagen(8, 4), CachePlan("line", 2, 2, 1)
    step, end, _, tape = captured(model)
    same(drawn(model, PROMPT, plan, SAMPLE, step, end), drawn(model, PROMPT, plan, SAMPLE))
    assert "not permitted when stream is capturing" in end.why and (tape.recorded, tape.replayed) == (1, 0)
    assert step.why == ""


def test_an_error_of_the_work_is_no_failed_recording():
    """What goes wrong in the work itself comes out as it is."""

    def broken(*args):
        raise RuntimeError("a cable was pulled")

    model = llamagen(6, 4)
    with pytest.raises(RuntimeError, match="a cable was pulled"):
        drawn(model, PROMPT, CachePlan("line", 2, 2, 1), SAMPLE, line_end=CapturedEnd(broken, device="cpu"))


# -- the same with real graphs -----------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "storage"),
    [*product((torch.float32, torch.bfloat16), STORAGES), (torch.float16, "full")],
    ids=str,
)
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", POLICIES)
def test_cuda_graphs_draw_the_same(name, release, dtype, storage):
    """Whole pictures; guidance's rows are dropped in the middle, and in float32 a second picture is recorded anew."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, plan = llamagen(8, 5, dtype=dtype).cuda(), CachePlan(name, 2, 2, 1, release, storage)
    step, end = CapturedStep(model.step), CapturedEnd(evict)
    for seed in (3, 4)[: 2 if dtype == torch.float32 else 1]:
        sample = SamplePlan(seed, guidance=2.0, guidance_interval=22)
        same(drawn(model, PROMPT, plan, sample, step, end), drawn(model, PROMPT, plan, sample))
    assert (step.why, end.why) == ("", "")


@pytest.mark.gpu
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("release", RELEASES)
def test_cuda_graphs_of_drafts_draw_the_same(release, storage):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    model, plan = llamagen(8, 5).double().cuda(), CachePlan("fold", 2, 2, 1, release, storage)
    sample, passes = SamplePlan(3, guidance=2.0, guidance_interval=22), CapturedCheck(check)
    plain = drawn(model, PROMPT, plan, sample).tokens
    for size in (2, 6):
        lines = generate(model, PROMPT, plan, replace(sample, drafts=size), check_drafts=passes, static=True)
        assert torch.equal(torch.stack([line.tokens for line in lines], 1), plain) and passes.why == ""


@pytest.mark.gpu
@pytest.mark.parametrize("kind", MODELS)
def test_cuda_graphs_draw_the_same_with_every_model(kind):
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    make, prompt = MODELS[kind]
    model, plan = make(7, 4).cuda(), CachePlan("fold", 2, 2, 1)
    step, end = CapturedStep(model.step), CapturedEnd(evict)
    same(drawn(model, prompt, plan, SAMPLE, step, end), drawn(model, prompt, plan, SAMPLE))
    assert (step.why, end.why) == ("", "")

"""The same seed draws the same codes, whatever else is going on.

To the bit where the shapes are the same: a run again, runs that take turns, previews or none. With other shapes (a
batch of another size, a static or compiled step, lines that are fed at once) matrix products add up in another order,
so float32 logits differ in their last digits, by less than ROUNDING here. A code can then come out otherwise only where
two of them are that close in the race; the codes are compared on several seeds, the logits at every step. In double
precision the same comparisons (test_generate.py, test_replay.py) show that nothing but rounding differs.
"""

from __future__ import annotations

import importlib
import multiprocessing
import platform
import shutil
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from linear_core.loop.generate import generate
from linear_core.loop.micro_batches import MicroBatches
from linear_core.models import packed
from linear_core.models.quantised import INT8, quantise_model
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import Prompt, class_prompt
from tests import tiny
from tests.nodes.test_nodes import PACK, comfy, one, run, small  # noqa: F401 (fixtures)
from tests.nodes.test_nodes import CachePlan as HostPlan

ROWS, COLS = 7, 6
LABELS = [1, 4, 1, 3, 0]
MOST = len(LABELS)  # images at once
SEEDS = (0, 2**40)
ROUNDING = 5e-5
PLANS = [
    CachePlan("full"),
    CachePlan("line", 2, 2, 1),
    CachePlan("h2o", 2, 2, 1, "lazy"),
    CachePlan("fold", 2, 2, 1),
    CachePlan("fold", 2, 2, 1, storage="int8"),
]
MODELS: dict[str, Callable[[], tuple[Any, Callable[[int], Prompt]]]] = {
    "llamagen": lambda: (tiny.llamagen(ROWS, COLS), lambda images: class_prompt(LABELS[:images])),
    "janus": lambda: (tiny.janus(ROWS, COLS), lambda images: tiny.words([5, 3, 7, 5, 4][:images])),
    "lumina": lambda: (tiny.lumina(ROWS, COLS), lambda images: tiny.lumina_words([5, 3, 7, 5, 4][:images])),
}


def name_of(value: Any) -> str | None:
    return f"{value.policy}-{value.release}-{value.storage}" if isinstance(value, CachePlan) else None


# Every model with every plan. Seeds take turns, so that each of them meets every plan and every model.
every_run = pytest.mark.parametrize(
    ("kind", "plan", "seed"),
    [(kind, plan, SEEDS[(m + p) % 2]) for m, kind in enumerate(MODELS) for p, plan in enumerate(PLANS)],
    ids=name_of,
)


def draw(
    model: Any, prompt: Prompt, plan: CachePlan, sample: SamplePlan, step=None, **more: Any
) -> tuple[Tensor, Tensor]:
    """Codes B rows cols, and the logits of every step, sequences first."""
    logits: list[Tensor] = []
    own = step or model.step

    def watched(*given: Any) -> Tensor:
        logits.append(own(*given))
        return logits[-1]

    lines = [line.tokens for line in generate(model, prompt, plan, sample, step=watched, **more)]
    return torch.stack(lines, 1), torch.stack(logits, 1)


@cache
def reference(kind: str, plan: CachePlan, seed: int) -> tuple[Any, Callable[[int], Prompt], Tensor, Tensor]:
    """All images at once, eager."""
    model, prompt = MODELS[kind]()
    return model, prompt, *draw(model, prompt(MOST), plan, SamplePlan(seed, guidance=2.5))


def close(plan: CachePlan, ours: Tensor, theirs: Tensor) -> None:
    """A key that is nearly between two of the 255 steps of int8 goes up or down with the last digit: a whole step."""
    torch.testing.assert_close(ours, theirs, atol=0.1 if plan.storage == "int8" else ROUNDING, rtol=0)


@every_run
def test_batches_of_any_size(kind, plan, seed):
    """The same codes; the same logits but for rounding."""
    model, prompt, codes, logits = reference(kind, plan, seed)
    for images in (1, 2):
        found, theirs = draw(model, prompt(images), plan, SamplePlan(seed, guidance=2.5))
        assert torch.equal(found, codes[:images])
        close(plan, theirs, logits[[*range(images), *range(MOST, MOST + images)]])


@pytest.mark.skipif(
    not packed.available() or platform.machine() not in ("x86_64", "AMD64"), reason="known of oneDNN on x86 alone"
)
@pytest.mark.parametrize(
    ("kind", "plan", "guidance"),
    [
        (kind, plan, (1.0, 2.5)[(m + p) % 2])
        for m, kind in enumerate(("llamagen", "janus"))
        for p, plan in enumerate(PLANS)
    ],
    ids=name_of,
)
def test_batches_of_any_size_to_the_bit_where_matrices_are_packed(kind, plan, guidance):
    """oneDNN adds up a row in the same order however many there are; prompts are equally long, or more would differ."""
    model = MODELS[kind]()[0]
    assert packed.pack(model)
    prompt = (lambda n: class_prompt(LABELS[:n])) if kind == "llamagen" else (lambda n: tiny.words([5] * n))
    sample = SamplePlan(7, guidance=guidance)
    codes, logits = draw(model, prompt(MOST), plan, sample)
    for images in (1, 2):
        found, theirs = draw(model, prompt(images), plan, sample)
        rows = [*range(images), *(range(MOST, MOST + images) if sample.guided else ())]
        assert torch.equal(found, codes[:images]) and torch.equal(theirs, logits[rows])


OWN = (7, 3, 2**40, 3, 2**64 - 1)  # a seed for each image


def share_of(rows: list[int]) -> list[list[list[int]]]:
    """The codes of these images, as one of several processes draws them."""
    torch.set_num_threads(1)  # a forked process has only this thread
    model, sample = tiny.llamagen(ROWS, COLS).double(), SamplePlan(guidance=2.5, seeds=OWN)
    prompt = class_prompt([LABELS[i] for i in rows])
    drawn = list(generate(model, prompt, CachePlan("fold", 2, 2, 1), sample.select(rows)))
    return torch.stack([line.tokens for line in drawn], 1).tolist()


def test_seeds_of_their_own_make_a_split_over_processes_invisible():
    """Four processes draw parts of unequal size, in an order of their own: the codes are those of one process."""
    whole, parts = share_of([*range(MOST)]), [[4], [1, 3], [2], [0]]
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with context.Pool(len(parts)) as pool:
        found = pool.map(share_of, parts, chunksize=1)
    for rows, codes in zip(parts, found, strict=True):
        assert codes == [whole[i] for i in rows]
    assert whole[1] != whole[3], "the same seed, but another class"


@pytest.mark.parametrize(("plan", "seed"), [(plan, SEEDS[p % 2]) for p, plan in enumerate(PLANS)], ids=name_of)
def test_micro_batches(plan, seed):
    """However many at once."""
    model, prompt, codes, _ = reference("llamagen", plan, seed)
    for at_once in (1, 2, 4):
        micro_batches = MicroBatches(prompt(MOST), SamplePlan(seed, guidance=2.5), at_once, advice="draw fewer")
        for micro_batch in micro_batches:
            with micro_batches.watch(micro_batch):
                for line in generate(model, micro_batch.prompt, plan, micro_batch.sample):
                    micro_batch.runs[0].add(line)
        assert torch.equal(micro_batches.runs[0].tokens, codes)


@every_run
def test_again_to_the_bit(kind, plan, seed):
    """A second run, and two that take turns line by line, with a model made anew."""
    _, _, codes, logits = reference(kind, plan, seed)
    model, prompt = MODELS[kind]()
    seen: list[list[Tensor]] = [[], []]

    def watched(mine: list[Tensor]):
        def step(*given: Any) -> Tensor:
            mine.append(model.step(*given))
            return mine[-1]

        return step

    sample = SamplePlan(seed, guidance=2.5)
    turns = zip(*(generate(model, prompt(MOST), plan, sample, step=watched(mine)) for mine in seen), strict=True)
    tokens = [[line.tokens for line in lines] for lines in turns]
    for number in range(2):
        assert torch.equal(torch.stack([lines[number] for lines in tokens], 1), codes)
        assert torch.equal(torch.stack(seen[number], 1), logits)


@every_run
def test_a_static_step(kind, plan, seed):
    """Slots that are read and empty weigh nothing."""
    model, prompt, codes, logits = reference(kind, plan, seed)
    found, theirs = draw(model, prompt(MOST), plan, SamplePlan(seed, guidance=2.5), static=True)
    assert torch.equal(found, codes)
    close(plan, theirs, logits)


@every_run
def test_lines_that_are_fed_again(kind, plan, seed):
    """And what is drawn below them."""
    model, prompt, codes, logits = reference(kind, plan, seed)
    for rows in (1, ROWS - 1):
        found, theirs = draw(model, prompt(MOST), plan, SamplePlan(seed, guidance=2.5), above=codes[:, :rows])
        assert torch.equal(found, codes)
        close(plan, theirs, logits[:, -theirs.shape[1] :])


@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler on the CPU"
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_step():
    """By the real compiler, with matrices and cache in 8 bits: the eager step's codes, and its own again to the bit."""
    torch._dynamo.reset()
    model, prompt, plan = tiny.llamagen(ROWS, COLS, layers=1), class_prompt(LABELS), PLANS[-1]
    quantise_model(model, lambda name, matrix: INT8 if "feed_forward" in name else None)
    assert not packed.available() or packed.pack(model)
    compiled = torch.compile(model.step, dynamic=False)
    for seed in SEEDS:
        sample = SamplePlan(seed, guidance=2.5)
        codes, logits = draw(model, prompt, plan, sample, static=True)
        found, theirs = draw(model, prompt, plan, sample, compiled, static=True)
        assert torch.equal(found, codes)
        close(plan, theirs, logits)
        assert torch.equal(draw(model, prompt, plan, sample, compiled, static=True)[1], theirs)


@pytest.mark.parametrize("plan", [HostPlan("full"), HostPlan("fold", recent=1)], ids=lambda p: p.policy)
def test_previews_on_or_off(small, one, comfy, monkeypatch, plan):  # noqa: F811
    """After every row or none at all, with a page or without: codes and what was held to the bit."""
    live = importlib.import_module(f"{PACK}.nodes.live")
    host = importlib.import_module(f"{PACK}.nodes.host")
    settings = {"cache": plan, "seed": 5, "guidance": 3.0, "batch_size": 2, **one}
    (usual,) = run("Generate", **settings)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.PreviewWorker, "pause", 0.0)
        patch.setattr(live.PreviewWorker, "allowance", 1e9)
        found += run("Generate", **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live.PreviewWorker, "submit", lambda *_: False)
        patch.setattr(host.PromptServer.instance, "client_id", None)
        patch.setattr(host.feature_flags, "supports_feature", lambda *_: False)
        comfy.sent.clear()
        found += run("Generate", **settings)
        assert comfy.sent == [], "nobody was told"
    for tokens in found:
        assert torch.equal(tokens.codes, usual.codes) and torch.equal(tokens.shares, usual.shares)

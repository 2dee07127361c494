"""What goes wrong while it runs: Stop, errors in every stage, memory that runs out, numbers that are none.

Afterwards the memory is what it was before, no thread is left, what was told of the rows is not lost, and the next run
is a fresh one's to the bit.
"""

from __future__ import annotations

import copy
import gc
import importlib
import json
import re
import threading
import weakref
from dataclasses import replace
from functools import reduce
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from linear_core import __main__ as command_line
from linear_core.cache.line_cache import LineCache
from linear_core.errors import UserError as CoreError
from linear_core.loop.generate import Run, generate
from linear_core.loop.micro_batches import MicroBatches, is_out_of_memory
from linear_core.models.llamagen import LlamaGen
from linear_core.pictures.preview import PreviewWorker
from linear_core.plan import CachePlan as CorePlan
from linear_core.plan import SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import class_prompt
from tests import tiny
from tests.nodes import comfy_double
from tests.nodes.test_live import told
from tests.nodes.test_nodes import (  # the fixtures too
    FULL,
    LINEAR,
    NODES,
    PACK,
    ROWS,
    CachePlan,
    UserError,
    comfy,  # noqa: F401
    one,  # noqa: F401
    run,
    small,  # noqa: F401
)
from tests.tiny import cut_down


def out_of_memory() -> torch.cuda.OutOfMemoryError:
    return torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Fault(Exception):
    """Somebody else's mistake."""


def inside(path: str):
    """A function or method of the pack as the host has it: who owns it, and its name. 'nodes.host:send_event'."""
    module, _, names = path.partition(":")
    *owners, name = names.split(".")
    return reduce(getattr, owners, importlib.import_module(f"{PACK}.{module}")), name


def failing(patch: pytest.MonkeyPatch, path: str, error: BaseException, after: int = 0) -> None:
    """Let it work `after` times, then fail."""
    owner, name = inside(path)
    original, calls = getattr(owner, name), []

    def call(*args, **more):
        calls.append(name)
        if len(calls) > after:
            raise error
        return original(*args, **more)

    patch.setattr(owner, name, call)


def held() -> tuple[int, int]:
    """Bytes of all tensors that Python knows of, and how many there are."""
    gc.collect()
    # Neither sparse ones nor the compiler's stand-ins, which other tests leave: they have no memory to ask for.
    tensors = [x for x in gc.get_objects() if type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()), len(tensors)


class Kept:
    """What is there before something goes wrong, to be compared with what is there afterwards."""

    def __init__(self) -> None:
        self.memory, self.threads = held(), set(threading.enumerate())

    def check(self) -> None:
        assert held() == self.memory, "tensors are left"
        assert set(threading.enumerate()) == self.threads, "a thread is left"


@pytest.fixture(scope="module", autouse=True)
def frozen():
    """What there is already is left out when `held` looks at everything, which takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def draw(model, **inputs):
    """The codes of a run, and what was told of it."""
    (prompt,) = run("ClassPrompt", model=model, class_name="alpine dawn")
    settings = {"cache": CachePlan("fold", recent=1), "seed": 5, "guidance": 2.0, "drafts": 0}
    return run("Generate", model=model, prompt=prompt, **(settings | inputs))[0]


@pytest.fixture(scope="module")
def whole(small):  # noqa: F811
    """What `draw` draws where nothing goes wrong."""
    with torch.inference_mode():
        return draw(small)


def same(tokens, others) -> None:
    assert torch.equal(tokens.codes, others.codes) and torch.equal(tokens.shares, others.shares)


# -- Stop and errors ---------------------------------------------------------------------------------------------------


def test_stop_at_every_line(small, comfy):  # noqa: F811
    """Rows that were told before can go on as a picture cut off there, as the button Keep has it."""
    whole = draw(small)
    draw(small, keep_rows=1, stop_after=1, view=f"1x1x{ROWS}:{LINEAR_EVENTS.pack(whole.codes[0, 0].tolist())}")
    kept = Kept()  # only now, as the first run with given rows fills a table that stays
    for line in range(ROWS):
        comfy.sent.clear()
        comfy.progress.clear()
        comfy.stops, comfy.stop_after = 0, line
        with pytest.raises(comfy_double.Interrupted):
            draw(small)
        comfy.stop_after = None
        kept.check()
        rows = [event for event in told(comfy) if event["kind"] == "row"]
        assert len(rows) == line, "rows that were finished were told"
        if line:
            codes = [code for row in rows for code in LINEAR_EVENTS.unpack(row["tokens"])]
            view = f"1x{line}x{ROWS}:{LINEAR_EVENTS.pack(codes)}"
            part = draw(small, keep_rows=line, stop_after=line, view=view)
            assert torch.equal(part.codes, whole.codes[:, :line])
            del part
    same(draw(small), whole)


def test_stop_in_a_later_part(small, comfy, monkeypatch):  # noqa: F811
    """The page has the rows that all pictures so far have, as one run from which all of them go on."""
    whole, kept = draw(small, batch_size=3), Kept()
    monkeypatch.setattr(importlib.import_module(f"{PACK}.nodes.live"), "max_batch_size", lambda room, images, needed: 1)
    comfy.sent.clear()
    comfy.progress.clear()
    comfy.stops, comfy.stop_after = 0, 2 * ROWS + 5
    with pytest.raises(comfy_double.Interrupted):
        draw(small, batch_size=3)
    comfy.stop_after = None
    kept.check()
    events = told(comfy)
    last = max(i for i, event in enumerate(events) if event["kind"] == "started")
    begun, rows = events[last], [event for event in events[last:] if event["kind"] == "row"]
    count = len(rows)
    assert (begun["images"], begun["seed"]) == (3, 5) and count in (5, 6), "Stop can be heard just before a row is told"
    codes = torch.tensor([LINEAR_EVENTS.unpack(row["tokens"]) for row in rows]).view(count, 3, ROWS).transpose(0, 1)
    assert torch.equal(codes, whole.codes[:, :count])
    assert events[-1] == events[-1] | {"kind": "picture", "run": begun["run"], "lines": count}
    view = f"3x{count}x{ROWS}:{LINEAR_EVENTS.pack(codes.flatten().tolist())}"
    assert torch.equal(draw(small, batch_size=3, keep_rows=count, view=view).codes, whole.codes)


LINEAR_EVENTS = importlib.import_module(f"{PACK}.linear_core.events")
STAGES = [
    ("linear_core.models.llamagen:LlamaGen.with_unconditional", 0),
    ("linear_core.cache.line_cache:LineCache.__init__", 0),
    ("linear_core.models.llamagen:LlamaGen.prefill", 0),
    ("linear_core.cache.line_cache:LineCache.write_prompt", 0),
    ("linear_core.models.llamagen:LlamaGen.step", 45),
    ("nodes.host:Layers.Linear.forward", 300),
    ("nodes.host:Layers.Embedding.forward", 40),
    ("nodes.host:Layers.RMSNorm.forward", 100),
    ("linear_core.cache.line_cache:LineCache.attend", 44),
    ("linear_core.cache.line_cache:LineCache.write", 44),
    ("linear_core.cache.line_cache:LineCache.advance", 44),
    ("linear_core.loop.sampling:Noise.exponential", 33),
    ("linear_core.loop.generate:filter_logits", 20),
    ("linear_core.loop.generate:sample_codes", 63),
    ("linear_core.loop.generate:room_after", 5),
    ("linear_core.loop.generate:evict", 1),
    ("linear_core.cache.line_cache:LineCache.extend", 3),
    ("linear_core.cache.line_cache:LineCache.view", 1),
    ("linear_core.loop.generate:choose", 1),
    ("linear_core.cache.line_cache:LineCache.release", 2),
    ("linear_core.cache.line_cache:fold", 1),
    ("linear_core.cache.line_cache:LineCache.share_held", 6),
    ("linear_core.events:Trace.add", 4),
    ("nodes.host:send_event", 0),
    ("nodes.host:send_event", 6),
    ("nodes.host:Progress.__init__", 0),
    ("nodes.host:Progress.update", 3),
    ("nodes.host:load", 0),
    ("nodes.host:keep_for_the_page", 0),
]


DRAFTED_STAGES = [
    ("linear_core.loop.generate:window_size", 0),
    ("linear_core.loop.generate:Drafts", 0),
    ("linear_core.loop.drafts:Drafts.guess", 9),
    ("linear_core.models.llamagen:LlamaGen.peek", 9),
    ("linear_core.cache.line_cache:LineCache.peek", 12),
    ("linear_core.cache.line_cache:LineCache.accept", 12),
    ("linear_core.loop.drafts:sample_codes", 12),
    ("nodes.live:Live.add", 3),
]


@pytest.mark.parametrize(("path", "after"), DRAFTED_STAGES, ids=lambda value: str(value).rpartition(":")[2])
def test_an_error_in_every_stage_with_drafts(small, whole, path, after):  # noqa: F811
    """It comes out as it is, nothing is left, and the next run draws the same as without drafts."""
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, path, Fault("a cable was pulled"), after)
        with pytest.raises(Fault, match="a cable was pulled"):
            draw(small, drafts=6)
    kept.check()
    same(draw(small, drafts=6), whole)


@pytest.mark.parametrize(("path", "after"), STAGES, ids=lambda value: str(value).rpartition(":")[2])
def test_an_error_in_every_stage(small, whole, path, after):  # noqa: F811
    """It comes out as it is, and nothing else does."""
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, path, Fault("a cable was pulled"), after)
        with pytest.raises(Fault, match="a cable was pulled"):
            draw(small)
    kept.check()
    same(draw(small), whole)


@pytest.mark.parametrize(
    ("path", "after"),
    [
        ("nodes.live:Live._render", 0),
        ("nodes.live:Live._render", 1),
        ("linear_core.tokenizers.tokenizer:VQTokenizer.decode", 0),
        ("nodes.host:Layers.Conv2d.forward", 3),
        ("nodes.host:Layers.GroupNorm.forward", 3),
    ],
)
def test_a_run_is_worth_more_than_its_pictures(small, whole, path, after, caplog):  # noqa: F811
    """The preview's thread or the last picture: the codes come out whole, and the log says what was wrong."""
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, path, Fault("a pixel was lost"), after)
        again = draw(small)
    assert "picture (a pixel was lost)" in caplog.text or "no preview (a pixel was lost)" in caplog.text
    same(again, whole)
    del again
    kept.check()


def test_stop_in_the_last_picture_is_heard():
    """Also where the host's interrupt is an ordinary exception, as it was on older ones; other errors are not."""

    class Stop(Exception):
        pass

    for error in (Stop(), ValueError()):

        def paint(job, error=error):
            raise error

        worker = PreviewWorker(paint, lambda picture, lines: None, ROWS, Stop)
        if isinstance(error, Stop):
            with pytest.raises(Stop):
                worker.final(1)
        else:
            assert worker.final(1) is None
        assert not worker.thread.is_alive()


@pytest.mark.parametrize(
    ("node", "path"),
    [
        ("LoadModel", "linear_core.checkpoints.library:load_into"),
        ("LoadModel", "linear_core.checkpoints.library:load_tokenizer"),
        ("LoadModel", "nodes.load:load_model"),
        ("ClassPrompt", "linear_core.checkpoints.library:class_prompt"),
        ("Decode", "linear_core.tokenizers.tokenizer:VQTokenizer.decode"),
        ("Decode", "nodes.sockets:decode"),
        ("RetentionHeatmap", "nodes.heatmap:heatmap"),
        ("EncodeImage", "linear_core.tokenizers.tokenizer:VQTokenizer.encode"),
        ("Compare", "linear_core.cache.line_cache:LineCache.release"),
        ("Compare", "nodes.sockets:decode"),
    ],
)
def test_an_error_in_every_other_node(small, one, whole, node, path):  # noqa: F811
    inputs = {
        "LoadModel": {"model": "landscapes (bundled)", "tokenizer": "automatic"},
        "ClassPrompt": {"model": small, "class_name": "ocean dusk"},
        "Decode": {"model": small, "tokens": whole},
        "RetentionHeatmap": {"tokens": whole, "show": {"show": "lifetime"}},
        "EncodeImage": {"model": small, "image": torch.rand(1, 40, 40, 3)},
        "Compare": {**one, "cache": CachePlan("fold", 2, recent=1)},
    }[node]
    kept = Kept()
    with pytest.MonkeyPatch.context() as patch:
        failing(patch, path, Fault("a cable was pulled"))
        with pytest.raises(Fault):
            run(node, **inputs)
    kept.check()
    assert run(node, **inputs), "the next run goes on as if nothing had been"


# -- memory that runs out ----------------------------------------------------------------------------------------------


def no_more_than(patch: pytest.MonkeyPatch, images: int, path: str, after: int = 0, error=out_of_memory):
    """A machine whose memory takes so many guided images. Returns the rows of every call that was let through."""
    owner, name = inside(path)
    original, rows, caches = getattr(owner, name), [], weakref.WeakSet()

    def call(self, *args, **more):
        given = args[1] if name == "__init__" else args[0].shape[0]
        if name == "__init__":
            assert not caches, "the cache for which there was no room is still there"
            original(self, *args, **more)
            caches.add(self)
        if given > 2 * images and len(rows) >= after:
            raise error()
        rows.append(given)
        return None if name == "__init__" else original(self, *args, **more)

    patch.setattr(owner, name, call)
    return rows


@pytest.mark.parametrize(
    "error", [out_of_memory, MemoryError, lambda: torch.empty(2**60)], ids=["CUDA", "Python", "real"]
)
def test_no_room_for_the_cache(small, comfy, monkeypatch, error):  # noqa: F811
    """Parts of half the size, with the same pictures; and the first cache is gone before the second is made."""
    whole = draw(small, batch_size=5)
    kept = Kept()
    rows = no_more_than(monkeypatch, 2, "linear_core.cache.line_cache:LineCache.__init__", error=error)
    comfy.sent.clear()
    parts = draw(small, batch_size=5)
    assert rows == [2, 4, 4], "parts of 1, 2 and 2 images, with guidance"
    same(parts, whole)
    assert parts.cache_bytes < whole.cache_bytes
    finished = [event["kind"] for event in told(comfy)].count("finished")
    assert finished == 3, "the page was told of each part"
    del parts
    kept.check()


@pytest.mark.parametrize("line", [0, 3, ROWS - 1])
@pytest.mark.parametrize("policy", ["fold", "h2o"])
def test_no_room_in_the_middle_of_a_picture(small, comfy, monkeypatch, policy, line, caplog):  # noqa: F811
    """Complete lines are fed, not drawn again; the page has them, and the rest, of all images in the end."""
    settings = {"batch_size": 4, "cache": CachePlan(policy, recent=1)}
    whole, kept = draw(small, **settings), Kept()
    before = ROWS * line + 2
    rows = no_more_than(monkeypatch, 2, "linear_core.models.llamagen:LlamaGen.step", after=before)
    parts = draw(small, **settings)
    same(parts, whole)
    assert rows[:before] == [8] * before and set(rows[before:]) == {4}
    assert len(rows) - before == 2 * (ROWS * (ROWS - line) - 1), "lines that were complete are not drawn again"
    assert "memory ran out with 4 pictures at a time; going on with 2" in caplog.text
    assert "part 2 of 2, 2 pictures at a time" in [text for event, text in comfy.sent if event == "text"]
    del parts
    kept.check()


def test_no_room_in_the_second_part(small, comfy, monkeypatch):  # noqa: F811
    """Parts that were done stay done, and the third is halved with the second."""
    live = importlib.import_module(f"{PACK}.nodes.live")
    whole = draw(small, batch_size=6)
    monkeypatch.setattr(live, "max_batch_size", lambda room, images, needed: 2)
    rows = no_more_than(monkeypatch, 1, "linear_core.models.llamagen:LlamaGen.step", after=100)
    parts = draw(small, batch_size=6)
    same(parts, whole)
    done = ROWS * ROWS - 1
    assert rows[:100] == [4] * 100 and set(rows[100:]) == {2}
    assert len(rows) == 100 + 2 * (done - (100 - done) // ROWS * ROWS) + 2 * done


def test_no_room_below_rows_that_were_given(small, comfy, monkeypatch):  # noqa: F811
    """Rows of one picture for all, or of each its own, stay theirs in the halves."""
    above = draw(small, batch_size=4, seed=77)
    for given in (above, replace(above, codes=above.codes[:1])):
        whole = draw(small, batch_size=4, tokens=given, keep_rows=3)
        for method, after in (("step", 3), ("feed", 1)):
            with pytest.MonkeyPatch.context() as patch:
                no_more_than(patch, 2, f"linear_core.models.llamagen:LlamaGen.{method}", after=after)
                same(draw(small, batch_size=4, tokens=given, keep_rows=3), whole)


def test_comparing_without_room(small, one, monkeypatch):  # noqa: F811
    """Each cache goes on below its own rows."""
    settings = {"cache": CachePlan("fold", 2, recent=1), "batch_size": 4, "guidance": 2.0, **one}
    whole = run("Compare", **settings)
    no_more_than(monkeypatch, 2, "linear_core.models.llamagen:LlamaGen.step", after=70)
    for picture, expected in zip(run("Compare", **settings)[:2], whole[:2], strict=True):
        assert torch.equal(picture, expected)


@pytest.mark.parametrize(
    ("images", "room", "words"),
    [
        (4, 1, "memory: it ran out with 4 pictures at a time, and again with 2 pictures at a time; keep less"),
        (2, 0, "memory: it ran out with 2 pictures at a time, and again with one picture at a time; keep less"),
        (1, 0, "memory: it ran out with one picture at a time; keep less"),
    ],
)
def test_once_is_enough(small, monkeypatch, images, room, words):  # noqa: F811
    """Then it is one sentence that says what to do, without the error that holds on to the memory."""
    whole, kept = draw(small), Kept()
    with pytest.MonkeyPatch.context() as patch:
        no_more_than(patch, room, "linear_core.models.llamagen:LlamaGen.step")
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            draw(small, batch_size=images)
    text = str(caught.value)
    assert text.endswith("lower batch_size, or close other programs that use memory.") and "\n" not in text
    caches = [thing for thing in gc.get_objects() if type(thing) is LINEAR["cache.line_cache"].LineCache]
    assert not caches, "whoever keeps the error must not keep the cache with it"
    del caught
    kept.check()
    same(draw(small), whole)


def test_no_room_for_decoding(small, monkeypatch, caplog):  # noqa: F811
    """Half as many pictures at a time until they fit; nothing of what did not is left."""
    codes, kept = draw(small, batch_size=5), None
    (whole,) = run("Decode", model=small, tokens=codes)
    decode, sizes, features = small.image.tokenizer.decode, [], weakref.WeakSet()

    def little(codes, room):
        sizes.append(len(codes))
        if len(codes) > room:
            begun = torch.zeros(2**20)
            features.add(begun)
            raise out_of_memory()
        assert not features, "what did not fit is still there"
        return decode(codes)

    monkeypatch.setattr(small.image.tokenizer, "decode", lambda codes: little(codes, 2))
    torch.testing.assert_close(run("Decode", model=small, tokens=codes)[0], whole)
    assert sizes == [5, 2, 2, 1] and "going on with 2 pictures at a time" in caplog.text
    sizes.clear()
    inside("linear_core.pictures.preview:decode")[0].decode(small.image.tokenizer, codes.codes, 16)
    assert sizes == [5, 2, 2, 1], "half of how many there are, not of how many there may be"
    sizes.clear()
    kept = Kept()
    monkeypatch.setattr(small.image.tokenizer, "decode", lambda codes: little(codes, 0))
    words = "memory: it ran out decoding one picture of 32 x 32; close other programs that use memory."
    with pytest.raises(UserError, match=re.escape(words)):
        run("Decode", model=small, tokens=codes)
    assert sizes == [5, 2, 1]
    kept.check()


def test_other_errors_are_not_taken_for_memory():
    assert is_out_of_memory(out_of_memory()) and is_out_of_memory(
        RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)")
    )
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied")) and not is_out_of_memory(
        ValueError("out of memory")
    )


def test_the_command_line_without_room(small_model: Path, tmp_path: Path, monkeypatch, capsys):
    """The same pictures; and where half as many are too many as well, one sentence, and nothing written."""
    out = tmp_path / "whole" / "a.png"
    asked = [
        "generate",
        str(small_model),
        "--class",
        "desert day",
        "--images",
        "2",
        "--budget",
        "2",
        "--drafts",
        "0",
        "--out",
    ]
    assert command_line.main([*asked, str(out)]) == 0
    step, calls = LlamaGen.step, []

    def crowded(self, token: Tensor, *rest):
        calls.append(len(token))
        if len(token) > 2 and len(calls) > 4 * ROWS + 4:
            raise out_of_memory()
        return step(self, token, *rest)

    monkeypatch.setattr(LlamaGen, "step", crowded)
    again = tmp_path / "parts" / "a.png"
    assert command_line.main([*asked, str(again)]) == 0
    assert len(calls) == 4 * ROWS + 5 + 2 * (ROWS * (ROWS - 4) - 1), "four lines were complete"
    for name in ("a_01.png", "a_02.png"):
        pictures = [Image.open(path.parent / name) for path in (out, again)]
        assert pictures[0].tobytes() == pictures[1].tobytes()
        assert json.loads(pictures[0].text["linear"]) == json.loads(pictures[1].text["linear"])
    capsys.readouterr()

    def none(*_):
        raise out_of_memory()

    monkeypatch.setattr(LlamaGen, "step", none)
    for command in ("generate", "compare"):
        gone = tmp_path / f"{command}.png"
        assert command_line.main([command, *asked[1:], str(gone)]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert (
            error.startswith("error: memory: it ran out with 2 pictures at a time, and again with one")
            and "--budget" in error
        )
        assert not gone.exists()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "plan", [CorePlan("fold", 2, 2, 1), CorePlan("line", 2, 2, 1), CorePlan("fold", 2, 2, 1, storage="int8")]
)
def test_halves_draw_the_same_numbers(plan, seed):
    """In double precision, whatever line the memory runs out in: what is held is the same too."""
    model, sample = tiny.llamagen(6, 5, dtype=torch.float64), SamplePlan(seed, guidance=2.5)
    prompt, line = class_prompt([1, 4, 2, 3, 1]), seed
    whole = Run()
    for drawn in generate(model, prompt, plan, sample):
        whole.add(drawn)
    micro_batches, failed = MicroBatches(prompt, sample, 5, advice="draw fewer"), False
    for micro_batch in micro_batches:
        with micro_batches.watch(micro_batch):
            for drawn in generate(model, micro_batch.prompt, plan, micro_batch.sample, above=micro_batch.above[0]):
                fails = not failed and drawn.row == line
                failed |= fails
                if not fails or seed % 2:  # the line itself is told before, or lost
                    micro_batch.runs[0].add(drawn)
                if fails:
                    raise out_of_memory()
    (parts,) = micro_batches.runs
    assert failed and torch.equal(parts.tokens, whole.tokens) and torch.equal(parts.shares, whole.shares)
    assert micro_batches.max_images == 2 and len(micro_batches) == 3


# -- numbers that are none ---------------------------------------------------------------------------------------------


class Broken:
    """A decoder that says `what` at image token number `token`, or from then on keeps it as keys and values."""

    def __init__(self, decoder, token: int, what: float, *, for_good: bool):
        self.decoder, self.token, self.what, self.for_good, self.calls = decoder, token, what, for_good, 0

    def __getattr__(self, name):
        return getattr(self.decoder, name)

    def step(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: LineCache) -> Tensor:
        self.calls += 1
        logits = self.decoder.step(token, index, pad, column, cache)
        if self.calls == self.token:
            logits[0, 3] = self.what
            if self.for_good:
                nothing = torch.full((cache.rows, cache.shape.heads, 1, cache.shape.head_dim), self.what)
                for layer in range(cache.shape.layers):
                    cache.write(layer, column, nothing, nothing, nothing)
        return logits


@pytest.mark.parametrize("what", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [1, 7, 29])
def test_one_token_that_is_no_number(token, what):
    """Found at the end of its line, which is named; the lines before have come."""
    model, lines = Broken(tiny.llamagen(6, 5), token, what, for_good=False), []
    with pytest.raises(CoreError, match=rf"^toy: its logits are not finite .*in line {token // 5 + 1} of 6; its file"):
        for line in generate(model, class_prompt([1, 2]), CorePlan(budget=2, recent=1), SamplePlan(1), name="toy"):
            lines.append(line)
    assert len(lines) == token // 5


@pytest.mark.parametrize("release", ["strict", "lazy", "fold"])
@pytest.mark.parametrize("policy", POLICIES)
def test_keys_that_are_no_numbers_are_named_whatever_the_policy(policy, release):
    """No score, no choice and no folding trips over them before the line's end is looked at."""
    model = Broken(tiny.llamagen(6, 5), 16, float("nan"), for_good=True)
    with pytest.raises(CoreError, match="in line 4 of 6"):
        list(generate(model, class_prompt([1, 2]), CorePlan(policy, 2, 2, 1, release), SamplePlan(1)))


def test_float16_that_overflows_is_told_what_to_choose():
    model = tiny.llamagen(4, 5).half()
    with torch.no_grad():
        model.output.weight.mul_(20000)
    with pytest.raises(CoreError, match=r"NaN or infinity, float16\) in line 1 of 4; .*bfloat16 or float32\."):
        list(generate(model, class_prompt([1]), CorePlan(budget=2, recent=1), SamplePlan(1)))
    assert list(generate(model.float(), class_prompt([1]), CorePlan(budget=2, recent=1), SamplePlan(1)))


def test_a_damaged_file_is_named_by_the_nodes(small, comfy, monkeypatch):  # noqa: F811
    """By the model's name; rows before it were told, so they can be kept."""
    whole, kept = draw(small), Kept()
    step, calls = small.image.decoder.step, []

    def broken(*inputs):
        calls.append(1)
        return step(*inputs) + (float("nan") if len(calls) > 4 * ROWS else 0)

    comfy.sent.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(small.image.decoder, "step", broken)
        with pytest.raises(
            UserError, match=r"^small: its logits are not finite .*in line 5 of 8; its file may be damaged"
        ):
            draw(small)
    assert len([event for event in told(comfy) if event["kind"] == "row"]) == 4
    kept.check()
    same(draw(small), whole)


def test_the_command_line_names_it_too(small_model, monkeypatch, capsys, tmp_path):
    prefill = LlamaGen.prefill
    monkeypatch.setattr(LlamaGen, "prefill", lambda *given: prefill(*given) * float("nan"))
    assert command_line.main(["generate", str(small_model), "--out", str(tmp_path / "a.png")]) == 2
    assert (
        "error: small: its logits are not finite (NaN or infinity, float32) in line 1 of 8" in capsys.readouterr().err
    )


def test_the_command_line_stopped_keeps_what_was_drawn(small_model, tmp_path, monkeypatch, capsys):
    """The part that is done whole, of the next one the rows there are, above grey; of the last there is nothing."""
    asked = ["generate", str(small_model), "--class", "desert day", "--images", "3", "--at-once", "1"]
    asked += ["--preset", "LineAR", "--size", "96", "--drafts", "0"]
    assert command_line.main([*asked, "--out", str(tmp_path / "whole" / "a.png")]) == 0
    step, calls = LlamaGen.step, []

    def stopped(self, *given):
        calls.append(1)
        if len(calls) == ROWS * ROWS - 1 + 5 * ROWS + 3:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(LlamaGen, "step", stopped)
    assert command_line.main([*asked, "--out", str(tmp_path / "part" / "a.png")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped."
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == ["a_01.png", "a_02.png"]
    first, second = (Image.open(tmp_path / "part" / f"a_0{n}.png") for n in (1, 2))
    assert first.tobytes() == Image.open(tmp_path / "whole" / "a_01.png").tobytes()
    assert json.loads(second.text["linear"])["unfinished"] and json.loads(second.text["linear"])["seed"] == 1
    rows = 5 * 96 // ROWS
    top, rest = (second.crop((0, upper, 96, lower)) for upper, lower in ((0, rows), (rows, 96)))
    assert len(top.getcolors(9999)) > 50 and len(rest.getcolors()) == 1


class Asked(TorchDispatchMode):
    """How often the host asked for a number, which makes it wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_nothing_within_a_line():
    """As often for lines of 3 tokens as for lines of 9."""
    times = []
    for cols in (3, 9):
        lines = generate(
            tiny.llamagen(6, cols), class_prompt([1, 2]), CorePlan(budget=2, anchors=1, recent=1), SamplePlan(1)
        )
        next(lines)
        with Asked() as asked:
            next(lines)
        times.append(asked.times)
    assert times[0] == times[1]


# -- two graphs, unloaded models, files that change --------------------------------------------------------------------


def test_a_model_that_the_host_took_off_the_device_between_two_nodes(small, one, monkeypatch):  # noqa: F811
    """Every node brings what it uses back before it does: here what is off the device has no numbers at all."""
    tokens = draw(small)
    (image,) = run("Decode", model=small, tokens=tokens)
    there = {id(p): {**p.model._modules} for p in (small.decoder, small.tokenizer)}

    def unload() -> None:
        for patcher in (small.decoder, small.tokenizer):
            patcher.model._modules.update(
                {name: copy.deepcopy(m).to("meta") for name, m in patcher.model._modules.items()}
            )

    def bring(patchers, memory_required: int = 0) -> None:
        for patcher in patchers:
            patcher.model._modules.update(there[id(patcher)])

    management = importlib.import_module(f"{PACK}.nodes.host").management
    monkeypatch.setattr(management, "load_models_gpu", bring)
    unload()
    same(draw(small), tokens)
    unload()
    assert torch.equal(run("Decode", model=small, tokens=tokens)[0], image)
    unload()
    (encoded,) = run("EncodeImage", model=small, image=image)
    unload()
    again = draw(small, tokens=encoded, keep_rows=3)
    assert torch.equal(again.codes[:, :3], encoded.codes[:, :3])
    unload()
    compared = run("Compare", cache=CachePlan("fold", 2, recent=1), seed=5, guidance=2.0, **one)
    full = draw(small, cache=FULL)
    assert torch.equal(compared[0], run("Decode", model=small, tokens=full)[0])


def test_two_graphs_at_once(small):  # noqa: F811
    """Runs that take turns line by line with one model, and runs on two threads, are what each is alone."""
    settings = [{"seed": 5}, {"seed": 9, "cache": CachePlan("h2o", 3, recent=1)}]
    alone = [draw(small, **more) for more in settings]
    found: dict[int, object] = {}

    def work(number: int) -> None:
        with torch.inference_mode():
            found[number] = draw(small, **settings[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, expected in enumerate(alone):
        same(found[number], expected)


def test_a_model_file_that_changes(comfy):  # noqa: F811
    """Another fingerprint, so the host runs the loader again; the model that was loaded before is what it was."""
    path = cut_down(comfy.models / "ar_image" / "mine.safetensors")
    (path.parent / "vq.safetensors").write_bytes(LINEAR["checkpoints.library"].bundled_files().tokenizer.read_bytes())
    chosen = {"model": "mine.safetensors", "tokenizer": "vq.safetensors"}
    fingerprint = lambda: NODES["LineAR_LoadModel"].fingerprint_inputs(grid_rows=0, grid_cols=0, **chosen)  # noqa: E731
    before = fingerprint()
    (old,) = run("LoadModel", **chosen)
    drawn = draw(old)
    cut_down(path.with_name("other.safetensors"), heads="4").replace(path)
    assert fingerprint() != before
    (new,) = run("LoadModel", **chosen)
    same(draw(old), drawn)
    assert not torch.equal(draw(new).codes, drawn.codes)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"mine\.safetensors: .*download it again"):
        run("LoadModel", **chosen)
    same(draw(old), drawn)

"""What the kernel computes, beside PyTorch's attention and in double precision.

`test_kernel.py` runs this file in processes of their own: in Triton's interpreter on the CPU (TRITON_INTERPRET=1,
which Triton has to find when it is imported), and on a GPU as it is compiled.
"""

from __future__ import annotations

import os
import time
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench import speed
from bench.gpu import Ask
from bench.gpu_parts.attention import compare
from bench.gpu_parts.common import drawing
from bench.shapes import SHAPES, ModelShape
from linear_core.cache import kernel
from linear_core.cache.attention import SWITCH, attend
from linear_core.cache.kernel import attend_one
from linear_core.cache.line_cache import LineCache
from linear_core.cache.storage import STORAGE, RawSlots
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.loop.graph import Captured
from linear_core.models.llamagen import LlamaGen, LlamaGenConfig
from linear_core.plan import CachePlan, SamplePlan
from linear_core.prompts import class_prompt
from tests.bench.command import last_line
from tests.tiny import Recorder, grouped, janus, llamagen, words

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}  # of numbers about 1
NEVER = float("-inf")

parts = pytest.mark.parametrize("fill", [1, 256], ids=["alone", "shared"])


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def expected(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Softmax written out, in double precision."""
    q, k, v, bias = (x.double() for x in (q, k, v, bias))
    return ((k @ q.mT)[..., 0] * q.shape[-1] ** -0.5 + bias).softmax(-1)[:, :, None] @ v


def close(found: Tensor, wanted: Tensor) -> None:
    off = TOLERANCE[found.dtype]
    torch.testing.assert_close(found.double(), wanted, atol=off, rtol=off)


def cached(rows: int, heads: int, slots: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v, bias as views of larger buffers, as a cache gives them: a layer, some rows, slots up to an extent."""
    k, v = (noise(2, rows + 1, heads, slots + 5, dim, seed=n).to(dtype)[1, :rows, :, :slots] for n in (1, 2))
    q = noise(rows, 1, heads, 3, dim, seed=3).to(dtype).select(3, 1).transpose(1, 2)
    bias = noise(2, rows + 1, heads, slots + 5, seed=4)[1, :rows, :, :slots]
    hidden = noise(rows, heads, slots, seed=5) > 0.5
    hidden[..., slots // 2] = False
    held = noise(2, rows + 1, heads, slots + 5).to(dtype)[1, :rows, :, :slots]
    return q, k, v, held.copy_(bias.masked_fill(hidden, NEVER))


# -- one query ---------------------------------------------------------------------------------------------------------


@parts
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("slots", "dim"), [(1, 8), (2, 6), (121, 32), (128, 64), (333, 64), (70, 100), (161, 128)])
def test_it_is_softmax(slots, dim, dtype, fill, monkeypatch):
    """Views with gaps, weights and empty slots, numbers of slots and of D that fill no block."""
    monkeypatch.setattr(kernel, "FILL", fill)
    q, k, v, bias = cached(2, 3, slots, dim, dtype)
    found = attend_one(q, RawSlots(k), RawSlots(v), bias)
    assert found.dtype == dtype and found.shape == q.shape
    close(found, expected(q, k, v, bias))


@parts
@pytest.mark.parametrize("kind", STORAGE)
def test_query_heads_that_share_a_key_head(kind, fill, monkeypatch):
    """As if each had a copy of its own."""
    monkeypatch.setattr(kernel, "FILL", fill)
    _, k, v, bias = cached(2, 3, 333, 8, torch.float32)
    q = noise(2, 6, 1, 8, seed=6)
    keys, values = RawSlots(k), RawSlots(v)
    if kind != "full":
        keys, values = (RawSlots(*STORAGE[kind].pack(x)) for x in (k, v))
    copies = [RawSlots(*(x if x is None else x.repeat_interleave(2, 1) for x in raw)) for raw in (keys, values)]
    found = attend_one(q, keys, values, bias)
    torch.testing.assert_close(found, attend_one(q, *copies, bias.repeat_interleave(2, 1)), atol=1e-6, rtol=1e-6)
    assert (found[:, ::2] - found[:, 1::2]).abs().amax((1, 2, 3)).min() > 0.1, "the queries of a group differ"


@parts
def test_slots_of_many_parts(fill, monkeypatch):
    """A part may see nothing at all, and the greatest score may be in any."""
    monkeypatch.setattr(kernel, "FILL", fill)
    q, k, v, bias = cached(1, 2, 1500, 16, torch.float32)
    bias[..., [0, -1]] = 0.3
    for first, last in ((0, 900), (300, 1500), (1, 1499)):
        hidden = bias.clone()
        hidden[..., first:last] = NEVER
        close(attend_one(q, RawSlots(k), RawSlots(v), hidden), expected(q, k, v, hidden))
    for loud in (0, 700, 1499):
        louder = bias.clone()
        louder[..., loud] = 80.0
        close(attend_one(q, RawSlots(k), RawSlots(v), louder), expected(q, k, v, louder))


@parts
def test_one_slot_that_is_seen_is_what_comes_out(fill, monkeypatch):
    monkeypatch.setattr(kernel, "FILL", fill)
    q, k, v, _ = cached(1, 2, 600, 8, torch.float32)
    for slot in (0, 127, 128, 599):
        bias = torch.full((1, 2, 600), NEVER, device=DEVICE)
        bias[..., slot] = 0.7
        torch.testing.assert_close(attend_one(q, RawSlots(k), RawSlots(v), bias)[:, :, 0], v[:, :, slot])


@parts
def test_who_sees_nothing_gets_zeros(fill, monkeypatch):
    """As with PyTorch's. No query of a run does: its own token is always there."""
    monkeypatch.setattr(kernel, "FILL", fill)
    q, k, v, bias = cached(2, 2, 600, 8, torch.float32)
    bias[1, 0] = NEVER
    found = attend_one(q, RawSlots(k), RawSlots(v), bias)
    theirs = F.scaled_dot_product_attention(*(x.cpu() for x in (q, k, v)), attn_mask=bias.cpu()[:, :, None])
    assert not found[1, 0].any() and not theirs[1, 0].any()
    close(found[0], expected(q, k, v, bias)[0])


@parts
def test_scores_of_any_size(fill, monkeypatch):
    monkeypatch.setattr(kernel, "FILL", fill)
    q, k, v, bias = cached(1, 2, 600, 8, torch.float32)
    for scale in (1e3, -1e3):
        found, wanted = attend_one(q * scale, RawSlots(k), RawSlots(v), bias), expected(q * scale, k, v, bias)
        torch.testing.assert_close(found.double(), wanted, atol=1e-2, rtol=1e-2)


def test_the_same_shapes_give_the_same_numbers():
    """To the bit; rows of the same batch do not touch each other."""
    q, k, v, bias = cached(2, 3, 600, 8, torch.float32)
    once = attend_one(q, RawSlots(k), RawSlots(v), bias)
    assert torch.equal(attend_one(q, RawSlots(k), RawSlots(v), bias), once)
    k[1], v[1], bias[1] = 0.0, 0.0, 0.0
    again = attend_one(q, RawSlots(k), RawSlots(v), bias)
    assert torch.equal(again[0], once[0]) and not torch.equal(again[1], once[1])


# -- few bits ----------------------------------------------------------------------------------------------------------


@parts
@pytest.mark.parametrize("storage", ["int8", "int4"])
@pytest.mark.parametrize(
    ("slots", "dim", "dtype"),
    [(50, 8, torch.bfloat16), (270, 64, torch.float32), (90, 100, torch.float16), (70, 128, torch.bfloat16)],
)
def test_few_bits(slots, dim, dtype, storage, fill, monkeypatch):
    """As if they were unpacked in double precision; and the way that is taken otherwise, which rounds once more."""
    monkeypatch.setattr(kernel, "FILL", fill)
    q, *start, bias = cached(2, 3, slots, dim, dtype)
    held = [STORAGE[storage]((2, 2, 3), slots + 7, dim, dtype, DEVICE) for _ in range(2)]
    for kind, x in zip(held, start, strict=True):
        kind.write_prompt(1, x)
    found = attend_one(q, *(kind.raw(1, slots) for kind in held), bias)
    exact = [kind.unpack(kind.data[1, :, :, :slots], kind.scale[1, :, :, :slots].double(), dim) for kind in held]
    close(found, expected(q, *exact, bias))
    off = 3 * TOLERANCE[dtype]
    rounded = expected(q, *(kind.read(1, slots) for kind in held), bias)
    torch.testing.assert_close(found.double(), rounded, atol=off, rtol=off)
    assert (found.double() - expected(q, *start, bias)).abs().max() > 3e-4, "it was rounded"


# -- broken on purpose -------------------------------------------------------------------------------------------------

BREAKS = [  # text that occurs once in the kernel, what it becomes, what that breaks; as in tests/mutations.py
    (".to(tl.float32) * factor", ".to(tl.float32)", "scores without the 1/sqrt(D)"),
    ("acc, scores + slot_bias, values)", "acc, scores, values)", "the bias is ignored"),
    ("head // GROUP", "tl.minimum(head, 2)", "a group's second query head reads the next key head"),
    ("row * data_row + head", "head", "every row reads the first one's slots"),
    ("bias += row * bias_row + head * bias_head", "bias += row * bias_row", "every head has the first one's bias"),
    ("(split + 1) * split_size, slots)", "(split + 1) * split_size, slots - 1)", "the last slot is not read"),
    ("split * split_size, end, BLOCK", "0, end, BLOCK", "parts read what others have read"),
    (
        '(new_max == float("-inf"), 0.0, new_max)  # nothing',
        "(new_max != new_max, 0.0, new_max)  # nothing",
        "nothing seen is no number",
    ),
    ("sum_exp * rescale", "sum_exp", "weights are not brought to the new greatest score"),
    ("acc * rescale", "acc", "values are not brought to the new greatest score"),
    ("tl.sum(weights * sum_exp, 0)", "tl.sum(sum_exp, 0)", "parts count alike, whatever their scores"),
    ("scores *= tl.load", "scores = scores + 0 * tl.load", "int8: keys without their scale"),
    ("values *= tl.load(v_scale", "values *= tl.load(k_scale", "int8: values with the scale of the keys"),
    ("tl.where(d < half, 0, 4)", "tl.where(d < half, 4, 0)", "int4: the halves of a vector are exchanged"),
    ("d // PER_GROUP\n", "d // DIM\n", "int4: all groups have the first one's floor and step"),
    ("/ 127.5 - 1 +", "/ 127.5 +", "int4: floors are taken for positive"),
    ("(step / (15 * 127.5))", "(step / (16 * 127.5))", "int4: levels are too near each other"),
]


def probe(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each storage, slots shared among programs and not, the first of them unseen."""
    q, k, v, bias = cached(2, 3, 600, 32, torch.float32)
    bias[..., :300] = NEVER
    bias[..., 599] = 2.0
    pairs, copies = noise(2, 6, 1, 32, seed=6), [x.repeat_interleave(2, 1) for x in (k, v, bias)]
    few = [(kind, [kind.pack(x) for x in (k, v)]) for kind in (STORAGE["int8"], STORAGE["int4"])]
    for fill in (1, 256):
        monkeypatch.setattr(module, "FILL", fill)
        close(module.attend_one(q, RawSlots(k), RawSlots(v), bias), expected(q, k, v, bias))
        close(module.attend_one(pairs, RawSlots(k), RawSlots(v), bias), expected(pairs, *copies))
        for kind, packed in few:
            found = module.attend_one(q, *(RawSlots(*x) for x in packed), bias)
            close(found, expected(q, *(kind.unpack(*x, 32) for x in packed), bias))


def test_the_probe_passes_what_is_whole(monkeypatch):
    probe(kernel, monkeypatch)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter notices, and a GPU would compile each of them")
@pytest.mark.parametrize(("old", "new"), [pytest.param(old, new, id=breaks) for old, new, breaks in BREAKS])
def test_what_is_broken_is_noticed(old, new, monkeypatch, tmp_path):
    text = Path(kernel.__file__).read_text(encoding="utf-8")
    assert text.count(old) == 1
    (tmp_path / "kernel.py").write_text(text.replace(old, new), encoding="utf-8")
    spec = spec_from_file_location("linear_core.cache.broken", tmp_path / "kernel.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(AssertionError, match="not close"):
        probe(module, monkeypatch)


# -- pictures ----------------------------------------------------------------------------------------------------------

PLANS = [
    CachePlan("full"),
    CachePlan("line", 2, 2, 1),
    CachePlan("line", 2, 2, 1, "lazy"),
    CachePlan("fold", 2, 2, 0),
    CachePlan("headkv", 2, 2, 1),  # heads that keep unequal numbers
]
storages = pytest.mark.parametrize("storage", STORAGE)


@storages
@pytest.mark.parametrize(
    ("kind", "plan", "static"),
    [
        *(("llamagen", plan, False) for plan in PLANS),
        ("llamagen", PLANS[2], True),
        *(("janus", plan, False) for plan in PLANS[1:4]),
        ("grouped", PLANS[3], False),
    ],
    ids=str,
)
def test_a_picture_is_the_same(kind, plan, static, storage, monkeypatch):
    """Every attention and every logit of an image, with padding in the prompt, guidance, rows that leave at its end.

    Rounded to 8 bits, keys whose last digits differ can be a whole step apart, which logits then show.
    """
    through_the_door = LineCache.attend

    def attend_twice(self: LineCache, layer: int, q: Tensor) -> Tensor:
        found = through_the_door(self, layer, q)
        torch.testing.assert_close(found, attend(q, *self.read(layer)), atol=5e-5, rtol=5e-5)
        return found

    if kind == "llamagen":
        model, prompt = llamagen(4, 3), class_prompt([1])
    else:
        model, prompt = (janus if kind == "janus" else grouped)(4, 3), words([3, 5])
    plan = replace(plan, storage=storage)
    sample = SamplePlan(seed=5, guidance=2.5, guidance_interval=8)
    monkeypatch.setattr(LineCache, "attend", attend_twice)
    runs, off = [], {"full": 1e-4, "int8": 1e-2, "int4": 0.2}[storage]
    for attention in ("sdpa", "kernel"):
        monkeypatch.setenv(SWITCH, attention)
        run = Recorder(model.to(DEVICE))
        run.lines.extend(generate(run, prompt, plan, sample, static=static))
        runs.append(run)
    plain, ours = runs
    assert plain.cache.kernel is None and ours.cache.kernel is attend_one
    for one, other in zip(plain.logits, ours.logits, strict=True):
        torch.testing.assert_close(other, one, atol=off, rtol=off, equal_nan=True)
    assert torch.equal(ours.tokens, plain.tokens)


@pytest.mark.skipif(DEVICE == "cpu", reason="on a GPU alone")
@storages
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_cuda_graph_draws_the_same(plan, storage, monkeypatch):
    monkeypatch.setenv(SWITCH, "kernel")
    model, plan, sample = llamagen(5, 4).to(DEVICE), replace(plan, storage=storage), SamplePlan(seed=5, guidance=2.5)
    captured = Captured(model.step)
    drawn = [
        torch.cat([line.tokens for line in generate(model, class_prompt([1, 3]), plan, sample, step=step, static=True)])
        for step in (None, captured)
    ]
    assert captured.why == "" and torch.equal(*drawn)


# -- the benchmark -----------------------------------------------------------------------------------------------------

SIZES = LlamaGenConfig(2, 24, 3, 32, codes=20, classes=5)
SHAPE = ModelShape("tiny LlamaGen", LlamaGen, SIZES, Grid(4, 3), SamplePlan(guidance=3.0))


def test_the_benchmark_names_who_attended(monkeypatch, capsys):
    monkeypatch.setenv(SWITCH, "sdpa")
    monkeypatch.setitem(SHAPES, SHAPE.name, SHAPE)
    told = ["--models", SHAPE.name, "--images", "1", "--plans", "line:2:int8", "--repeat", "1", "--lines", "1"]
    document = last_line(speed.main, ["--device", DEVICE, "--attention", "sdpa", "kernel", *told], monkeypatch, capsys)
    assert [r["name"] for r in document["results"]] == ["line 2/4 int8", "line 2/4 int8 kernel"]
    assert [r["attention"] for r in document["results"]] == ["sdpa", "kernel"]
    assert document["circumstances"]["triton"]


@torch.inference_mode()
@pytest.mark.parametrize("storage", STORAGE)
def test_the_gpu_benchmark_compares_both(storage):
    """Its numbers mean nothing in the interpreter, but it finds both, and they agree."""
    ask = Ask(DEVICE, True, time.monotonic() + 600)
    told = compare(ask, 1e9, storage, 2, 2, 8, 97)
    assert told["kernel_us"] > 0 and told["sdpa_us"] > 0 and told["largest_difference"] < 0.05


@torch.inference_mode()
def test_the_gpu_benchmark_draws_with_the_kernel(monkeypatch):
    monkeypatch.setenv(SWITCH, "sdpa")  # which the benchmark changes
    ask = Ask(DEVICE, True, time.monotonic() + 600)
    model = SHAPE.make(torch.bfloat16, DEVICE)
    told = drawing(ask, model, SHAPE, CachePlan("line", 2, 2, 1), 1, "eager", "kernel", 1e9)
    assert told["images_per_second"] > 0 and os.environ[SWITCH] == "kernel"

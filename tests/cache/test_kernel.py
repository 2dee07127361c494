"""Our kernel for one query: who gets it, that it compiles for GPUs, and what it computes (`kernel_checks.py`)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from bench import speed
from linear_core.cache import attention
from linear_core.cache.attention import SWITCH, no_kernel
from linear_core.cache.line_cache import LineCache
from linear_core.cache.storage import STORAGE, RawSlots
from linear_core.defaults import WINS, Win
from linear_core.errors import UserError
from linear_core.grid import Grid
from linear_core.loop.generate import generate
from linear_core.loop.graph import use_graphs
from linear_core.plan import RELEASES, CachePlan, CacheShape, SamplePlan
from linear_core.prompts import class_prompt
from tests.bench.test_speed import Allocations
from tests.tiny import Recorder, llamagen

ROOT = Path(__file__).resolve().parents[2]
CPU, GPU = torch.device("cpu"), torch.device("cuda")

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.delenv(SWITCH, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """A machine with Triton and a GPU, as far as one is asked about."""
    monkeypatch.setattr(attention, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def cache(dtype: torch.dtype = torch.float32) -> LineCache:
    return LineCache(CacheShape(1, 2, 8, 1, 4), 1, Grid(3, 3, prompt=1), CachePlan("full"), dtype=dtype, device="cpu")


# -- who gets it -------------------------------------------------------------------------------------------------------


def test_nobody_gets_it_who_does_not_ask(gpu, monkeypatch):
    """Neither the machine nor a timing turns it on."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert attention.kernel(GPU, torch.bfloat16, 8) is None and not WINS
    monkeypatch.setenv(SWITCH, "sdpa")
    assert attention.kernel(GPU, torch.bfloat16, 8) is None and cache().kernel is None


def test_where_it_was_measured_to_win_it_is_on(gpu, monkeypatch):
    """On that GPU, for those batches; not where it cannot run, and not for who says no. The same for graphs."""
    monkeypatch.setitem(sys.modules, "linear_core.cache.kernel", SimpleNamespace(attend_one=stand_in))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    both = tuple(Win(what, "NVIDIA H100", (2, 8), "a file") for what in ("kernel", "graph"))
    monkeypatch.setattr("linear_core.defaults.WINS", both)
    for rows, on in ((1, False), (2, True), (8, True), (9, False)):
        assert (attention.kernel(GPU, torch.bfloat16, rows) is stand_in) == on
        assert use_graphs("auto", GPU, rows) == on
    assert attention.kernel(GPU, torch.float64, 8) is None and cache().kernel is None, "nobody asked for it"
    assert not use_graphs("auto", CPU, 8) and not use_graphs("eager", GPU, 8) and use_graphs("graph", GPU, 9)
    with monkeypatch.context() as patch:
        patch.setenv(SWITCH, "sdpa")
        assert attention.kernel(GPU, torch.bfloat16, 8) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    assert attention.kernel(GPU, torch.bfloat16, 8) is None and not use_graphs("auto", GPU, 8)


def test_where_it_can_be_used(gpu, monkeypatch):
    """NVIDIA's GPUs from Ampere on, all dtypes that models are computed in; everything else is told why not."""
    assert [no_kernel(GPU, x) for x in (torch.float32, torch.bfloat16, torch.float16)] == ["", "", ""]
    assert "float64" in no_kernel(GPU, torch.float64)
    assert "cpu" in no_kernel(CPU, torch.float32) and "mps" in no_kernel(torch.device("mps"), torch.float32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "older" in no_kernel(GPU, torch.float32)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "AMD" in no_kernel(GPU, torch.float32)
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    assert "Triton is not installed" in no_kernel(GPU, torch.float32)


def test_who_asks_where_it_cannot_be_is_told_before_anything_is_drawn(gpu, monkeypatch):
    monkeypatch.setenv(SWITCH, "kernel")
    model = Recorder(llamagen(3, 3))
    with pytest.raises(UserError, match=r"LINEAR_ATTENTION: the kernel cannot be used because .* cpu; "):
        next(generate(model, class_prompt([1]), CachePlan("full"), SamplePlan()))
    assert not model.logits
    monkeypatch.setenv(SWITCH, "flash")
    with pytest.raises(UserError, match="'flash' is unknown; set it to sdpa or kernel"):
        cache()


def test_the_command_line_and_the_benchmark_say_so(gpu, monkeypatch, capsys):
    from linear_core.__main__ import main  # which needs Pillow, as a GPU's machine may not have

    monkeypatch.setenv(SWITCH, "kernel")
    assert main(["generate", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: LINEAR_ATTENTION: the kernel cannot be used because it needs an NVIDIA"
    )
    monkeypatch.setattr("sys.argv", ["speed.py", "--device", "cpu", "--attention", "sdpa", "kernel"])
    with pytest.raises(SystemExit):
        speed.main()
    assert "--attention: the kernel cannot be used because it needs an NVIDIA" in capsys.readouterr().err


def test_who_does_not_ask_needs_no_triton():
    code = "import sys, linear_core.loop.generate; sys.exit('linear_core.cache.kernel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- what it is given --------------------------------------------------------------------------------------------------


def stand_in(q: Tensor, keys: RawSlots, values: RawSlots, bias: Tensor) -> Tensor:
    """What the kernel owes, from what it is given, in the core's own words."""

    def unpacked(held: RawSlots) -> Tensor:
        if held.scale is None:
            return held.data
        return STORAGE["int8" if held.data.dtype == torch.int8 else "int4"].unpack(*held, q.shape[-1])

    assert q.shape[2] == 1
    return attention.attend(q, unpacked(keys), unpacked(values), bias)


@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("static", [False, True], ids=["grows", "static"])
@pytest.mark.parametrize("release", RELEASES)
def test_it_is_given_what_would_be_read(release, static, storage, monkeypatch):
    """A picture through a stand-in, to the bit. Given lines come many tokens at a time and are not its business."""
    model, calls, runs = llamagen(5, 4), 0, []
    plan = CachePlan("fold" if release == "fold" else "line", 2, 2, 0, release, storage)
    sample = SamplePlan(seed=2, guidance=2.0, guidance_interval=13)

    def counted(*given) -> Tensor:
        nonlocal calls
        calls += 1
        return stand_in(*given)

    for kernel in (None, counted):
        monkeypatch.setattr("linear_core.cache.line_cache.kernel", lambda device, dtype, rows, kernel=kernel: kernel)
        run = Recorder(model)
        above = torch.arange(8).view(1, 2, 4)
        run.lines.extend(generate(run, class_prompt([1, 3]), plan, sample, static=static, above=above))
        runs.append(run.logits)
    assert torch.equal(*map(torch.stack, [[x[:2] for x in run] for run in runs]))
    assert calls == 2 * len(run.fed), "once a layer and token"


@pytest.mark.parametrize("static", [False, True])
def test_it_reads_as_far_as_there_are_slots(static):
    """While lines are unused only what was written is read; all of it where a step has one shape. One query alone."""
    held = LineCache(CacheShape(1, 2, 8, 1, 4), 1, Grid(3, 3, prompt=1), CachePlan("full"), dtype=torch.float32,
                     device="cpu", static=static)  # fmt: skip
    told = []
    held.kernel = lambda q, keys, values, bias: told.append((keys.data, values.data, bias)) or q
    held.extend()
    held.attend(0, torch.zeros(1, 2, 1, 8))
    assert {x.shape[2] for x in told[0]} == {10 if static else 4}
    for given, read in zip(told[0], held.read(0), strict=True):
        assert given.data_ptr() == read.data_ptr() and given.stride() == read.stride()
    held.advance(torch.tensor([1]), torch.tensor([0]))
    many = torch.randn(1, 2, 3, 8)
    assert torch.equal(held.attend(0, many), attention.attend(many, *held.read(0))) and len(told) == 1


# -- that it compiles --------------------------------------------------------------------------------------------------


class Launches:
    """Takes the place of a kernel and writes down what it is called with."""

    def __init__(self) -> None:
        self.given: list[tuple] = []

    def __getitem__(self, grid: tuple[int, ...]):
        return lambda *args, **constants: self.given.append((args, constants))


def binary(kernel, args: tuple, constants: dict, capability: int) -> bytes:
    """What Triton makes of a launch for GPUs of a kind, specialised as it would be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int8: "i8", torch.uint8: "u8"}
    signature, fixed, aligned = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        value = constants.get(name) if name in constants else args[n]
        special = not kernel.params[n].do_not_specialize
        if name in constants or value is None or (special and type(value) is int and value == 1):
            signature[name], fixed[n,] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[n,] = f"*{types[value.dtype]}", [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32" if value < 2**31 else "i64"
            if special and type(value) is int and value % 16 == 0:
                aligned[n,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


# The bundled model, most LlamaGens, the largest, Janus and Lumina-mGPT; and the tests' own.
SIZES = [32, 64, 100, 128, 8]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def launches(monkeypatch, held: RawSlots, rows: int, dim: int, dtype: torch.dtype) -> dict[str, Launches]:
    """What one query over these slots, as keys and as values, starts on the GPU."""
    from linear_core.cache import kernel

    told = {name: Launches() for name in ("_attend", "_reduce_splits")}
    heads, slots = held.data.shape[1:3]
    with monkeypatch.context() as patch:
        for name, launch in told.items():
            patch.setattr(kernel, name, launch)
        kernel.attend_one(
            torch.empty(rows, heads, 1, dim, dtype=dtype), held, held, torch.empty(rows, heads, slots, dtype=dtype)
        )
    return told


def slots_of(storage: str, rows: int, dim: int, dtype: torch.dtype) -> RawSlots:
    stored = STORAGE[storage]((1, rows, 2), 600, dim, dtype, "cpu")
    return stored.raw(0, 600)


@needs_triton
@pytest.mark.parametrize("capability", [80, 90], ids=["A100", "H100"])
@pytest.mark.parametrize("storage", STORAGE)
@pytest.mark.parametrize("dim", SIZES)
def test_it_compiles_for_gpus(dim, storage, capability, monkeypatch, tmp_path):
    """To machine code, which needs no GPU: every dtype, slots shared among programs and not."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from linear_core.cache import kernel

    for dtype, rows in ((DTYPES[0], 1), (DTYPES[0], 128), (DTYPES[1], 1), (DTYPES[2], 1)):
        told = launches(monkeypatch, slots_of(storage, rows, dim, dtype), rows, dim, dtype)
        assert [len(launch.given) for launch in told.values()] == [1, 1 if rows == 1 else 0]
        for name, launch in told.items():
            for args, constants in launch.given:
                assert binary(getattr(kernel, name), args, constants, capability).startswith(b"\x7fELF")


@needs_triton
@pytest.mark.parametrize("storage", ["int8", "int4"])
def test_keys_and_values_are_read_where_they_lie(storage, monkeypatch):
    """In few bits too: the kernel is handed the cache's own memory, and new is only what comes out."""
    held = slots_of(storage, 1, 64, torch.bfloat16)
    with Allocations() as made:
        told = launches(monkeypatch, held, 1, 64, torch.bfloat16)
    own = {x.data_ptr() for x in held}
    ((args, _),) = told["_attend"].given
    assert own <= {x.data_ptr() for x in args if isinstance(x, torch.Tensor)}
    assert max(made.sizes) < held.data.nbytes / 10


# -- what it computes --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("where", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_it_computes_what_pytorchs_does(where):
    """In a process of its own, as Triton takes its interpreter when it is imported or never."""
    if where == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    env = {**os.environ, "TRITON_INTERPRET": "1"} if where == "interpreter" else dict(os.environ)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x", "tests/cache/kernel_checks.py"]
    if where == "gpu" and find_spec("xdist"):  # most of the time is compilation
        command += ["-n", "4"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 90

"""What a device must not change: memory that a run leaves, waiting within a line, half precision, the picture.

Each check has one body for the CPU and for a GPU. The CPU's runs prove the body; `pytest -m gpu` is what it is for.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.gpu_parts.pictures import agreement
from linear_core.cache.line_cache import LineCache
from linear_core.checkpoints.library import bundled_files, load_model
from linear_core.loop.drafts import check
from linear_core.loop.forced import forced_lines
from linear_core.loop.generate import evict, generate
from linear_core.loop.graph import CapturedEnd, CapturedStep, Graphs, cuda_graph
from linear_core.models import packed
from linear_core.plan import RELEASES, STORAGES, CachePlan, SamplePlan
from linear_core.policies import POLICIES
from linear_core.prompts import class_prompt
from tests.loop.test_graph import ASKING
from tests.tiny import janus, llamagen, lumina, lumina_words, words

PROMPT = class_prompt([1, 3])
SAMPLE = SamplePlan(3, guidance=2.0, guidance_interval=22, top_k=7, top_p=0.9)


def on_gpu(*values: Any) -> Any:
    return pytest.param(*values, marks=[pytest.mark.gpu, NO_GPU])


NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
devices = pytest.mark.parametrize("device", ["cpu", on_gpu("cuda")])


# -- memory ------------------------------------------------------------------------------------------------------------


def held(device: str) -> int:
    """Bytes of all tensors on a device."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()
    # Neither sparse ones nor the compiler's stand-ins, which other tests leave: they have no memory to ask for.
    found = [x for x in gc.get_objects() if type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided]
    tensors = [x for x in found if x.device.type == device]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def finish(lines: Iterator[Any]) -> None:
    for _ in lines:
        pass


def stop(lines: Iterator[Any]) -> None:
    """As the button does: in the middle, after evictions."""
    for _ in range(5):
        next(lines)
    lines.close()


def fail(lines: Iterator[Any]) -> None:
    next(lines)
    with pytest.raises(RuntimeError, match="a cable was pulled"):
        lines.throw(RuntimeError("a cable was pulled"))


@pytest.mark.parametrize("how", [finish, stop, fail])
@pytest.mark.parametrize(
    ("device", "storage", "graphs"),
    [("cpu", "int8", False), *(on_gpu("cuda", *way) for way in product(STORAGES, (False, True)))],
)
def test_a_run_leaves_no_memory(how: Callable, storage: str, graphs: bool, device: str):
    """Of two runs, as the first one fills tables that stay (RoPE)."""
    model, before = llamagen(8, 5).to(device), 0
    for run in range(3):
        if run == 1:
            before = held(device)
        kwargs = Graphs(model.step, evict, check).kwargs if graphs else {}
        lines = generate(model, PROMPT, CachePlan("fold", 2, 1, 0, storage=storage), SAMPLE, **kwargs)
        how(lines)
        del lines, kwargs
    assert held(device) == before


@devices
def test_memory_that_is_left_would_be_seen(device: str):
    before = held(device)
    kept = torch.zeros(1000, device=device)
    assert held(device) >= before + kept.nbytes


# -- nobody waits within a line ----------------------------------------------------------------------------------------


class Asked(TorchDispatchMode):
    """Stands in for CUDA's watch over synchronisation: an operation that asks for a number is an error."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in ASKING:
            raise RuntimeError(f"called a synchronizing operation: {func}")
        return func(*args, **(kwargs or {}))


class Watch:
    """On from the beginning of a line until it is reported; the only time when the host may wait is between."""

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch):
        self.device, self.mode, self.lines = device, None, 0
        report = LineCache.share_held

        def share_held(cache: LineCache, images: int) -> Tensor:
            self.off()  # the line has ended, with its eviction
            return report(cache, images)

        monkeypatch.setattr(LineCache, "share_held", share_held)

    def on(self) -> None:
        self.mode = Asked()
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        else:
            self.mode.__enter__()

    def off(self) -> None:
        if self.mode is not None:
            self.lines += 1
            if self.device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            else:
                self.mode.__exit__(None, None, None)
        self.mode = None

    def recording(self, run: Callable) -> Callable:
        """A graph is recorded once a picture, and may wait for that."""
        torch.cuda.set_sync_debug_mode("default")
        replay = cuda_graph(run)
        if self.mode is not None:
            torch.cuda.set_sync_debug_mode("error")
        return replay

    @contextmanager
    def over(self, lines: Iterator[Any]) -> Iterator[None]:
        next(lines)  # the prompt is looked at as it comes in
        try:
            while True:
                self.on()
                next(lines, None)
                if self.mode is not None:  # nothing was reported: that was the end
                    break
            yield
        finally:
            self.off()


@pytest.mark.parametrize(
    ("device", "name", "release", "graphs"),
    [("cpu", name, "strict", False) for name in ("line", "headkv")]  # test_graph.py has the others, without numbers
    + [on_gpu("cuda", *way) for way in product(POLICIES, RELEASES, (False, True))],
)
def test_nobody_waits_within_a_line(device: str, name: str, release: str, graphs: bool, monkeypatch):
    """The whole loop, by PyTorch's own watch: sampling, the step, a line's end, the survey."""
    model, watch = llamagen(8, 5).to(device), Watch(device, monkeypatch)
    kwargs: dict[str, Any] = {}
    if graphs:
        step = CapturedStep(model.step, capture=watch.recording)
        kwargs = {"step": step, "line_end": CapturedEnd(evict, capture=watch.recording), "static": True}
    plan = CachePlan(name, 2, 2, 1, release, "int8" if release == "fold" else "full")
    with watch.over(generate(model, PROMPT, plan, SAMPLE, **kwargs)):
        assert watch.lines == 7


@devices
@pytest.mark.parametrize("kind", ["janus", "lumina"])
def test_nobody_waits_with_other_models(kind: str, device: str, monkeypatch):
    make, prompt = {"janus": (janus, words([5, 3])), "lumina": (lumina, lumina_words([5, 3]))}[kind]
    model, watch = make(6, 5).to(device), Watch(device, monkeypatch)
    with watch.over(generate(model, prompt, CachePlan("fold", 2, 2, 1), SAMPLE)):
        assert watch.lines == 5


@devices
def test_who_waits_is_found_out(device: str, monkeypatch):
    model, watch = llamagen(5, 4).to(device), Watch(device, monkeypatch)

    def asks(*inputs: Any) -> Tensor:
        assert float(inputs[0].sum()) >= 0
        return model.step(*inputs)

    with (
        pytest.raises(RuntimeError, match="synchronizing"),
        watch.over(generate(model, PROMPT, CachePlan("full"), SAMPLE, step=asks)),
    ):
        pass
    assert watch.mode is None


# -- numbers -----------------------------------------------------------------------------------------------------------


@devices
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize(
    ("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 0.05), (torch.float16, 0.02)], ids=str
)
def test_logits_are_those_of_double_precision(dtype: torch.dtype, off: float, storage: str, device: str):
    """Of given codes, in units of the logits' own spread; no rounding decides what this policy evicts."""
    codes = torch.arange(30).view(1, 6, 5) % 23
    plan = CachePlan("streaming", 2, 1, 1, storage=storage)
    exact = torch.cat(list(forced_lines(llamagen(6, 5, dtype=torch.float64), class_prompt([1]), codes, plan)), 1)
    model = llamagen(6, 5, dtype=dtype).to(device)
    found = torch.cat(list(forced_lines(model, class_prompt([1]).to(device), codes, plan)), 1).cpu().double()
    error = (found - exact).square().mean().sqrt() / exact.double().std()
    assert error < off + {"full": 0, "int8": 0.02, "int4": 0.3}[storage]
    assert dtype == torch.float32 or error > 1e-4, "it is not half precision"


@devices
@pytest.mark.parametrize("policy", ["full", "line"])
def test_the_bundled_model_draws_nearly_the_same_codes(policy: str, device: str):
    """Given the same codes: those that differ are counted, and each must have been close to a tie.

    Rounding may also decide which of two tokens is evicted, and then logits differ by more.
    """
    reference, other = load_model(bundled_files()), load_model(bundled_files(), device=device)
    if device == "cpu":
        packed.pack(other.decoder)  # other kernels, so other digits
    codes = torch.arange(24 * 24).view(1, 24, 24) % reference.decoder.codes
    plan, sample = CachePlan(policy, 4), reference.info.defaults
    told = agreement(reference.decoder, other.decoder, class_prompt([1]), codes, plan, sample, 7)
    few, close = (2, 0.01) if policy == "full" else (8, 0.5)
    assert told["forced_codes"] == 7 * 24 and told["forced_codes_that_differ"] <= few
    assert told["largest_margin"] < close and told["largest_logit_difference"] < close

"""Work captured as a CUDA graph and replayed: one launch instead of hundreds for a step, of thousands for a line's end.

A graph always reads and writes the same memory, and numbers on the host are frozen when it is captured. So inputs that
change are copied to fixed tensors on the device, and the result is copied out. The cache's buffers, allocated before
the first token, are fixed already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.attention import gpu_name
from ..defaults import wins

Run = Callable[[], Tensor | None]
Capture = Callable[[Run], Run]


def cuda_graph(run: Run) -> Run:
    """Capture `run` without executing it. The function returned replays it; its result is always the same tensor."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor | None:
        graph.replay()
        return result

    return replay


@dataclass
class CapturedGraph:
    """A graph captured for one cache with so many rows, and a part of its line. Does not keep the cache alive."""

    cache: ref[Any]
    rows: int
    inputs: tuple[Tensor, ...]  # fixed tensors that the graph reads
    replay: Run | None
    why: str  # why there is no graph; empty if there is one

    def fits(self, cache: Any) -> bool:
        return bool(self.rows == cache.rows and self.cache() is cache)

    def run(self, inputs: tuple[Tensor | int, ...]) -> Tensor | None:
        """Replay the graph with these inputs."""
        assert self.replay is not None
        for fixed, new in zip(self.inputs, inputs, strict=True):
            fixed.copy_(new) if isinstance(new, Tensor) else fixed.fill_(new)
        result = self.replay()
        return None if result is None else result.clone()  # the next replay overwrites it


class Captured:
    """Work on a cache that is captured as a CUDA graph and replayed.

    `why` says why the last call used no graph; empty if it did, or if there was no call.

    The first call for a cache, and the first after rows were dropped, runs eagerly. That is also the warm-up that
    PyTorch requires, in which libraries choose kernels and tables are built. Capturing afterwards computes nothing.
    Work that cannot be captured keeps running eagerly. Where room is made several times a line, work on one part of it
    (`by_part`) has a graph for each.
    """

    by_part = False

    def __init__(self, work: Callable[..., Any], *, capture: Capture = cuda_graph, device: str = "cuda"):
        self.work, self.capture, self.device, self.why = work, capture, device, ""
        self._graphs: dict[tuple[int, int] | None, CapturedGraph] = {}

    def _run(self, work: Callable[..., Any], inputs: tuple[Tensor | int, ...], cache: Any, why: str = "") -> Any:
        """`work(*inputs)`, replayed if there is a graph. `why`: a reason not to capture it."""
        found = cache.bias.device.type
        self.why = why if found == self.device else f"graphs need {self.device} and this runs on {found}"
        if self.why:
            return work(*inputs)
        if not all(graph.fits(cache) for graph in self._graphs.values()):
            self._graphs = {}  # frees the old graphs' memory before a new one takes some
        part = cache.part if self.by_part else None
        if part not in self._graphs:
            result = work(*inputs)
            self._graphs[part] = self._capture(work, inputs, cache)
            self.why = self._graphs[part].why
            return result
        self.why = self._graphs[part].why
        return work(*inputs) if self.why else self._graphs[part].run(inputs)

    def _capture(self, work: Callable[..., Any], inputs: tuple[Tensor | int, ...], cache: Any) -> CapturedGraph:
        device, replay, why = cache.bias.device, None, ""
        # Host numbers become tensors on the device, because a graph would freeze them.
        fixed = tuple(x.clone() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in inputs)
        try:
            replay = self.capture(lambda: work(*fixed))
        except RuntimeError as error:  # an operation that graphs do not allow, or no memory; eager work goes on
            why = f"capturing it failed ({str(error).partition(chr(10))[0]})"
        return CapturedGraph(ref(cache), cache.rows, fixed, replay, why)


class CapturedStep(Captured):
    """A decoder's step as a CUDA graph: `step` of `generate`, with `static`."""

    def __call__(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: Any) -> Tensor:
        why = "" if cache.static else "the cache grows while it fills, so a step has no fixed shape"
        logits: Tensor = self._run(lambda *inputs: self.work(*inputs, cache), (token, index, pad, column), cache, why)
        return logits


class CapturedEnd(Captured):
    """`generate.evict` as a CUDA graph: `line_end` of `generate`. Its only input that changes is the row."""

    by_part = True

    def __call__(self, cache: Any, policy: Any, row: int, rotate: Any) -> None:
        self._run(lambda row: self.work(cache, policy, row, rotate), (row,), cache)


def use_graphs(asked: str, device: torch.device, sequences: int) -> bool:
    """Whether to draw with graphs: "graph" yes, "eager" no, "auto" where `defaults.py` says that they win."""
    return asked == "graph" or (asked == "auto" and wins("graph", gpu_name(device), sequences))


class CapturedCheck(Captured):
    """A pass over drafts as a CUDA graph: `check_drafts` of `generate`, with `static`.

    Its only input that changes is where to stop: codes and places are tensors that each pass updates.
    """

    by_part = True

    def __call__(self, drafts: Any, stop: int) -> None:
        why = "" if drafts.cache.static else "the cache grows while it fills, so a pass has no fixed shape"
        self._run(lambda stop: self.work(drafts, stop), (stop,), drafts.cache, why)


class Graphs:
    """The graphs of a run; `kwargs` are the arguments of `generate` that use them."""

    def __init__(self, step: Callable[..., Tensor], evict: Callable[..., None], check: Callable[..., None]):
        self.works = {"step": CapturedStep(step), "line's end": CapturedEnd(evict), "drafts": CapturedCheck(check)}
        arguments = ("step", "line_end", "check_drafts")
        self.kwargs: dict[str, Any] = dict(zip(arguments, self.works.values(), strict=True)) | {"static": True}

    @property
    def why(self) -> str:
        """Why one of them was not used; empty if all were, or had nothing to do."""
        return "; ".join(f"{name}: no graph was used, {work.why}" for name, work in self.works.items() if work.why)


HEAD_ROWS = 8  # tokens of a step are filled up to a multiple of this, so that few graphs serve all steps


class CapturedHead:
    """The diffusion head's whole denoising as a CUDA graph: `denoise` of `generate_masked`.

    One graph for each number of tokens, filled up to a multiple of HEAD_ROWS, and each choice of denoising steps.
    Conditions, noise and the strength of guidance are copied into it. `why` says why the last call used no graph.
    """

    def __init__(self, head: Callable[..., Tensor], *, capture: Capture = cuda_graph, device: str = "cuda"):
        self.head, self.capture, self.device, self.why = head, capture, device, ""
        self._graphs: dict[Any, tuple[tuple[Tensor, ...], Run | None, str]] = {}

    def __call__(self, z: Tensor, noise: Tensor, schedule: Any, guidance: float, temperature: float) -> Tensor:
        """As models.denoise.Denoiser."""
        if z.device.type != self.device:
            self.why = f"graphs need {self.device} and this runs on {z.device.type}"
            return self.head(z, noise, schedule, guidance, temperature)
        count, halves = noise.shape[1], len(z) // noise.shape[1]
        more = -count % HEAD_ROWS
        z = F.pad(z.unflatten(0, (halves, count)), (0, 0, 0, more)).flatten(0, 1)
        noise = F.pad(noise, (0, 0, 0, more))
        inputs = (z, noise, torch.as_tensor(guidance, dtype=torch.float32, device=z.device))
        key = (z.shape, noise.shape, schedule, temperature)
        if key not in self._graphs:
            drawn = self.head(*inputs[:2], schedule, inputs[2], temperature)  # also the warm-up that capturing requires
            fixed = tuple(each.clone() for each in inputs)
            replay, self.why = None, ""
            try:
                replay = self.capture(lambda: self.head(*fixed[:2], schedule, fixed[2], temperature))
            except RuntimeError as error:
                self.why = f"capturing it failed ({str(error).partition(chr(10))[0]})"
            self._graphs[key] = fixed, replay, self.why
            return drawn[:count]
        fixed, replay, self.why = self._graphs[key]
        if replay is None:
            return self.head(*inputs[:2], schedule, inputs[2], temperature)[:count]
        for kept, new in zip(fixed, inputs, strict=True):
            kept.copy_(new)
        result = replay()
        assert result is not None
        return result[:count].clone()

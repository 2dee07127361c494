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
    """A graph captured for one cache with so many rows. Does not keep the cache alive."""

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
    Work that cannot be captured keeps running eagerly.
    """

    def __init__(self, work: Callable[..., Any], *, capture: Capture = cuda_graph, device: str = "cuda"):
        self.work, self.capture, self.device, self.why = work, capture, device, ""
        self._graph: CapturedGraph | None = None

    def _run(self, work: Callable[..., Any], inputs: tuple[Tensor | int, ...], cache: Any, why: str = "") -> Any:
        """`work(*inputs)`, replayed if there is a graph. `why`: a reason not to capture it."""
        found = cache.bias.device.type
        self.why = why if found == self.device else f"graphs need {self.device} and this runs on {found}"
        if self.why:
            return work(*inputs)
        if self._graph is None or not self._graph.fits(cache):
            self._graph = None  # frees the old graph's memory before the new one takes some
            result = work(*inputs)
            self._graph = self._capture(work, inputs, cache)
            self.why = self._graph.why
            return result
        self.why = self._graph.why
        return work(*inputs) if self.why else self._graph.run(inputs)

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

    def __call__(self, cache: Any, policy: Any, row: int, rotate: Any) -> None:
        self._run(lambda row: self.work(cache, policy, row, rotate), (row,), cache)


def use_graphs(asked: str, device: torch.device, sequences: int) -> bool:
    """Whether to draw with graphs: "graph" yes, "eager" no, "auto" where `defaults.py` says that they win."""
    return asked == "graph" or (asked == "auto" and wins("graph", gpu_name(device), sequences))


class Graphs:
    """Both graphs of a run; `kwargs` are the arguments of `generate` that use them."""

    def __init__(self, step: Callable[..., Tensor], evict: Callable[..., None]):
        self.works = {"step": CapturedStep(step), "line's end": CapturedEnd(evict)}
        self.kwargs: dict[str, Any] = {"step": self.works["step"], "line_end": self.works["line's end"], "static": True}

    @property
    def why(self) -> str:
        """Why one of them was not used; empty if both were."""
        return "; ".join(f"{name}: no graph was used, {work.why}" for name, work in self.works.items() if work.why)

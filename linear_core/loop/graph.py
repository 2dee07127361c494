"""Work recorded once as a CUDA graph and replayed: one launch in place of hundreds, at a line's end of thousands.

A graph reads and writes the same memory every time, and a number of the host is for ever what it was when recorded. So
what changes from one run to the next is copied to a fixed place on the device, and the result is copied out; the
cache's buffers, allocated before the first token, are such a place already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor

Run = Callable[[], Tensor | None]
Capture = Callable[[Run], Run]


def cuda_graph(run: Run) -> Run:
    """Record `run` without running it: what is returned replays it, and its result is then in the same place."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor | None:
        graph.replay()
        return result

    return replay


@dataclass
class Recording:
    """What was recorded of a cache with so many rows. It does not keep the cache."""

    cache: ref[Any]
    rows: int
    given: tuple[Tensor, ...]  # the fixed place of what changes
    replay: Run | None
    why: str  # why there is nothing to replay; empty: there is

    def fits(self, cache: Any) -> bool:
        return bool(self.rows == cache.rows and self.cache() is cache)

    def play(self, given: tuple[Tensor | int, ...]) -> Tensor | None:
        assert self.replay is not None
        for place, new in zip(self.given, given, strict=True):
            place.copy_(new) if isinstance(new, Tensor) else place.fill_(new)
        result = self.replay()
        return None if result is None else result.clone()  # the next replay writes over it


class Captured:
    """Work on a cache behind a graph. `why` says why the last was not recorded; empty: it was, or there was none.

    The first of a cache, and the first after rows were dropped, is done as it is. That is also the warm-up that PyTorch
    asks for, in which libraries choose their kernels and tables are made; recording then computes nothing. What cannot
    be recorded goes on as it is.
    """

    def __init__(self, work: Callable[..., Any], *, capture: Capture = cuda_graph, device: str = "cuda"):
        self.work, self.capture, self.device, self.why = work, capture, device, ""
        self._recording: Recording | None = None

    def _run(self, work: Callable[..., Any], given: tuple[Tensor | int, ...], cache: Any, why: str = "") -> Any:
        """`work(*given)`, from the recording where there is one. `why`: what speaks against recording it."""
        found = cache.bias.device.type
        self.why = why if found == self.device else f"graphs are for {self.device}, and this runs on {found}"
        if self.why:
            return work(*given)
        if self._recording is None or not self._recording.fits(cache):
            self._recording = None  # the old graph's memory is free before the new one takes some
            result = work(*given)
            self._recording = self._record(work, given, cache)
            self.why = self._recording.why
            return result
        self.why = self._recording.why
        return work(*given) if self.why else self._recording.play(given)

    def _record(self, work: Callable[..., Any], given: tuple[Tensor | int, ...], cache: Any) -> Recording:
        device, replay, why = cache.bias.device, None, ""
        # A number becomes one on the device: a graph would keep it as it is now.
        held = tuple(x.clone() if isinstance(x, Tensor) else torch.full((), x, device=device) for x in given)
        try:
            replay = self.capture(lambda: work(*held))
        except RuntimeError as error:  # what a graph may not do, or no memory for it; the picture can do without
            why = f"recording failed ({str(error).partition(chr(10))[0]})"
        return Recording(ref(cache), cache.rows, held, replay, why)


class CapturedStep(Captured):
    """A decoder's step behind a graph; takes its place in `generate`, with `static`."""

    def __call__(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: Any) -> Tensor:
        why = "" if cache.static else "the cache grows while it fills, so a step has no fixed shape"
        logits: Tensor = self._run(lambda *given: self.work(*given, cache), (token, index, pad, column), cache, why)
        return logits


class CapturedEnd(Captured):
    """`generate.evict` behind a graph; takes its place in `generate`. All that changes from line to line is the row."""

    def __call__(self, cache: Any, policy: Any, row: int, rotate: Any) -> None:
        self._run(lambda row: self.work(cache, policy, row, rotate), (row,), cache)


class Graphs:
    """Both for a run: `given` is what `generate` takes of them."""

    def __init__(self, step: Callable[..., Tensor], evict: Callable[..., None]):
        self.works = {"step": CapturedStep(step), "line's end": CapturedEnd(evict)}
        self.given: dict[str, Any] = {"step": self.works["step"], "line_end": self.works["line's end"], "static": True}

    @property
    def why(self) -> str:
        """Why one was not recorded; empty: both were."""
        return "; ".join(f"{name}: no graph was used, {work.why}" for name, work in self.works.items() if work.why)

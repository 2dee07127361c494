"""A step recorded once as a CUDA graph and replayed for every token: one launch in place of hundreds.

A graph reads and writes the same memory every time. So the step's inputs are copied to a fixed place and its logits
are copied out; the cache's buffers, allocated before the first token, are such a place already.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # runs before recording, as PyTorch asks for, in which libraries choose their kernels and take memory
Run = Callable[[], Tensor]
Capture = Callable[[Run], tuple[Callable[[], None], Tensor]]


def cuda_graph(run: Run) -> tuple[Callable[[], None], Tensor]:
    """Record `run`: what replays it, and the tensor that its result is in afterwards."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


@dataclass
class Recording:
    cache: Any
    given: tuple[Tensor, ...]  # the fixed place of the step's inputs
    replay: Callable[[], None]
    logits: Tensor


class Captured:
    """A decoder's step behind a graph; takes its place in `generate`, with `static`.

    Recorded at the first token of a cache, and anew when rows are dropped. Recording runs the step several times on the
    same token: it writes the same numbers to the same slots, so nothing comes of it. `why` says why the last token was
    not replayed; empty: it was.
    """

    def __init__(self, step: Callable[..., Tensor], *, capture: Capture = cuda_graph, device: str = "cuda"):
        self.step, self.capture, self.device, self.why = step, capture, device, ""
        self._recording: Recording | None = None

    def __call__(self, token: Tensor, index: Tensor, pad: Tensor, column: Tensor, cache: Any) -> Tensor:
        self.why = self._reason(token, cache)
        if self.why:
            return self.step(token, index, pad, column, cache)
        given = (token, index, pad, column)
        recording = self._recording
        if recording is None or recording.cache is not cache or recording.given[0].shape != token.shape:
            self._recording = recording = None  # the old graph's memory is free before the new one takes some
            held = tuple(x.clone() for x in given)
            self._recording = recording = Recording(cache, held, *self.capture(lambda: self.step(*held, cache)))
        for place, new in zip(recording.given, given, strict=True):
            place.copy_(new)
        recording.replay()
        return recording.logits.clone()

    def _reason(self, token: Tensor, cache: Any) -> str:
        if token.device.type != self.device:
            return f"graphs are for {self.device}, and this runs on {token.device.type}"
        if not cache.static:
            return "the cache grows while it fills, so a step has no fixed shape"
        return ""

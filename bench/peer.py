"""Published implementations that are timed with our weights next to our own loop, and which models they support."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bench.peer_janus import Transformers
from bench.peer_llamagen import Published
from bench.shapes import ModelShape

WHICH = "A checkout of LlamaGen supports LlamaGen-B to 3B, 'transformers' supports Janus-Pro; others have no peer here."


class Peer(Protocol):
    """A published model and loop, constructed from (value of --against, our model, its weights, its shape, images)."""

    name: str  # in tables
    label: str  # of the implementation
    description: str  # of what is compared
    block: int  # tokens per turn, when contenders take turns

    def prefill(self) -> Tensor:
        """Logits B V of the first token of all sequences: conditional rows, then unconditional ones."""

    def seconds(self, count: int) -> list[float]:
        """Time of each of `count` tokens, sampling included; representative of any token of the image."""

    def picture(self) -> Tensor:
        """Draw whole images with the complete loop: codes int B N."""


def chosen(against: str) -> type[Transformers] | type[Published]:
    """The peer for a value of --against: 'transformers', or the path of a checkout."""
    return Transformers if against == Transformers.name else Published


def problem(against: str, shapes: list[ModelShape]) -> str:
    """Why this peer cannot draw with all of these models; empty if it can."""
    others = [shape.name for shape in shapes if not chosen(against).fits(shape)]
    if others:
        return f"{against} does not support {', '.join(others)}. {WHICH}"
    return chosen(against).missing(against)

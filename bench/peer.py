"""Published implementations that draw beside ours with our weights: what they owe, and which goes with which models."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from bench.peer_janus import Transformers
from bench.peer_llamagen import Published
from bench.shapes import ModelShape

WHICH = "A checkout of LlamaGen goes with LlamaGen-B to 3B, 'transformers' with Janus-Pro; others have no peer here."


class Peer(Protocol):
    """A published model and loop, made with (what --against says, our model, its weights, its shape, images)."""

    name: str  # in the tables
    label: str  # whose it is
    told: str  # what is compared with ours
    block: int  # tokens at a time, where the loop takes turns with others

    def prefill(self) -> Tensor:
        """Logits B V of the first token, of all sequences: conditional ones, then unconditional."""

    def seconds(self, count: int) -> list[float]:
        """What each of so many tokens took, sampling included; as long as at any other place of the image."""

    def picture(self) -> Tensor:
        """Whole images, drawn by the whole loop: codes int B N."""


def chosen(against: str) -> type[Transformers] | type[Published]:
    """Which peer `--against` asks for: a word, or where a checkout lies."""
    return Transformers if against == Transformers.name else Published


def problem(against: str, shapes: list[ModelShape]) -> str:
    """Why this peer cannot draw with all of these models; empty where it can."""
    others = [shape.name for shape in shapes if not chosen(against).fits(shape)]
    if others:
        return f"{against} does not go with {', '.join(others)}. {WHICH}"
    return chosen(against).missing(against)

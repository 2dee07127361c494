"""From scores to victims, written once for every policy."""

from __future__ import annotations

from torch import Tensor

from ..view import View


def choose(scores: Tensor, view: View, count: int, *, anchors: int, recent: int, prompt_slots: int) -> Tensor:
    """The `count` slots of each layer, row and head to write over next, least useful first: int64 L B H count.

    scores        L B H S, higher is kept
    anchors       image tokens from the first on that stay
    recent        newest whole lines that stay, the finished one included
    prompt_slots  slots at the front that belong to the prompt; never chosen

    Empty slots come first. Among equal scores the oldest token goes first, so that a choice never depends on where a
    token happens to lie.
    """
    index = view.index[..., prompt_slots:]
    token = index - view.grid.prompt
    protected = (token < anchors) | (token >= (view.row + 1 - recent) * view.grid.stride)
    scores = scores[..., prompt_slots:].float()
    scores = scores.masked_fill(protected, float("inf")).masked_fill(index < 0, float("-inf"))
    oldest_first = index.argsort(dim=-1, stable=True)
    order = scores.gather(-1, oldest_first).argsort(dim=-1, stable=True)[..., :count]
    return oldest_first.gather(-1, order) + prompt_slots

"""From scores to victims, written once for every policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View


def protect(scores: Tensor, index: Tensor, view: View, anchors: int, recent: int) -> Tensor:
    """`scores` with infinity for anchors and recent lines and minus infinity for empty slots; `index` as the scores."""
    token = index - view.grid.prompt
    protected = (token < anchors) | (token >= (view.row + 1 - recent) * view.grid.stride)
    return scores.float().masked_fill(protected, float("inf")).masked_fill(index < 0, float("-inf"))


def choose(
    scores: Tensor,
    view: View,
    count: int,
    *,
    anchors: int,
    recent: int,
    prompt_slots: int,
    keep: Tensor | None = None,
) -> Tensor:
    """The slots of each layer, row and head to let go, least useful first; the last `count` are the next line's.

    scores        L B H S, higher is kept
    anchors       image tokens from the first on that stay
    recent        newest whole lines that stay, the finished one included
    prompt_slots  slots at the front that belong to the prompt; never chosen
    keep          int64 L B H, image tokens that each head keeps; None: all but `count`

    Returns int64 L B H count. With `keep` it is L B H V, V image slots, and starts with -1 (none) in heads that keep
    more than others.

    Empty slots come first. Among equal scores the oldest token goes first, so that a choice never depends on where a
    token happens to lie.
    """
    index = view.index[..., prompt_slots:]
    scores = protect(scores[..., prompt_slots:], index, view, anchors, recent)
    oldest_first = index.argsort(dim=-1, stable=True)
    order = scores.gather(-1, oldest_first).argsort(dim=-1, stable=True)
    order = oldest_first.gather(-1, order) + prompt_slots
    if keep is None:
        return order[..., :count]
    place = torch.arange(order.shape[-1], device=order.device) - keep[..., None]
    return order.gather(-1, place.clamp(min=0)).masked_fill(place < 0, -1)

"""From scores to victims: the same for every policy."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from .rank import sortable


def protect(scores: Tensor, index: Tensor, view: View, anchors: int, recent: int) -> Tensor:
    """`scores` with inf for anchors and recent lines and -inf for empty slots. `index` has the shape of `scores`."""
    token = index - view.grid.prompt
    newest = view.first_of(1 - recent - bool(view.missing)) if recent else view.newest + 1
    protected = (token < anchors) | (token >= newest - view.grid.prompt)
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
    """The slots to release in each layer, row and head, least useful first; the last `count` become the next line's.

    scores        L B H S; higher is kept
    anchors       number of first image tokens that stay
    recent        number of newest whole lines that stay, the finished one included
    prompt_slots  slots at the front that belong to the prompt; never chosen
    keep          int64 L B H, image tokens that each head keeps; None: all but `count`

    Returns int64 L B H count. With `keep`: L B H V for V image slots, starting with -1 (none) in heads that keep more.

    Empty slots come first. Among equal scores the oldest token goes first, so that the choice never depends on which
    slot a token is in.
    """
    index = view.index[..., prompt_slots:]
    scores = protect(scores[..., prompt_slots:], index, view, anchors, recent)
    places = sortable(scores, index)
    if keep is None:
        return places.topk(count, largest=False).indices + prompt_slots
    order = places.argsort(dim=-1) + prompt_slots
    rank = torch.arange(order.shape[-1], device=order.device) - keep[..., None]
    return order.gather(-1, rank.clamp(min=0)).masked_fill(rank < 0, -1)

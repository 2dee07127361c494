from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from ..pyramid import Pyramid


def scale_of(view: View) -> Tensor:
    """The scale of each slot's token, -1 for empty slots: int64 L B H S."""
    assert isinstance(view.grid, Pyramid)
    firsts = torch.tensor([view.grid.index(scale) for scale in range(view.grid.stages)], device=view.index.device)
    return torch.bucketize(view.index, firsts.int(), right=True) - 1


def mass_by_scale(view: View) -> Tensor:
    """Attention of the scale's queries to all tokens of each scale, mean over queries: L B H scales."""
    assert isinstance(view.grid, Pyramid)
    attention, scale = view.attention(lambda p: p.mean(2)), scale_of(view) + 1  # place 0 collects empty slots
    found = attention.new_zeros(*scale.shape[:3], view.grid.stages + 1)
    return found.scatter_add_(-1, scale, attention)[..., 1:]

"""Outlook: what the coming lines will look at, foreseen from the line that has just finished.

A line's queries differ from the next line's in what they ask and in where they stand. Where they will stand is known:
the model's own rotation turns them there. What they ask changes little from one line to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LINES = (1, 2, 4, 8)  # how far ahead: the next line counts most, and what is needed later must survive until then


def wide(x: Tensor) -> Tensor:
    """In float32 at least: half precision is for storing."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def vectors(x: Tensor, slots: Tensor) -> Tensor:
    """x L B H S D at `slots` int64 L B H N: L B H N D."""
    size = x.shape[3]
    first = torch.arange(0, slots[..., 0].numel() * size, size, device=slots.device)
    rows = (first.view(*slots.shape[:3], 1) + slots).flatten()
    # As rows of one long table: gather takes every number by itself.
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*slots.shape, x.shape[-1])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of vectors ... N D and ... M D: ... N M.

    By differences, not by products: a product rounds near keys to nothing, and differently in batches of other sizes,
    and a choice that hangs on the last digit would then make other pictures.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class Outlook:
    """L layers, B rows of the batch, H key heads, S slots, D numbers a head, Q foreseen queries. All `wide`.

    queries  L B H Q D, turned to where they will stand and scaled by 1 / sqrt(D)
    total    L B H Q, ln of what each query's softmax divides by
    mass     L B H S, attention that each slot will draw, mean over the queries
    """

    queries: Tensor
    total: Tensor
    mass: Tensor

    def pull(self, keys: Tensor) -> Tensor:
        """Attention that a token with each of these keys L B H S D would draw, mean over the queries: L B H S."""
        return (keys @ self.queries.transpose(-1, -2) - self.total[..., None, :]).exp().mean(-1)


def look_ahead(queries: Tensor, keys: Tensor, bias: Tensor) -> Outlook:
    """Foreseen queries L B H Q D over everything held: keys L B H S D, bias L B H S."""
    queries = wide(queries) * queries.shape[-1] ** -0.5
    scores = (queries @ wide(keys).transpose(-1, -2)).add_(bias[..., None, :])  # the largest tensor of a line's end
    odds = scores.log_softmax(-1)
    held = bias.argmax(-1)[..., None, None].expand(*queries.shape[:-1], 1)  # any slot that holds something
    total = (scores.gather(-1, held) - odds.gather(-1, held))[..., 0]
    return Outlook(queries, total, odds.exp_().mean(-2))

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
    scores = queries @ wide(keys).transpose(-1, -2) + wide(bias)[..., None, :]  # the largest tensor of a line's end
    most = scores.amax(-1, keepdim=True)
    odds = scores.sub_(most).exp_()
    total = odds.sum(-1, keepdim=True)
    return Outlook(queries, (most + total.log())[..., 0], odds.div_(total).mean(-2))

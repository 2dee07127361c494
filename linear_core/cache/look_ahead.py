"""Look-ahead: the attention that coming lines will pay, estimated from the line that has just finished.

The next line's queries differ from this line's in content and in position. The position is known: the model's own RoPE
rotates the queries there. The content changes little from one line to the next.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

HORIZONS = (1, 2, 4, 8)  # lines ahead; the next line counts most, but what a later line needs must survive until then


def upcast(x: Tensor) -> Tensor:
    """x as float32 or wider: half precision is for storage only."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def gather_vectors(x: Tensor, slots: Tensor) -> Tensor:
    """x L B H S D at `slots` int64 L B H N: L B H N D."""
    size = x.shape[3]
    first = torch.arange(0, slots[..., 0].numel() * size, size, device=slots.device)
    rows = (first.view(*slots.shape[:3], 1) + slots).flatten()
    # Selecting rows of one long table is faster than gather, which copies every element by itself.
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*slots.shape, x.shape[-1])


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances of vectors ... N D and ... M D: ... N M.

    From differences, not matrix products: a product rounds the distance of near keys to zero, and differently for
    another batch size. A choice that hangs on the last digit would then change the picture.
    """
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


@dataclass(frozen=True)
class LookAhead:
    """Estimated queries of coming lines, and what they attend to. L layers, B rows of the batch, H key heads, S slots,
    D head size, Q estimated queries, those of all query heads that share the key head; all in float32 or wider.

    queries    L B H Q D, rotated to where they will stand and scaled by 1 / sqrt(D)
    logsumexp  L B H Q, of each query's scores: the logarithm of its softmax denominator
    mass       L B H S, attention that each slot will receive, mean over the queries
    """

    queries: Tensor
    logsumexp: Tensor
    mass: Tensor

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, bias: Tensor) -> LookAhead:
        """Rotated queries L B H Q D over everything held: keys L B H S D, bias L B H S."""
        queries = upcast(queries) * queries.shape[-1] ** -0.5
        scores = (queries @ upcast(keys).transpose(-1, -2)).add_(bias[..., None, :])  # a line end's largest tensor
        log_probabilities = scores.log_softmax(-1)
        held = bias.argmax(-1)[..., None, None].expand(*queries.shape[:-1], 1)  # any slot that holds something
        logsumexp = (scores.gather(-1, held) - log_probabilities.gather(-1, held))[..., 0]
        return cls(queries, logsumexp, log_probabilities.exp_().mean(-2))

    def attention_mass(self, keys: Tensor) -> Tensor:
        """Attention that a token with each of these keys L B H S D would receive, mean over the queries: L B H S."""
        return (keys @ self.queries.transpose(-1, -2) - self.logsumexp[..., None, :]).exp().mean(-1)

"""Look-ahead: the attention that coming lines will pay, estimated from the line that has just finished.

The next line's queries differ from this line's in content and in position. The position is known: the model's own RoPE
rotates the queries there. The content changes little from one line to the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Rotate = Callable[[Tensor, int, int], Tensor]  # queries ... T D to so many lines further down and columns to the right

HORIZONS = (1, 2, 4, 8)  # lines ahead; the next line counts most, but what a later line needs must survive until then


def upcast(x: Tensor) -> Tensor:
    """x as float32 or wider: half precision is for storage only."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32. Old CPUs take them number by number."""
    return device.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def gather_vectors(x: Tensor, slots: Tensor) -> Tensor:
    """x L B H S D at `slots` int64 L B H N: L B H N D."""
    size = x.shape[3]
    first = torch.arange(0, slots[..., 0].numel() * size, size, device=slots.device)
    rows = (first.view(*slots.shape[:3], 1) + slots).flatten()
    # Selecting rows of one long table is faster than gather, which copies every element by itself.
    return x.reshape(-1, x.shape[-1]).index_select(0, rows).view(*slots.shape, x.shape[-1])


def least_squares(a: Tensor, b: Tensor, squares: Tensor) -> Tensor:
    """Squared distances of a ... N D to b ... M D, less the squared lengths of b: ... N M.

    squares  ... N, the squared lengths of a, or infinity where a distance does not count

    A matrix product: |a|^2 - 2 a b. On CPUs it is fastest with the longer of the two lists as `a`.
    """
    products = a.new_empty(*a.shape[:-1], b.shape[-2])
    products.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3).transpose(1, 2), beta=0, alpha=-2)
    return products.add_(squares[..., None])


def extreme(x: Tensor, greater: bool = False) -> Tensor:
    """The least, or greatest, of x ... N M over N: ... M.

    On a CPU it takes a fraction of the time of amin: one half is compared with the other, in long vectors, and so on.
    """
    if x.device.type != "cpu":
        return x.amax(-2) if greater else x.amin(-2)
    pick = torch.maximum if greater else torch.minimum
    while (size := x.shape[-2]) > 1:
        x = pick(x[..., : size - size // 2, :], x[..., size // 2 :, :])  # of an odd number, the middle one twice
    return x[..., 0, :]


def by_matrices(rotate: Rotate) -> Rotate:
    """`rotate` as products of matrices, which take a fraction of the time; the result is float32 or wider.

    All queries of a line are rotated alike. So a matrix says it: what becomes of each unit vector.
    """
    matrices: dict[tuple[int, int], Tensor] = {}

    def product(queries: Tensor, lines: int, columns: int) -> Tensor:
        queries = upcast(queries)
        if (lines, columns) not in matrices:
            unit = torch.eye(queries.shape[-1], device=queries.device, dtype=queries.dtype)
            matrices[lines, columns] = rotate(unit[None, None, None], lines, columns)[0, 0, 0]
        return queries @ matrices[lines, columns]

    return product


@dataclass(frozen=True)
class LookAhead:
    """Estimated queries of coming lines, and what they attend to. L layers, B rows of the batch, H key heads, S slots,
    D head size, Q estimated queries, those of all query heads that share the key head; all in float32 or wider.

    queries    L B H Q D, rotated to where they will stand and scaled by 1 / sqrt(D)
    powers     L B H S Q, e to the power of each score less the query's greatest
    total      L B H Q, their sum over the slots: the query's softmax denominator
    logsumexp  L B H Q, of each query's scores
    mass       L B H S, attention that each slot will receive, mean over the queries
    """

    queries: Tensor
    powers: Tensor
    total: Tensor
    logsumexp: Tensor
    mass: Tensor

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor, bias: Tensor) -> LookAhead:
        """Queries L B H Q D as below over everything held: keys L B H S D, bias L B H S.

        Products are taken in the keys' dtype, as the model's own attention takes them; all else is float32 or wider.
        """
        # Slots by queries, because a product of this shape takes a CPU half of the time of the other.
        scores = upcast(keys @ queries.to(keys.dtype).transpose(-1, -2)).add_(bias[..., None])
        # Not by softmax, which over this dimension depends on the number of threads, and is not needed as a whole.
        greatest = extreme(scores, greater=True)
        powers = scores.sub_(greatest[..., None, :]).exp_()
        total = powers.new_ones(powers.shape[-2]) @ powers
        mass = (powers @ (1 / total)[..., None])[..., 0] / total.shape[-1]
        return cls(queries, powers, total, greatest + total.log(), mass)

    @property
    def weights(self) -> Tensor:
        """Attention that each query will pay to each slot, L B H S Q."""
        return self.powers / self.total[..., None, :]

    def attention_to(self, keys: Tensor) -> Tensor:
        """Attention that each query would pay to a token with each of these keys L B H S D: L B H S Q."""
        return (keys @ self.queries.transpose(-1, -2) - self.logsumexp[..., None, :]).exp()

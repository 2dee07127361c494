"""Folding: what leaves the cache is added to the kept slot nearest to it, instead of being forgotten.

Eviction takes a token's share of every later softmax away, and regions that lost all their tokens are forgotten. Here
a victim goes on in the slot whose key is nearest to its own. Our own finding, beyond the paper; merging without care
for what attention does is known to hurt (HACK's comparison with LOOK-M and MEDA, arXiv 2504.09261).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .look_ahead import distances, gather_vectors, upcast
from .view import View

SLACK = 1.0


@dataclass(frozen=True)
class Folded:
    """What the slots that are given something hold after folding, one for each of V victims.

    Where several victims go into one slot, each says the same. A victim's slot that was empty, or the prompt's, gives
    nothing: it names itself, as it was.

    slot          int64 L B H V
    keys, values  L B H V D, `wide`
    bias          L B H V, ln of the weight with which attention takes the slot
    count         L B H V, tokens that the slot stands for
    """

    slot: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    count: Tensor


def fold(view: View, victims: Tensor, count: Tensor) -> Folded:
    """Add each victim (int64 L B H V, slots; the prompt's give nothing) to the kept image slot whose key is nearest.

    count  L B H S, tokens that each slot stands for now

    Keys and values become means, weighted by the attention that each will draw (`View.strength`): a token that nobody
    will look at must not move one that everybody does. The weight is the one with which the slot draws what its tokens
    would have drawn together, and at most e^SLACK times more or less than their number, as the outlook is a forecast.
    Equal keys are folded without loss: n tokens of key k and values v_i are one of key k, mean value and weight n.
    """
    look, importance = view.look_ahead(), view.importance()
    kept = view.candidates().scatter(-1, victims, False)
    leaving = upcast(gather_vectors(view.keys, victims))
    distance = distances(leaving, upcast(view.keys)).masked_fill(~kept[..., None, :], float("inf"))
    gives = view.candidates().gather(-1, victims)  # a slot may be empty
    slot = torch.where(gives, _least(distance, view.index[..., None, :])[..., 0], victims)
    # One row of 0 and 1 for each victim. A product with it adds up the same way every time; scattering does not.
    together = (slot[..., :, None] == slot[..., None, :]).to(leaving.dtype)

    def merged(ours: Tensor, given: Tensor) -> Tensor:
        """What the slots have, L B H V N, and what the victims give them."""
        return ours + together @ given

    def number(x: Tensor) -> tuple[Tensor, Tensor]:
        """x L B H S of the slots and of the victims: L B H V 1 each."""
        return x.gather(-1, slot)[..., None], x.gather(-1, victims)[..., None]

    share, given = number(importance)
    total = merged(share, given)
    old_keys, old_values = (upcast(gather_vectors(x, slot)) for x in (view.keys, view.values))
    keys = merged(old_keys * share, leaving * given) / total
    values = merged(old_values * share, upcast(gather_vectors(view.values, victims)) * given) / total
    tokens = merged(*number(count.to(keys.dtype)))[..., 0]
    even = tokens.log()
    weight = (merged(*number(look.mass))[..., 0] / look.attention_mass(keys)).log()
    weight = weight.nan_to_num(0.0).clamp(even - SLACK, even + SLACK)
    there = gives[..., None]
    return Folded(
        slot,
        torch.where(there, keys, old_keys),
        torch.where(there, values, old_values),
        torch.where(gives, weight, upcast(view.bias).gather(-1, slot)),
        torch.where(gives, tokens, count.gather(-1, slot).to(keys.dtype)),
    )


def _least(distance: Tensor, index: Tensor) -> Tensor:
    """The slot of the least distance ... S, the newest token's among equals: int64 ... 1.

    Equal to three digits is equal. Keys of the same code at the same offset left and right are equally far, and the
    last digit, which is another in a batch of another size, must not decide between them.
    """
    digits = (distance.float().view(torch.int32) + 0x800 >> 12).long()  # the bits of positive floats are in their order
    return (digits << 32 | 0x7FFFFFFF - index.long()).argmin(-1, keepdim=True)

"""Folding: what leaves the cache is added to the kept slot nearest to it, instead of being forgotten.

Eviction takes a token's share of every later softmax away, and regions that lost all their tokens are forgotten. Here
a victim goes on in the slot whose key is nearest to its own. Our own finding, beyond the paper; merging without care
for what attention does is known to hurt (HACK's comparison with LOOK-M and MEDA, arXiv 2504.09261).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .outlook import distances, wide
from .view import View

SLACK = 1.0


@dataclass(frozen=True)
class Folded:
    """What the slots of a view hold after folding; victims' slots are as they were.

    keys, values  L B H S D, `wide`
    bias          L B H S, ln of the weight with which attention takes each slot
    count         L B H S, tokens that each slot stands for
    changed       bool L B H S, the slots that were given something
    """

    keys: Tensor
    values: Tensor
    bias: Tensor
    count: Tensor
    changed: Tensor


def fold(view: View, victims: Tensor, count: Tensor) -> Folded:
    """Add each victim (int64 L B H V, slots; the prompt's give nothing) to the kept image slot whose key is nearest.

    count  L B H S, tokens that each slot stands for now

    Keys and values become means, weighted by the attention that each will draw (`View.strength`): a token that nobody
    will look at must not move one that everybody does. The weight is the one with which the slot draws what its tokens
    would have drawn together, and at most e^SLACK times more or less than their number, as the outlook is a forecast.
    Equal keys are folded without loss: n tokens of key k and values v_i are one of key k, mean value and weight n.
    """
    look, strength, slots = view.outlook(), view.strength(), view.index.shape[-1]
    keys, values = wide(view.keys), wide(view.values)

    def of_victims(x: Tensor) -> Tensor:
        return x.gather(3, victims[..., None].expand(*victims.shape, x.shape[-1]))

    kept = view.candidates().scatter(-1, victims, False)
    distance = distances(of_victims(keys), keys).masked_fill(~kept[..., None, :], float("inf"))
    nearest = _least(distance, view.index[..., None, :])
    there = view.candidates().gather(-1, victims)  # a slot may be empty
    # One row of 0 and 1 for each victim. A product with it adds up the same way every time; scattering does not.
    gives = (torch.arange(slots, device=nearest.device) == nearest) & there[..., None]
    move = gives.to(keys.dtype).transpose(-1, -2)

    def given(x: Tensor) -> Tensor:
        """What each slot is given of x L B H S N."""
        return move @ of_victims(x)

    share = strength[..., None]
    total = share + given(share)
    merged_keys = (keys * share + given(keys * share)) / total
    merged_values = (values * share + given(values * share)) / total
    merged_count = count + given(count.to(keys.dtype)[..., None])[..., 0]
    mass = look.mass + given(look.mass[..., None])[..., 0]
    changed = gives.any(-2)
    # Only those that a victim goes into have a new weight; where several go into one, each says the same.
    into = nearest[..., 0]
    even = merged_count.gather(-1, into).log()
    pull = look.pull(merged_keys.gather(3, nearest.expand(*into.shape, keys.shape[-1])))
    weight = (mass.gather(-1, into) / pull).log().nan_to_num(0.0).clamp(even - SLACK, even + SLACK)
    bias = wide(view.bias)
    bias = torch.where(changed, bias.scatter(-1, into, weight), bias)
    where = changed[..., None]
    return Folded(
        torch.where(where, merged_keys, keys), torch.where(where, merged_values, values), bias, merged_count, changed
    )


def _least(distance: Tensor, index: Tensor) -> Tensor:
    """The slot of the least distance ... S, the newest token's among equals: int64 ... 1.

    Equal to three digits is equal. Keys of the same code at the same offset left and right are equally far, and the
    last digit, which is another in a batch of another size, must not decide between them.
    """
    digits = (distance.float().view(torch.int32) + 0x800 >> 12).long()  # the bits of positive floats are in their order
    return (digits << 32 | 0x7FFFFFFF - index.long()).argmin(-1, keepdim=True)

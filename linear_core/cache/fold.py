"""Folding: a victim is merged into the kept slot with the nearest key instead of being dropped.

Plain eviction removes a token's share of every later softmax, and image regions that lose all their tokens are
forgotten. Our own addition, not in the paper. Merging that ignores attention is known to hurt (HACK's comparison with
LOOK-M and MEDA, arXiv 2504.09261).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .look_ahead import distances, gather_vectors, upcast
from .view import View

SLACK = 1.0  # in ln: how far a folded slot's weight may be from its number of tokens


@dataclass(frozen=True)
class Folded:
    """New contents of the slots that victims are folded into: one entry for each of the V victims.

    Victims that share a slot have equal entries. A victim that is an empty slot or one of the prompt's is not folded:
    its entry is its own slot, unchanged.

    slot          int64 L B H V, the slot that receives the victim
    keys, values  L B H V D, float32 or wider
    bias          L B H V, ln of the weight that attention gives the slot
    count         L B H V, tokens in the slot
    """

    slot: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    count: Tensor


def fold(view: View, victims: Tensor, count: Tensor, none: Tensor | None = None) -> Folded:
    """Merge each victim (slots, int64 L B H V) into the kept image slot with the nearest key.

    count  L B H S, tokens in each slot now
    none   bool L B H V: entries of `victims` that only fill up a list, and repeat a victim of the same head

    Keys and values become means weighted by importance (`View.importance`): a token that gets no attention must not
    move one that gets much. The slot's weight is chosen so that it draws the attention mass that its tokens would have
    drawn together. That mass is only a prediction, so the weight stays within a factor of e^SLACK of the token count.
    Folding equal keys loses nothing: n tokens with key k and values v_i equal one with key k, their mean value and
    weight n. Prompt slots and empty slots are not folded.
    """
    look_ahead, importance = view.look_ahead(), view.importance()
    kept = view.candidates().scatter(-1, victims, False)
    victim_keys = upcast(gather_vectors(view.keys, victims))
    distance = distances(victim_keys, upcast(view.keys)).masked_fill(~kept[..., None, :], float("inf"))
    folds = view.candidates().gather(-1, victims)  # a victim may be an empty slot
    if none is not None:
        folds = folds & ~none
    slot = torch.where(folds, _nearest(distance, view.index[..., None, :])[..., 0], victims)
    # Victims V x V, 1 where two share a slot. A matrix product always adds in the same order; a scatter does not.
    same_slot = (slot[..., :, None] == slot[..., None, :]).to(victim_keys.dtype)

    def merge(own: Tensor, added: Tensor) -> Tensor:
        """The slots' own values plus what the victims add, all L B H V N."""
        return own + same_slot @ added

    def pair(x: Tensor) -> tuple[Tensor, Tensor]:
        """x L B H S at the receiving slots and at the victims: L B H V 1 each."""
        return x.gather(-1, slot)[..., None], x.gather(-1, victims)[..., None]

    own, added = pair(importance)
    total = merge(own, added)
    old_keys, old_values = (upcast(gather_vectors(x, slot)) for x in (view.keys, view.values))
    keys = merge(old_keys * own, victim_keys * added) / total
    values = merge(old_values * own, upcast(gather_vectors(view.values, victims)) * added) / total
    tokens = merge(*pair(count.to(keys.dtype)))[..., 0]
    log_count = tokens.log()
    weight = (merge(*pair(look_ahead.mass))[..., 0] / look_ahead.attention_mass(keys)).log()
    weight = weight.nan_to_num(0.0).clamp(log_count - SLACK, log_count + SLACK)
    folds_vector = folds[..., None]
    return Folded(
        slot,
        torch.where(folds_vector, keys, old_keys),
        torch.where(folds_vector, values, old_values),
        torch.where(folds, weight, upcast(view.bias).gather(-1, slot)),
        torch.where(folds, tokens, count.gather(-1, slot).to(keys.dtype)),
    )


def _nearest(distance: Tensor, index: Tensor) -> Tensor:
    """The slot of the smallest distance ... S, the newest token's in a tie: int64 ... 1.

    Distances equal to three digits tie. Keys of the same code at the same offset left and right are equally far, and
    the last digit, which changes with the batch size, must not decide between them.
    """
    digits = (distance.float().view(torch.int32) + 0x800 >> 12).long()  # the bits of positive floats are in their order
    return (digits << 32 | 0x7FFFFFFF - index.long()).argmin(-1, keepdim=True)

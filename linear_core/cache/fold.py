"""Folding: a victim is merged into the nearest kept slot instead of being dropped.

Plain eviction removes a token's share of every later softmax, and image regions that lose all their tokens are
forgotten. Our own addition, not in the paper. Merging that ignores attention is known to hurt (HACK's comparison with
LOOK-M and MEDA, arXiv 2504.09261). Language models merge on eviction without such a weight (CaM, ICML 2024; D2O, arXiv
2406.13035); ToMe (arXiv 2210.09461) weighs by the number of tokens. `bench/merging.py` compares them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..pyramid import Pyramid
from .look_ahead import extreme, gather_vectors, least_squares, upcast
from .view import View

SLACK = 1.0  # in ln: how far a folded slot's weight may be from its number of tokens
TIE = 1e-3  # of a squared distance
RIDGE = 0.3  # of the mean square of attention: how much a fitted value holds to the mean


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
    """Merge each victim (slots, int64 L B H V) into the nearest kept image slot (`View.points`).

    count  L B H S, tokens in each slot now
    none   bool L B H V: entries of `victims` that only fill up a list, and repeat a victim of the same head

    Keys and values become means weighted by importance (`View.importance`): a token that gets no attention must not
    move one that gets much. The slot's weight is chosen so that it draws the attention mass that its tokens would have
    drawn together. That mass is only a prediction, so the weight stays within a factor of e^SLACK of the token count.
    Over scales, where a whole scale folds at once, the values are then fitted to what the queries foreseen will read.
    Folding equal keys loses nothing: n tokens with key k and values v_i equal one with key k, their mean value and
    weight n. Prompt slots and empty slots are not folded.
    """
    look_ahead, importance, image = view.look_ahead(), view.importance(), view.candidates()
    folds = image.gather(-1, victims)  # a victim may be an empty slot
    if none is not None:
        folds = folds & ~none
    slot = torch.where(folds, _nearest(view, victims, image.scatter(-1, victims, False)), victims)
    # Victims V x V, 1 where two share a slot. A matrix product always adds in the same order; a scatter does not.
    same_slot = (slot[..., :, None] == slot[..., None, :]).to(importance.dtype)

    told = torch.stack([importance, look_ahead.mass, count.to(importance.dtype)], -1)
    own, added = gather_vectors(told, slot), gather_vectors(told, victims) * folds[..., None]
    # Sums over all that ends up in each receiving slot, L B H V each.
    whole, mass, tokens = (own + same_slot @ added).unbind(-1)
    whole = whole.clamp(min=torch.finfo(whole.dtype).tiny)
    share = torch.where(folds, own[..., 0] / whole, 1.0)[..., None]
    shares = same_slot * added[..., None, :, 0] / whole[..., None]

    def mean(x: Tensor) -> Tensor:
        """Means of vectors x L B H S D over all that ends up in each receiving slot: L B H V D."""
        own, added = (upcast(gather_vectors(x, slots)) for slots in (slot, victims))
        own.mul_(share).flatten(0, 2).baddbmm_(shares.flatten(0, 2), added.flatten(0, 2))
        return own

    keys, values = mean(view.keys), mean(view.values)
    log_count, attention = tokens.log(), look_ahead.attention_to(keys)
    weight = (mass / attention.mean(-1)).log()
    weight = weight.nan_to_num(0.0).clamp(log_count - SLACK, log_count + SLACK)
    if isinstance(view.grid, Pyramid):
        joined, counts = torch.cat([slot, victims], -1), torch.cat([folds, folds], -1).to(importance.dtype)
        changing = torch.zeros_like(importance).scatter_add_(-1, joined, counts) > 0
        wanted = (look_ahead.weights * changing[..., None]).transpose(-1, -2) @ upcast(view.values)
        attention = (attention * weight.exp()[..., None]).masked_fill(~folds[..., None], 0.0)
        values += _fit(attention, values, wanted, 1 / same_slot.sum(-1))
    return Folded(slot, keys, values, torch.where(folds, weight, upcast(view.bias).gather(-1, slot)), tokens)


def _fit(attention: Tensor, values: Tensor, wanted: Tensor, part: Tensor) -> Tensor:
    """What to add to values, so that the queries foreseen read from the folded slots what they would have read before.

    attention  L B H V Q, attention that each query will pay to the receiving slot of each victim; 0: nothing to fit
    values     L B H V D, means
    wanted     L B H Q D, what the queries are to read
    part       L B H V, 1 by the number of victims that share the slot

    Ridge regression (A. E. Hoerl and R. W. Kennard, "Ridge regression", 1970) in its dual form: the system to solve has
    the size of the queries, however many slots there are.
    """
    own = (attention * part[..., None]).transpose(-1, -2)
    gram = own @ attention
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += RIDGE * diagonal.mean(-1, keepdim=True) + torch.finfo(gram.dtype).tiny
    solved = torch.linalg.solve_ex(gram, wanted - own @ values).result  # which never waits for the device
    return attention @ solved


def _nearest(view: View, victims: Tensor, kept: Tensor) -> Tensor:
    """The slot among `kept` (bool L B H S) nearest to each victim, the newest in a tie.

    Distances within a thousandth of the least tie. Keys of the same code at the same offset left and right are equally
    far, and the last digit, which changes with the batch size, must not decide between them.
    """
    points, squares = view.points
    usable = squares.masked_fill(~kept, float("inf"))
    distance = least_squares(points, gather_vectors(points, victims), usable)
    least, own = extreme(distance), squares.gather(-1, victims)
    # All distances lack the victim's own square. It goes into the limit, which is one number instead of S.
    limit = torch.maximum((least + own).clamp(min=0.0) * (1 + TIE) - own, least)
    # One number, the less the newer, says which slot it is, too: a least number is found much faster than its place.
    slots = points.shape[-2]
    number = -(view.index * slots + torch.arange(slots, dtype=torch.int32, device=points.device))
    near = distance.le_(limit[..., None, :]).int().mul_(number[..., None])
    return extreme(near).neg().remainder(slots).long()

"""Controls for folding: how others merge what they evict. `bench/quality.py --policies CaM D2O ToMe MergingPress`.

Each method has two rows. Under its own name it merges the tokens that it evicts as published. As "fold merged as ..."
it merges those that `fold` evicts, so that nothing differs but the merging. For all, as for every policy in the lab:
one budget for each layer and head, the same anchors and recent lines protected, all of a line's victims at its end, and
only image tokens absorb others. Keys are merged as they are stored, rotated; so do the published codes.

    CaM           Zhang et al., "CaM: Cache Merging for Memory-efficient LLMs Inference", ICML 2024;
                  github.com/zyxxmu/cam, and in bulk kvpress' CAMPress, which this follows
    D2O           Wan et al., "D2O: Dynamic Discriminative Operations for Efficient Long-Context Inference of Large
                  Language Models", arXiv 2406.13035; github.com/AIoT-MLSys-Lab/D2O
    ToMe          Bolya et al., "Token Merging: Your ViT But Faster", arXiv 2210.09461; github.com/facebookresearch/ToMe
    MergingPress  github.com/NVIDIA/kvpress, kvpress/presses/merging_press.py; no paper

Nobody would draw with these, so they are not in the pack.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import e
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from linear_core.cache import line_cache
from linear_core.cache.fold import Folded
from linear_core.cache.look_ahead import gather_vectors, upcast
from linear_core.cache.view import View
from linear_core.plan import CachePlan
from linear_core.policies import MASS, POLICIES, Policy
from linear_core.policies.random import random

METHODS = ("CaM", "D2O", "ToMe", "MergingPress")
MERGED = 32  # CaM: kept tokens that share a victim's value
SMOOTHING = 0.7  # D2O: of the newest similarities in the threshold
# A view, victims (slots, int64 L B H V) and the image slots that stay (bool L B H S) -> keys, values and bias of all
# slots. Every head has as many image tokens as slots for them, so no victim is an empty slot.
Merge = Callable[[View, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


def nearest(view: View, victims: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
    """Of each victim, the cosine of its key to the most similar one among `receivers`, and that one's slot: L B H V."""
    keys = F.normalize(upcast(view.keys), dim=-1)
    cosine = gather_vectors(keys, victims) @ keys.transpose(-1, -2)
    found = cosine.masked_fill(~receivers[..., None, :], float("-inf")).max(-1)
    return found.values, found.indices


def blend(x: Tensor, own: Tensor, victims: Tensor, slots: Tensor, weight: Tensor) -> Tensor:
    """Vectors x L B H S D as weighted means of what they were (weight `own` L B H S) and of the victims (`weight`
    L B H V) that go to their slots.
    """
    x = upcast(x)
    total = own.scatter_add(-1, slots, weight)[..., None]
    brought = weight[..., None] * gather_vectors(x, victims)
    sums = (own[..., None] * x).scatter_add(-2, slots[..., None].expand_as(brought), brought)
    return torch.where(total > own[..., None], sums / total, x)


def cam(view: View, victims: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """CaM: a victim's value is added to those of the next 32 kept tokens, a 32nd to each, or not at all.

    The odds are its attention over the mean of theirs, at most 1, where attention is the sum received so far. Keys
    stay, and nothing counts for more than one token. The paper samples; here a hash decides, as in the policy `random`.
    """
    assert view.mass is not None
    order = view.index.argsort(dim=-1)  # slots in the order of the sequence
    index, here, mass = (x.gather(-1, order) for x in (view.index, kept, view.mass))
    later = here[..., None, :] & (index[..., None, :] > view.index.gather(-1, victims)[..., None])
    window = (later & (later.cumsum(-1) <= MERGED)).to(mass.dtype)
    size = window.sum(-1).clamp(min=1)
    mean = (window @ mass[..., None])[..., 0] / size
    odds = (view.mass.gather(-1, victims) / mean).nan_to_num(0.0, posinf=1.0)
    chance = (random(view).gather(-1, victims) + 0.5) / 2**32
    values = upcast(view.values)
    brought = ((chance < odds) / size)[..., None] * gather_vectors(values, victims)
    added = window.to(values.dtype).transpose(-1, -2) @ brought.to(values.dtype)
    values = values.scatter_add(-2, order[..., None].expand_as(values), added)
    return upcast(view.keys), values, upcast(view.bias)


class D2O:
    """D2O's merging: keys and values go to the kept token of the most similar key, if it is similar enough.

    Enough is a threshold that every layer, row and head keeps: the mean over the first victims, later 0.7 of the newest
    mean and 0.3 of the threshold before. Weights are exp(similarity), for the kept token itself e. Nothing counts for
    more than one token. As the paper writes it; its code weighs by the similarity itself, divides by the number of
    tokens, and judges all heads alike. The paper's budgets for layers are left out: every row here has the same memory.
    """

    def __init__(self) -> None:
        self.thresholds: dict[tuple[int, int], Tensor] = {}

    def __call__(self, view: View, victims: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        similarity, slots = nearest(view, victims, kept)
        place, newest = (view.layer, view.first), similarity.mean(-1, keepdim=True)
        threshold = SMOOTHING * newest + (1 - SMOOTHING) * self.thresholds.get(place, newest)
        self.thresholds[place] = threshold
        weight, own = similarity.exp() * (similarity >= threshold), torch.full_like(upcast(view.bias), e)
        keys, values = (blend(x, own, victims, slots, weight) for x in (view.keys, view.values))
        return keys, values, upcast(view.bias)


def tome(view: View, victims: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ToMe: means by size of keys and values, and proportional attention: ln(size) is added to the scores.

    ToMe merges the tokens between the layers of a network; keys and values are what a cache has of them.
    """
    _, slots = nearest(view, victims, receivers)
    size = upcast(view.bias).exp()
    weight = size.gather(-1, victims)
    keys, values = (blend(x, size, victims, slots, weight) for x in (view.keys, view.values))
    return keys, values, size.scatter_add(-1, slots, weight).log()


def second_set(view: View) -> Tensor:
    """Every second image token in the order of the sequence, those that absorb in ToMe's matching: bool L B H S."""
    image = view.candidates()
    place = view.index.argsort(dim=-1).argsort(dim=-1) - (~image).sum(-1, keepdim=True)
    return image & (place % 2 == 1)


def matching(view: View) -> Tensor:
    """ToMe's choice as a policy: of every other token, the one with the most similar key in the second set goes first.

    ToMe compares the mean of the keys over heads, because tokens leave all heads at once; here each head's own.
    """
    every = torch.arange(view.index.shape[-1], device=view.index.device).expand_as(view.index)
    second = second_set(view)
    similarity, _ = nearest(view, every, second)
    return torch.where(second, 2.0, -similarity)


def matched(view: View, victims: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`tome` where only the second set absorbs."""
    return tome(view, victims, kept & second_set(view))


def merging_press(view: View, victims: Tensor, kept: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """kvpress' MergingPress with its defaults: values go to the kept token of the most similar key.

    Their weight is the cosine of the keys times |v| / (|v| + |w|) for a victim's value v and the kept one's value w,
    which has weight 1. Keys stay, and nothing counts for more than one token.
    """
    similarity, slots = nearest(view, victims, kept)
    length = upcast(view.values).norm(dim=-1)
    brought, there = length.gather(-1, victims), length.gather(-1, slots)
    weight = similarity.clamp(min=0) * brought / (brought + there + 1e-6)
    values = blend(view.values, torch.ones_like(length), victims, slots, weight)
    return upcast(view.keys), values, upcast(view.bias)


@dataclass(frozen=True)
class Control:
    """A way to merge, and whose victims.

    policy  name of the policy that chooses them
    merge   makes the function that merges: a new one for each run, because D2O's remembers its thresholds
    chosen  the policy, if it is not one of the pack's
    reads   what merging needs besides what the policy reads
    """

    policy: str
    merge: Callable[[], Merge]
    chosen: Policy | None = None
    reads: frozenset[str] = frozenset()


CONTROLS = {
    "CaM": Control("streaming", lambda: cam, reads=MASS),
    "D2O": Control("h2o", D2O),
    "ToMe": Control("ToMe", lambda: matched, Policy(matching)),
    "MergingPress": Control("snapkv", lambda: merging_press),  # kvpress evaluates it with this one, among others
    "fold merged as CaM": Control("fold", lambda: cam, reads=MASS),
    "fold merged as D2O": Control("fold", D2O),
    "fold merged as ToMe": Control("fold", lambda: tome),
    "fold merged as MergingPress": Control("fold", lambda: merging_press),
}


@dataclass(frozen=True)
class MergePlan(CachePlan):
    """A plan under which victims are merged as one of CONTROLS says. Its release has to be "fold"."""

    merge: str = ""


@contextmanager
def merging(plan: CachePlan) -> Iterator[None]:
    """Within it, line caches merge as the plan says, if it is a MergePlan; otherwise nothing changes."""
    if not isinstance(plan, MergePlan):
        yield
        return
    control = CONTROLS[plan.merge]
    policy = control.chosen or POLICIES[control.policy]
    policy = replace(policy, reads=policy.reads | control.reads)
    with patch.object(line_cache, "fold", as_fold(control.merge())), patch.dict(POLICIES, {control.policy: policy}):
        yield


def as_fold(merge: Merge) -> Callable[[View, Tensor, Tensor], Folded]:
    """`merge` in the place of `linear_core.cache.fold.fold`. All slots are written anew, changed or not."""

    def fold(view: View, victims: Tensor, count: Tensor) -> Folded:
        kept = view.candidates().scatter(-1, victims, False)
        slots = torch.arange(view.index.shape[-1], device=victims.device).expand_as(view.index)
        keys, values, bias = (x.clone() for x in merge(view, victims, kept))  # which may be what they are written to
        return Folded(slots, keys, values, bias, count.clone())

    return fold

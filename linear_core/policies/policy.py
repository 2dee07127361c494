"""What a policy is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan


@dataclass(frozen=True)
class Policy:
    """A score, and for some policies how many tokens each head keeps.

    score   View -> L B H S, higher is kept
    reads   what it reads beyond keys, values and indices: "queries", "mass", "ahead" (View.outlook)
    keep    View, its scores, the plan -> int64 L B H, image tokens that each head keeps; None: all the budget. Its
            mean over a layer's heads, or over all layers' heads, is the budget (`allocate`). Such a policy is named
            in `plan.UNEVEN`, which gives its cache the room.
    survey  View -> L B ..., asked of every layer once, when the cache first overflows; from then on all views carry
            the answers of all layers (`View.survey`)

    Policies are composed by functions from policy to policy: `adakv(criticalkv(POLICIES["line"]))`.
    """

    score: Callable[[View], Tensor]
    reads: frozenset[str] = frozenset()
    keep: Callable[[View, Tensor, CachePlan], Tensor] | None = None
    survey: Callable[[View], Tensor] | None = None

"""The interface of a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..cache.view import View
from ..plan import CachePlan
from ..profile import Profile
from ..pyramid import Pyramid


@dataclass(frozen=True)
class Policy:
    """A score and, for some policies, the number of tokens that each head keeps.

    score   View -> L B H S; higher is kept
    reads   what it reads besides keys, values and indices: "queries", "mass", "ahead" (View.look_ahead)
    keep    View, its scores, the plan -> int64 L B H, image tokens that each head keeps; None: all keep the budget. The
            mean over a layer's heads, or over the heads of all layers, is the budget (`allocate`). Such a policy is
            listed in `plan.UNEVEN`, so that its cache gets the room.
    survey  View -> L B ..., called once for every layer when the cache first overflows. From then on every view
            carries the results of all layers (`View.survey`).
    profile what a model's profile says in place of the survey: Profile, Pyramid -> L H ..., the same for every row;
            None: the survey is always needed
    lines   why the policy needs lines and cannot serve a picture drawn in scales, as the end of a sentence; "": it can

    Policies compose as functions of policies: `adakv(criticalkv(POLICIES["line"]))`.
    """

    score: Callable[[View], Tensor]
    reads: frozenset[str] = frozenset()
    keep: Callable[[View, Tensor, CachePlan], Tensor] | None = None
    survey: Callable[[View], Tensor] | None = None
    lines: str = ""
    profile: Callable[[Profile, Pyramid], Tensor] | None = None

"""The registry: name -> Policy. The name is the widget's option, the README's row and the bench's row.

A policy is a function from a View to scores L B H S; higher is worth keeping. Protection of the prompt, the anchors
and the recent lines, and the number of victims, are not its business (`choose`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from ..view import View
from .choose import choose
from .fold import fold
from .full import full
from .h2o import h2o
from .keydiff import keydiff
from .line import line
from .random import random
from .rkv import rkv
from .snapkv import snapkv
from .streaming import streaming
from .tova import tova

__all__ = ["POLICIES", "Policy", "choose", "get_policy"]


@dataclass(frozen=True)
class Policy:
    """`score`, and what it `reads` beyond keys, values and indices: "queries", "mass", "ahead" (View.outlook)."""

    score: Callable[[View], Tensor]
    reads: frozenset[str] = frozenset()


POLICIES: dict[str, Policy] = {
    "line": Policy(line, frozenset({"queries"})),
    "fold": Policy(fold, frozenset({"ahead"})),
    "full": Policy(full),
    "streaming": Policy(streaming),
    "h2o": Policy(h2o, frozenset({"mass"})),
    "snapkv": Policy(snapkv, frozenset({"queries"})),
    "tova": Policy(tova, frozenset({"queries"})),
    "rkv": Policy(rkv, frozenset({"queries"})),
    "keydiff": Policy(keydiff),
    "random": Policy(random),
}


def get_policy(name: str) -> Policy:
    if name not in POLICIES:
        raise UserError(f"policy: '{name}' is unknown; choose one of {', '.join(POLICIES)}.")
    return POLICIES[name]

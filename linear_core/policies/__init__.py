"""The registry of policies by name. The name is the widget's option and the row in the README and the benchmarks.

A policy maps a View to scores L B H S; tokens with higher scores are kept. It does not protect the prompt, the anchors
or the recent lines, and does not count victims: `choose` does. Some policies also say how many tokens each head keeps
(`Policy.keep`), and some wrap others (`adakv`, `criticalkv`, `stratified`, `vase`).
"""

from __future__ import annotations

from ..errors import UserError
from .adakv import adakv
from .amskv import amskv
from .attention_distance import attention_distance
from .cake import cake
from .choose import choose
from .criticalkv import criticalkv
from .dropkv import dropkv
from .expected import expected
from .fold import fold
from .full import full
from .h2o import h2o
from .hack import hack
from .headkv import headkv
from .heatkv import heatkv
from .keydiff import keydiff
from .line import line
from .next_line import next_line
from .policy import Policy
from .prefixkv import prefixkv
from .pyramidkv import pyramidkv
from .random import random
from .rkv import rkv
from .scalekv import scalekv
from .snapkv import snapkv
from .ssd import ssd
from .stratified import stratified
from .streaming import streaming
from .tova import tova
from .vase import vase

__all__ = ["OVER_SCALES", "POLICIES", "SCALE_POLICIES", "Policy", "choose", "get_policy"]

QUERIES, MASS, AHEAD = (frozenset({name}) for name in ("queries", "mass", "ahead"))
_LINE = Policy(line, QUERIES)
_LAST = "looks at the last queries of a line, and the tokens of a scale have no order"

POLICIES: dict[str, Policy] = {
    "line": _LINE,
    "fold": Policy(fold, AHEAD),
    "full": Policy(full),
    "streaming": Policy(streaming, lines="keeps the newest tokens, and all tokens of a scale are equally new"),
    "h2o": Policy(h2o, MASS),
    "snapkv": Policy(snapkv, QUERIES, lines=_LAST),
    "tova": Policy(tova, QUERIES, lines=_LAST),
    "rkv": Policy(rkv, QUERIES),
    "keydiff": Policy(keydiff),
    "random": Policy(random),
    "next": Policy(next_line, AHEAD),
    "expected": Policy(expected, AHEAD),
    "criticalkv": criticalkv(_LINE),
    "dropkv": Policy(dropkv, QUERIES),
    "vase": vase(_LINE),
    "stratified": stratified(_LINE),
    "ssd": Policy(ssd, QUERIES | MASS, survey=attention_distance),
    "adakv": adakv(_LINE),
    "cake": cake,
    "hack": hack,
    "headkv": headkv,
    "prefixkv": prefixkv,
    "pyramidkv": pyramidkv,
}
# These weigh scales against each other, and mean nothing where a picture is drawn in lines (plan.ONLY_SCALES).
SCALE_POLICIES: dict[str, Policy] = {"heatkv": heatkv, "scalekv": scalekv, "amskv": amskv}
# Over scales, where heads of unequal room cost nothing, those of a layer share one budget. No part of it is sure to a
# head: what leaves is folded, and a head whose keys are alike needs few slots.
OVER_SCALES: dict[str, Policy] = {"fold": adakv(POLICIES["fold"], floor=0.0)}


def get_policy(name: str) -> Policy:
    """The policy of this name. Raises UserError listing the names if there is none."""
    known = POLICIES | SCALE_POLICIES
    if name not in known:
        raise UserError(f"policy: '{name}' is unknown; choose one of {', '.join(known)}.")
    return known[name]

from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def h2o(view: View) -> Tensor:
    """H2O, normalised by age: the tokens that received the most attention per query that could see them.

    Paper: Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference", arXiv 2306.14048. The paper's
    plain sum favours old tokens, which more queries have seen. It is divided by their number here, as in NVIDIA's
    kvpress (ObservedAttentionPress). Evicts once per line instead of once per token.
    Score: attention received since the token was written, divided by its age in tokens. Reads: mass.
    """
    assert view.mass is not None
    return view.mass / view.age()

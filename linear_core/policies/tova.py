from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def tova(view: View) -> Tensor:
    """TOVA: keep what the newest token attends to.

    Paper: Oren et al., "Transformers are Multi-State RNNs", arXiv 2401.06104.
    Score: the last query's softmax, averaged over the heads of a layer as published. Evicts once per line instead of
    once per token. Reads: queries.
    """
    scores = view.attention(lambda p: p.mean(2), last=1)
    return scores.mean(2, keepdim=True).expand_as(scores)

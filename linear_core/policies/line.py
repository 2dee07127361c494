from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def line(view: View) -> Tensor:
    """LineAR: keep what the finished line attended to, because the next line will attend alike.

    Paper: "Autoregressive Image Generation Needs Only a Few Lines of Cached Tokens", arXiv 2512.04857.
    Score: mean over the finished line's queries of the softmax over all slots, prompt included, per layer and head. The
    paper comes without code: which queries, which normalisation and which mean are our reading. Reads: queries.
    Defaults: 4 anchors, 2 recent lines.
    """
    return view.attention(lambda p: p.mean(2))

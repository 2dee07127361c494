from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def streaming(view: View) -> Tensor:
    """StreamingLLM: the newest tokens and a few attention sinks (here the prompt and the anchors).

    Paper: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Unlike in the
    paper, keys keep their true positions: a picture's grid must not be re-indexed.
    Score: the index. Reads: nothing. Default: 4 anchors, as the paper's 4 sinks.
    """
    return view.index.float()

from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def next_line(view: View) -> Tensor:
    """`line`, but looking from where the next line will stand.

    Our own, between LineAR (arXiv 2512.04857) and folding's outlook: the finished line's queries are turned to the next
    line, so that a token two lines above is judged as one three lines above. What is left between `line` and this is
    geometry; what is left between this and `fold` is the folding.
    Score: mean over those queries of the full softmax over all that is held. Reads: ahead.
    """
    return view.look_ahead((1,)).mass

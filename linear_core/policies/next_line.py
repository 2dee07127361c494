from __future__ import annotations

from torch import Tensor

from ..cache.view import View


def next_line(view: View) -> Tensor:
    """`line`, but seen from the positions of the next line.

    Our own, between LineAR (arXiv 2512.04857) and the look-ahead of folding: the finished line's queries are rotated to
    the next line, so that a token two lines above counts as one three lines above. The difference to `line` is
    geometry; the difference to `fold` is the folding.
    Score: mean over those queries of the softmax over all slots. Reads: ahead.
    """
    return view.look_ahead((1,)).mass

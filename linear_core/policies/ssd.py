from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from .h2o import h2o

SEMANTIC = 0.5


def ssd(view: View) -> Tensor:
    """SSD: heads that look nearby keep the newest tokens, heads that look far keep what drew most attention.

    Paper: Jian and Wang, "Spatial-Semantic Head Decoupling for Efficient Autoregressive Image Generation", arXiv
    2510.18716.
    Score: in spatial heads the index; in semantic heads attention received for the token's age (`h2o`). A head is
    semantic if more than half of its attention to the picture lies beyond its neighbourhood (`reach`). The paper
    profiles heads beforehand and tunes that threshold; here the first lines decide, and the neighbourhood is the two
    newest lines. Both kinds keep the same number, so the cache has no room to spare. Reads: queries, mass.
    """
    assert view.survey is not None
    semantic = view.survey[view.layer :][: len(view.index)] > SEMANTIC
    return torch.where(semantic[..., None], h2o(view), view.index.float())

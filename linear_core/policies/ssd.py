from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View
from .h2o import h2o

SEMANTIC = 0.5


def ssd(view: View) -> Tensor:
    """SSD: local heads keep the newest tokens, far-looking heads keep those that received the most attention.

    Paper: Jian and Wang, "Spatial-Semantic Head Decoupling for Efficient Autoregressive Image Generation", arXiv
    2510.18716.
    Score: the index in spatial heads; in semantic heads the attention received, normalised by age (`h2o`). A head is
    semantic if more than half of its attention to the picture goes beyond its neighbourhood (`attention_distance`). The
    paper profiles heads beforehand and tunes that threshold; here the first lines decide, and the neighbourhood is the
    two newest lines. Both kinds keep the same number, so the cache has no room to spare. Reads: queries, mass.
    """
    assert view.survey is not None
    semantic = view.own(view.survey) > SEMANTIC
    return torch.where(semantic[..., None], h2o(view), view.index.float())

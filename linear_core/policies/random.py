from __future__ import annotations

import torch
from torch import Tensor

from ..cache.view import View


def random(view: View) -> Tensor:
    """Evict at random, with the same protected regions: the control that every score has to beat.

    Paper: "Random Attention", arXiv 2609.03430, finds it hard to beat in language models.
    Score: a hash of layer, head, token and line, the same for every row of the batch, so that a batch equals its images
    drawn one by one and a run is repeatable. Reads: nothing.
    """
    layers, _, heads, _ = view.index.shape
    layer = view.layer + torch.arange(layers, device=view.index.device)[:, None, None, None]
    head = torch.arange(heads, device=view.index.device) if view.heads is None else view.heads
    token = view.index.long() - view.grid.prompt  # counted in the picture, so that the prompt's length does not matter
    x = ((token * 1024 + head[..., None]) * 1024 + layer) * 1024 + view.row
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 0x9E3779B1)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x.double()

from __future__ import annotations

from torch import Tensor

from ..cache.view import View

NEAR = 2  # lines: the finished one and the one above it; of a pyramid, scales


def attention_distance(view: View) -> Tensor:
    """How far each head looks: the share of its attention to the picture that goes above the two newest lines.

    L B H, from 0 (local) to 1. Whether a head looks far is a property of the head that shows in the first lines, so it
    is measured once (`Policy.survey`). HeadKV (arXiv 2605.20600) reports it for image models, SSD (arXiv 2510.18716)
    profiles it.
    """
    attention = view.attention(lambda p: p.mean(2), image_only=True)
    far = view.candidates() & (view.index < view.first_of(1 - NEAR))
    return (attention * far).sum(-1)

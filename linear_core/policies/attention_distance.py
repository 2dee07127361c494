from __future__ import annotations

from torch import Tensor

from ..cache.view import View

NEAR = 2  # lines: the finished one and the one above it


def attention_distance(view: View) -> Tensor:
    """How far each head looks: of the line's attention to the picture, the share on tokens above its two newest lines.

    L B H, 0 (local) to 1. Which heads look far is their nature and shows in the first lines, so it is asked once
    (`Policy.survey`): HeadKV (arXiv 2605.20600) finds it for image models, SSD (arXiv 2510.18716) profiles it.
    """
    attention = view.attention(lambda p: p.mean(2), image_only=True)
    far = view.candidates() & (view.index < view.grid.index(view.row + 1 - NEAR))
    return (attention * far).sum(-1)

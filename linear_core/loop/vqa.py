"""Does a picture show what a text says? Janus is asked, and says yes or no.

The score is VQAScore's (Lin et al., arXiv 2404.01291, ECCV 2024) with its question, on a scale that does not saturate:
ln of the odds of yes instead of its probability.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models.janus import Janus
from ..models.understanding import Understanding
from ..prompts.janus import Question

GREY = 0.5  # beside pictures that are not square, as their authors pad them


@torch.inference_mode()
def vqa_scores(
    decoder: Janus, understanding: Understanding, questions: Sequence[Question], pictures: Tensor, at_once: int = 8
) -> Tensor:
    """ln of the odds that the model answers yes to each picture's question: float32 B, on the CPU.

    pictures  float32 B H W 3 in 0..1, of any size
    `at_once` pictures are computed together.
    """
    found = []
    for first in range(0, len(pictures), at_once):
        own = questions[first : first + at_once]
        looked = squared(pictures[first : first + at_once].to(understanding.device), understanding.config.pixels)
        features = understanding(looked).to(decoder.dtype)
        length = max(len(question.before) + len(question.behind) for question in own) + features.shape[1]
        rows, pad = [], []
        for question, seen in zip(own, features, strict=True):
            before, behind = (
                decoder.embed_tokens(torch.tensor(ids, device=features.device)).to(features)
                for ids in (question.before, question.behind)
            )
            row = torch.cat([before, seen, behind])
            pad.append(length - len(row))
            rows.append(F.pad(row, (0, 0, pad[-1], 0)))
        hidden = decoder.hidden(torch.stack(rows), torch.tensor(pad, device=features.device))
        found.append(understanding.odds(hidden[:, -1]).cpu())
    return torch.cat(found)


def squared(pictures: Tensor, side: int) -> Tensor:
    """Pictures B H W 3 in 0..1 as B 3 S S in -1..1: the longer side scaled to `side`, with grey beside the shorter."""
    x = pictures.permute(0, 3, 1, 2)
    height, width = (max(1, round(n * side / max(x.shape[2:]))) for n in x.shape[2:])
    x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(x, (left, side - width - left, top, side - height - top), value=GREY) * 2 - 1


def vqa_bytes(decoder: Janus, understanding: Understanding, images: int) -> int:
    """Bytes that scoring `images` pictures at once takes besides the weights, for questions of usual length."""
    sizes, tokens = decoder.config, understanding.config.tokens + 160
    each = (8 * sizes.width + 3 * sizes.hidden) * tokens * decoder.dtype.itemsize
    return images * (each + 4 * tokens**2 + 12 * understanding.config.pixels**2)

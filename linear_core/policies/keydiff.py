from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View


def keydiff(view: View) -> Tensor:
    """KeyDiff: keep the keys that differ most from the average key.

    Paper: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction", arXiv 2504.15364.
    Score: minus the cosine similarity of a key with the mean of its head's normalised image keys. Reads: nothing.
    """
    keys = F.normalize(view.keys.float(), dim=-1)
    candidates = view.candidates()[..., None]
    mean = (keys * candidates).sum(-2, keepdim=True) / candidates.sum(-2, keepdim=True).clamp(min=1)
    return -F.cosine_similarity(keys, mean, dim=-1)

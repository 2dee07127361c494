from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..cache.view import View


def keydiff(view: View) -> Tensor:
    """KeyDiff: keys unlike the average key.

    Paper: Park et al., "KeyDiff: Key Similarity-Based KV Cache Eviction", arXiv 2504.15364.
    Score: minus the cosine between a key and the mean of the normalised image keys of its head. Needs no queries.
    Reads: nothing.
    """
    keys = F.normalize(view.keys.float(), dim=-1)
    held = view.candidates()[..., None]
    mean = (keys * held).sum(-2, keepdim=True) / held.sum(-2, keepdim=True).clamp(min=1)
    return -F.cosine_similarity(keys, mean, dim=-1)

"""Events: what people are told while an image grows. No torch.

`generate` yields one Line per row; tensors in it are on the host already. The other fields are JSON-ready, and the
widget in web/ uses these names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Line:
    """One finished row of every image of the batch.

    row         0-based
    rows        rows the image will have
    tokens      codes of this row, int64 B cols
    share       share of layers and heads that hold each image token once the cache is back at its budget,
                float32 B rows cols; 0 for what is evicted or not there yet
    held        image tokens held per head after the line, mean over layers, heads and images
    seconds     time since the previous line
    cache_bytes keys and values, as allocated
    """

    row: int
    rows: int
    tokens: Tensor
    share: Tensor
    held: float
    seconds: float
    cache_bytes: int

"""FastVAR's cached token pruning: at the last scales a block computes only the tokens that stand out.

Paper: Guo et al., "FastVAR: Linear Visual Autoregressive Modeling via Cached Token Pruning", arXiv 2503.23367 (ICCV
2025); code github.com/csguoh/FastVAR (MIT). What a sub-block (attention, cross-attention, feed-forward) would have
added to the others is taken from what it added at the last scale computed whole, resized by area. Those that stand out
are farthest from the mean of the sub-block's input, and only their keys and values are cached. It saves time, not
memory: those maps are kept for every layer. With Infinity the authors stop after scale 11 of 13 and leave out 0.4 and
0.5 of the last two in layers 3 to 27; that cut, `stop_after`, saves most.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..plan import PrunePlan
from ..pyramid import Pyramid

Compute = Callable[[Tensor, Tensor | None], Tensor]  # tokens R n W and their places R n (None: all) -> R n W


class Pruning:
    """Which tokens the sub-blocks of one run compute. `begin` is called before each scale."""

    def __init__(self, plan: PrunePlan, pyramid: Pyramid, stages: int):
        self.plan, self.pyramid, self.first = plan, pyramid, stages - len(plan.ratios)
        self.maps: dict[tuple[int, str], Tensor] = {}
        self.stage = -1

    def begin(self, stage: int) -> None:
        self.stage = stage

    def __call__(self, layer: int, part: str, x: Tensor, compute: Compute) -> Tensor:
        """What sub-block `part` of a layer adds to the residual stream x R n W."""
        if self.stage + 1 < self.first or not self.plan.layer(layer):
            return compute(x, None)
        if self.stage < self.first:
            self.maps[layer, part] = compute(x, None)
            return self.maps[layer, part]
        left_out = int(x.shape[1] * self.plan.ratios[self.stage - self.first])
        standing_out = (x - x.mean(1, keepdim=True)).square().sum(-1)
        places = standing_out.argsort(dim=1, descending=True, stable=True)[:, : x.shape[1] - left_out].sort(1).values
        before = self.maps[layer, part][: len(x)].transpose(1, 2).unflatten(2, self.pyramid.sides[self.first - 1])
        whole = F.interpolate(before, size=self.pyramid.sides[self.stage], mode="area").flatten(2).transpose(1, 2)
        vectors = places[..., None].expand(-1, -1, x.shape[-1])
        computed = compute(x.gather(1, vectors), places)
        return whole.scatter(1, vectors, computed.to(whole.dtype))

"""Calibration: a few pictures pass through a next-scale model, and what its heads attend to is written down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.look_ahead import upcast
from ..plan import CachePlan, SamplePlan
from ..profile import Profile
from ..pyramid import Pyramid
from .scales import Quantizer, ScaleDecoder, force, generate_scales

QUERIES = 256  # of a scale, evenly spread, whose attention is measured


class Watch:
    """A full cache that measures: what `StageCache` is to a model, and the sums that a `Profile` is made of.

    In double precision, means over rows; the sizes are those of Profile.
    """

    def __init__(self, layers: int, heads: int, pyramid: Pyramid):
        self.pyramid, self.stage = pyramid, -1
        self.mass = torch.zeros(layers, heads, pyramid.stages, pyramid.stages, dtype=torch.float64)
        self.variance = torch.zeros(layers, heads, dtype=torch.float64)
        self.similarity = torch.zeros(layers, pyramid.stages, dtype=torch.float64)
        self.held: list[tuple[Tensor, Tensor] | None] = [None] * layers

    def begin(self, stage: int) -> None:
        self.stage = stage

    def attend(self, number: int, q: Tensor, k: Tensor, v: Tensor, places: Tensor | None = None) -> Tensor:
        """Attention over all scales so far, R H n D."""
        before = self.held[number]
        if before is not None:
            self.similarity[number, self.stage] = self._similarity(before[1], v)
            k, v = torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)
        self.held[number] = k, v
        self._measure(number, q, k)
        return F.scaled_dot_product_attention(q, k, v)

    def _measure(self, number: int, q: Tensor, k: Tensor) -> None:
        looks = min(QUERIES, q.shape[2])
        q = q[:, :, torch.arange(looks, device=q.device) * q.shape[2] // looks]
        sizes = [self.pyramid.size(stage) for stage in range(self.stage + 1)]
        for head in range(q.shape[1]):  # one at a time: thousands of keys for each of hundreds of queries
            scores = upcast(q[:, head]) @ upcast(k[:, head]).transpose(-1, -2)
            attention = (scores * q.shape[-1] ** -0.5).softmax(-1)
            mass = torch.stack([part.sum(-1).mean() for part in attention.split(sizes, -1)])
            self.mass[number, head, self.stage, : self.stage + 1] = mass.double().cpu()
            if looks > 1:
                spread = attention.var(1, correction=0).sum(-1).mean().double().cpu()
                self.variance[number, head] += spread / sum(
                    self.pyramid.size(s) > 1 for s in range(self.pyramid.stages)
                )

    def _similarity(self, before: Tensor, v: Tensor) -> Tensor:
        """Of values R H n D and those of the scale before, the last of `before`, all heads together."""
        earlier, sides = before[:, :, -self.pyramid.size(self.stage - 1) :], self.pyramid.sides
        own = upcast(v).transpose(2, 3).flatten(1, 2).unflatten(2, sides[self.stage])
        own = F.interpolate(own, size=sides[self.stage - 1], mode="area").flatten(2)
        return F.cosine_similarity(own, upcast(earlier).transpose(2, 3).flatten(1, 2), dim=1).mean().double().cpu()


@torch.inference_mode()
def calibrate(
    decoder: ScaleDecoder,
    quantizer: Quantizer,
    prompt: Any,
    sample: SamplePlan,
    *,
    name: str = "the model",
    told: Callable[[int], None] = lambda done: None,
) -> Profile:
    """Draw one picture for each row of `prompt` with the full cache, and measure each on its way through the model.

    Measured are the conditional rows alone, as published (HeatKV). Memory is that of one picture with the full cache.
    `told` is called with the number of pictures done.
    """
    decoder = decoder.with_grid(prompt.grid)
    shape, pyramid = decoder.cache_shape(), decoder.pyramid
    sums: dict[str, Tensor] = {}
    for number in range(prompt.rows):
        row = prompt.select(range(number, number + 1))
        own = replace(sample, seed=sample.seed + number, smooth=False)
        drawn = list(generate_scales(decoder, quantizer, row, CachePlan("full"), own, name=name))
        watch = Watch(shape.layers, shape.heads, pyramid)
        for _ in force(decoder, quantizer, row, torch.cat([stage.tokens for stage in drawn], 1), watch):
            pass
        for key in ("mass", "variance", "similarity"):
            sums[key] = sums.get(key, 0) + getattr(watch, key) / prompt.rows
        told(number + 1)
    return Profile(name, prompt.rows, pyramid.text, **{key: x.float() for key, x in sums.items()})

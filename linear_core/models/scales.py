"""What next-scale models share: a picture is drawn one scale, one forward pass, at a time.

Such a model never embeds a token. It reads the canvas, the sum of what was drawn so far, shrunk to the scale it is
asked for; earlier scales reach it through the cache too. The residual stream stays float32 whatever the matrices are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..cache.stage_cache import StageCache
from ..grid import Grid
from ..plan import CacheShape
from ..profile import Profile
from ..prompts import Prompt
from ..pyramid import Pyramid

# What decides which tokens a sub-block computes: layer, its name, its input x R n W, and what it does with tokens
# R n' W and their places R n' (None: all of them) -> what it adds to x.
Prune = Callable[[int, str, Tensor, Callable[[Tensor, "Tensor | None"], Tensor]], Tensor]


def everything(layer: int, part: str, x: Tensor, compute: Callable[[Tensor, Tensor | None], Tensor]) -> Tensor:
    """The sub-block computes all tokens."""
    return compute(x, None)


class Scales(nn.Module):
    """Base class of next-scale models. R rows are the images, twice with guidance: conditional rows first."""

    prunes = False  # whether `stage` takes a Prune

    def __init__(self, config: Any, pyramid: Pyramid):
        super().__init__()
        self.config, self.pyramid = config, pyramid
        # Set by a host whose layers cast and move their weights when they are used.
        self.compute_dtype: torch.dtype | None = None
        self.compute_device: torch.device | None = None
        self.profile: Profile | None = None  # what is known of its heads, for policies that ask
        # Another model that draws the first scales, so many of them (`loop.scales.with_drafter`).
        self.drafter: tuple[Any, int] | None = None

    # -- defined by each model -----------------------------------------------------------------------------------------

    def with_unconditional(self, prompt: Prompt) -> Prompt:
        """The rows of `prompt`, then the rows that guidance leads away from."""
        raise NotImplementedError

    def begin(self, prompt: Prompt) -> Any:
        """What all scales of these rows share: conditions, modulations, a text's keys and values."""
        raise NotImplementedError

    def select_rows(self, state: Any, rows: int) -> Any:
        """The state of the first `rows` rows, when guidance has ended."""
        raise NotImplementedError

    def stage(self, stage: int, below: Tensor | None, state: Any, cache: StageCache) -> Tensor:
        """Logits R n V of scale `stage`.

        below  the canvas shrunk to this scale, B n Z, for the images alone; None for the first scale
        """
        raise NotImplementedError

    def guidance(self, stage: int, scale: float) -> float:
        """How strong guidance of `scale` is at a scale."""
        return scale

    def with_grid(self, grid: Grid | None) -> Scales:
        """The same model for a prompt that asks for a picture of this size; itself if it has only one."""
        return self

    @property
    def digits(self) -> int:
        """Draws of a token, each by itself: its number's digits, the highest first. Its V logits are theirs."""
        return 1

    @property
    def outcomes(self) -> int:
        """Results that each draw has."""
        return self.config.codes

    @property
    def carried(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of the tensors that a layer carries from scale to scale for each sequence; none: there is a cache."""
        return ()

    def rotate_ahead(self, stage: int, queries: Tensor) -> Tensor:
        """Queries ... T D of scale `stage` as if they stood at the same places of the next one."""
        return queries

    # -- used by the loop ----------------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return self.compute_dtype or next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return self.compute_device or next(self.parameters()).device

    @device.setter
    def device(self, device: torch.device) -> None:
        self.compute_device = device

    @property
    def codes(self) -> int:
        """Tokens there are: outcomes ** digits."""
        return self.config.codes

    def cache_shape(self, prompt: int = 0) -> CacheShape:
        """Sizes that decide the cache's memory."""
        return self.config.cache_shape(prompt, self.dtype.itemsize)

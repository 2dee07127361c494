"""The diffusion head of a masked model: a small MLP that turns noise into the numbers of one token.

github.com/LTH14/mar, models/diffloss.py and diffusion/ (MIT). Everything here is float32: the first of the published
denoising steps multiplies an error of the network's by hundreds.

What modulates the blocks depends on the step and the condition, not on the token's noise. So it is computed ahead, for
many denoising steps in one product, and only the blocks' own MLPs are left to each step. That is exact, and reads 40 %
of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.look_ahead import upcast
from ..steps import TIMESTEPS
from .blocks import Ops

EPS = 1e-6
FREQUENCIES = 256
LARGEST_BETA = 0.999
AHEAD_BYTES = 2**26  # of modulations that are computed at once


@dataclass(frozen=True, eq=False)  # two are the same only if they are one
class Schedule:
    """The numbers of each denoising step, first to last, float32.

    Within a step the mean is keep * x - take * noise, and the log variance is between `least` and `most`.
    """

    timesteps: Tensor
    keep: Tensor
    take: Tensor
    least: Tensor
    most: Tensor

    @property
    def steps(self) -> int:
        return len(self.timesteps)


@lru_cache(maxsize=256)
def schedule(timesteps: tuple[int, ...], device: torch.device) -> Schedule:
    """The cosine schedule of 1000 steps, of which only `timesteps` are taken, the noisiest first."""
    remaining, product = [], 1.0  # how much of the signal remains after each timestep: the published alphas_cumprod
    for step in range(TIMESTEPS):
        now, then = (math.cos((t / TIMESTEPS + 0.008) / 1.008 * math.pi / 2) ** 2 for t in (step, step + 1))
        product *= 1 - min(1 - then / now, LARGEST_BETA)
        remaining.append(product)
    taken = [remaining[t] for t in timesteps]
    variances, rows = [], []
    for now, before in pairwise([*taken, 1.0]):
        beta = 1 - now / before
        variances.append(beta * (1 - before) / (1 - now))
        rows.append(((1 - beta) ** -0.5, beta * ((1 - beta) * (1 - now)) ** -0.5, math.log(beta)))
    if len(variances) > 1:
        variances[-1] = variances[-2]  # the last one's is 0
    keep, take, most = zip(*rows, strict=True)
    numbers = (timesteps, keep, take, [math.log(variance) if variance else 0.0 for variance in variances], most)
    return Schedule(*(torch.tensor(each, dtype=torch.float32, device=device) for each in numbers))


def time_features(timesteps: Tensor) -> Tensor:
    """Sinusoids of timesteps T: float32 T 256, cosines first."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, device=timesteps.device).to(timesteps))
    angle = timesteps[:, None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], -1)


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.mlp = nn.Sequential(ops.Linear(FREQUENCIES, width), nn.SiLU(), ops.Linear(width, width))

    def forward(self, timesteps: Tensor) -> Tensor:
        """T -> T D."""
        return self.mlp(time_features(timesteps))


class HeadBlock(nn.Module):
    def __init__(self, width: int, ops: Ops):
        super().__init__()
        self.in_ln = ops.LayerNorm(width, eps=EPS)
        self.mlp = nn.Sequential(ops.Linear(width, width), nn.SiLU(), ops.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(width, 3 * width))

    def modulation(self, activated: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """SiLU(condition) ... D -> scale and shift of the norm's output, its own weights included, and the gate."""
        shift, scale, gate = self.adaLN_modulation[1](activated).chunk(3, -1)
        weight, bias = (part.to(scale) for part in (self.in_ln.weight, self.in_ln.bias))
        return (scale + 1) * weight, torch.addcmul(shift, scale + 1, bias), gate

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor, gate: Tensor) -> Tensor:
        h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale)
        return torch.addcmul(x, gate, self.mlp(h))


class HeadEnd(nn.Module):
    def __init__(self, width: int, numbers: int, ops: Ops):
        super().__init__()
        self.linear = ops.Linear(width, numbers)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(width, 2 * width))

    def modulation(self, activated: Tensor) -> tuple[Tensor, Tensor]:
        shift, scale = self.adaLN_modulation[1](activated).chunk(2, -1)
        return scale + 1, shift

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.linear(torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale))


Modulations = list[tuple[Tensor, ...]]  # of each block and the end, for some denoising steps: T R D each


class Denoiser(nn.Module):
    """Key names are published ones.

    numbers    of a token
    condition  width of what the transformer says about a token
    """

    def __init__(self, numbers: int, condition: int, width: int, blocks: int, ops: Ops = nn):
        super().__init__()
        self.numbers, self.width = numbers, width
        self.time_embed = TimeEmbedding(width, ops)
        self.cond_embed = ops.Linear(condition, width)
        self.input_proj = ops.Linear(numbers, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width, ops) for _ in range(blocks))
        self.final_layer = HeadEnd(width, 2 * numbers, ops)

    def modulations(self, activated: Tensor) -> Modulations:
        """SiLU(time + condition) T R D -> what each block, and the end, is modulated with."""
        parts: list[Any] = [*self.res_blocks, self.final_layer]
        return [part.modulation(activated) for part in parts]

    def look(self, x: Tensor, modulations: Modulations, step: int) -> Tensor:
        """The network once: x R C at one of the denoising steps of `modulations` -> noise and variance, R 2C."""
        h = self.input_proj(x)
        *blocks, end = ([vector[step] for vector in vectors] for vectors in modulations)
        h = h.repeat(len(end[0]) // len(h), 1)
        for block, vectors in zip(self.res_blocks, blocks, strict=True):
            h = block(h, *vectors)
        return self.final_layer(h, *end)

    def forward(
        self, z: Tensor, noise: Tensor, schedule: Schedule, guidance: Tensor | float = 1.0, temperature: float = 1.0
    ) -> Tensor:
        """Draw n tokens: float32 n C.

        z         their conditions n W; with guidance (2 n) W, conditional ones first
        noise     standard normal, T n C: to start with, then for each denoising step but the last
        guidance  its strength: a number, or a tensor of one, which a recorded graph reads anew
        """
        count, rows = noise.shape[1], len(z)
        condition = self.cond_embed(upcast(z))
        time = self.time_embed(schedule.timesteps.to(condition))
        noise = noise.to(condition)
        vectors = 3 * len(self.res_blocks) + 2
        x = noise[0]
        for step, ahead, at in modulated_steps(self.modulations, time, condition, vectors):
            eps, variance = self.look(x, ahead, at).split(self.numbers, -1)
            if rows > count:  # the variance is the conditional rows' own
                eps, variance = torch.lerp(eps[count:], eps[:count], guidance), variance[:count]
            x = schedule.keep[step] * x - schedule.take[step] * eps
            if step + 1 < schedule.steps:
                share = (variance + 1) / 2
                half_log = (share * schedule.most[step] + (1 - share) * schedule.least[step]) / 2
                x = torch.addcmul(x, half_log.exp(), noise[step + 1], value=temperature)
        return x


def modulated_steps(
    modulations: Callable[[Tensor], Modulations], time: Tensor, condition: Tensor, vectors: int
) -> Iterator[tuple[int, Modulations, int]]:
    """Number of each denoising step, the modulations of some that are computed at once, and its place among them.

    time     T D
    condition  R D
    vectors  of each step and row, to keep to AHEAD_BYTES
    """
    at_once = max(1, AHEAD_BYTES // (4 * condition.numel() * vectors))
    for first in range(0, len(time), at_once):
        part = time[first : first + at_once]
        ahead = modulations(F.silu(part[:, None] + condition))
        for at in range(len(part)):
            yield first + at, ahead, at

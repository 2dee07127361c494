"""M-VAR: VAR whose attention stays within a scale; a Mamba-2 scan joins the scales (github.com/OliverRensu/MVAR).

The published code keeps the hidden states of all tokens and scans them again at every scale. A scan is a recurrence,
so here its state is carried from scale to scale: the same numbers, and work that grows with the scale alone. Key names
are those of the published files, models/basic_mvar.py and mamba_ssm/modules/mamba2.py; every size is read from their
shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..cache.carried_state import CarriedState
from ..cache.look_ahead import upcast
from ..plan import CacheShape
from ..pyramid import Pyramid
from .blocks import Ops
from .var import VAR, Attend, Attention, FeedForward, State, VARConfig, modulate, modulation
from .var import read_config as read_var_config

CHUNK = 64  # tokens whose pairs are weighed at once: pairs grow with the square, so longer scales are scanned in parts
GATED_EPS = 1e-5

Carried = list[Tensor]  # of a layer: the convolution's last inputs R K-1 X, and the scan's state R H P N


@dataclass(frozen=True)
class MVARConfig(VARConfig):
    """Sizes.

    inner      channels of the scan, `scan_heads` heads of them
    span       tokens that the convolution before the scan reads
    scan_size  numbers that the scan's state has for each channel
    """

    inner: int = 0
    scan_heads: int = 0
    scan_size: int = 0
    span: int = 0

    @property
    def mixed(self) -> int:
        """Channels of the convolution: those of the scan, and what is written to and read from the state."""
        return self.inner + 2 * self.scan_size

    def cache_shape(self, prompt: int, bytes_per_element: int) -> CacheShape:
        """Nothing is cached."""
        return CacheShape(
            self.layers, self.heads, self.head_dim, 0, bytes_per_element, state=sum(map(prod, self.carried))
        )

    @property
    def carried(self) -> tuple[tuple[int, ...], ...]:
        """Sizes of what a layer carries for each sequence, see `Carried`."""
        return (self.span - 1, self.mixed), (self.scan_heads, self.inner // self.scan_heads, self.scan_size)


def scan(state: Tensor, x: Tensor, decay: Tensor, write: Tensor, read: Tensor) -> tuple[Tensor, Tensor]:
    """state = exp(decay) state + x write; y = state read — for T tokens in turn, as products of matrices.

    All float32 or better. A token reads what those before it wrote as far as it has not decayed, so there is a weight
    for every pair: the dual form of the paper on Mamba-2 (arXiv:2405.21060).

    state  R H P N, before the first token
    x      R T H P
    decay  R T H, at most 0
    write  R T N
    read   R T N
    Returns y R T H P, and the state after the last token.
    """
    total = decay.cumsum(1)
    since = total.mT[..., None] - total.mT[..., None, :]  # R H T T: what decays between two tokens
    later = torch.ones(since.shape[-2:], dtype=torch.bool, device=x.device).triu(diagonal=1)
    pairs = (read @ write.mT)[:, None] * since.masked_fill(later, float("-inf")).exp()
    y = torch.einsum("rhti,rihp->rthp", pairs, x) + torch.einsum("rtn,rhpn,rth->rthp", read, state, total.exp())
    left = (total[:, -1:] - total).exp()  # of each token after the last one
    added = torch.einsum("rthp,rth,rtn->rhpn", x, left, write)
    return y, total[:, -1].exp()[..., None, None] * state + added


class Mamba2(nn.Module):
    """Gates, a short causal convolution and the scan, R T W -> R T W. One group, no biases but the convolution's."""

    def __init__(self, config: MVARConfig, ops: Ops):
        super().__init__()
        self.carried = config.carried
        self.sizes = [config.inner, config.mixed, config.scan_heads]
        self.parts = [config.inner, config.scan_size, config.scan_size]
        self.in_proj = ops.Linear(config.width, sum(self.sizes), bias=False)
        self.conv1d = ops.Conv1d(config.mixed, config.mixed, config.span, groups=config.mixed)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(config.scan_heads)) for _ in range(3))
        self.norm = ops.RMSNorm(config.inner, eps=GATED_EPS)
        self.out_proj = ops.Linear(config.inner, config.width, bias=False)

    def forward(self, u: Tensor, carried: Carried | None = None) -> Tensor:
        """u R T W: tokens after those that `carried` comes from, which is brought up to the last of them in place.

        None: u begins with the first token, and nothing is carried on.
        """
        recent, state = carried or [upcast(u.new_zeros(len(u), *size)) for size in self.carried]
        step_bias, rate, skip = (upcast(each).to(u.device) for each in (self.dt_bias, self.A_log, self.D))
        gate, mixed, step = self.in_proj(u).split(self.sizes, -1)
        mixed = torch.cat([recent.to(mixed.dtype), mixed], 1)
        newest = mixed[:, -recent.shape[1] :]
        mixed = upcast(F.silu(self.conv1d(mixed.mT).mT))
        x, write, read = mixed.split(self.parts, -1)
        x = x.unflatten(-1, (len(rate), -1))
        step = F.softplus(upcast(step) + step_bias)
        inputs = (x * step[..., None], -step * rate.exp(), write, read)
        seen = []
        for part in zip(*(each.split(CHUNK, 1) for each in inputs), strict=True):
            y, state = scan(state, *part)
            seen.append(y)
        if carried:
            for before, after in zip(carried, (newest, state), strict=True):
                before.copy_(after)
        y = (torch.cat(seen, 1) + x * skip[:, None]).flatten(2) * F.silu(upcast(gate))
        return self.out_proj(self.norm(y.to(u.dtype)))


class Block(nn.Module):
    """Attention, scan and feed-forward, each modulated by the condition, R n W -> R n W."""

    def __init__(self, config: MVARConfig, ops: Ops):
        super().__init__()
        self.attn = Attention(config.width, config.heads, config.unit_qk, ops)
        self.mamba = Mamba2(config, ops)
        self.ffn = FeedForward(config.width, config.hidden, ops)
        self.ada_lin = modulation(config.width, 9, ops)

    def forward(
        self, x: Tensor, vectors: Tensor, attend: Attend, dtype: torch.dtype, carried: Carried | None = None
    ) -> Tensor:
        """x R n W, float32. vectors R 9 1 W: three factors of the residuals, three scales, three shifts."""
        parts: tuple[Callable[[Tensor], Tensor], ...] = (
            lambda x: self.attn(x, attend),
            lambda x: self.mamba(x, carried),
            self.ffn,
        )
        factors, scales, shifts = vectors.unflatten(1, (3, 3)).unbind(1)
        for n, part in enumerate(parts):
            x = x + part(modulate(x, scales[:, n], shifts[:, n]).to(dtype)) * factors[:, n]
        return x


class MVAR(VAR):
    """Decoder for M-VAR of every size. Its `stage` is given a CarriedState where VAR's is given a cache."""

    config: MVARConfig
    block = Block
    vectors = 9
    prunes = False  # its scan needs every token

    @property
    def carried(self) -> tuple[tuple[int, ...], ...]:
        return self.config.carried

    def sees(self, query: Tensor, key: Tensor) -> Tensor:
        return query == key

    def stage(self, stage: int, below: Tensor | None, state: State, cache: CarriedState) -> Tensor:  # type: ignore[override]
        x = self._input(stage, below, state)
        for layer, block in enumerate(self.blocks):
            x = block(x, state.blocks[layer], F.scaled_dot_product_attention, self.dtype, cache.layer(layer))
        return self._logits(x, state)


def read_config(shapes: Mapping[str, tuple[int, ...]], pyramid: Pyramid | None = None) -> MVARConfig:
    """Every size of an M-VAR file from its keys and shapes, as VAR's.

    Raises KeyError, IndexError or ValueError if the shapes are not an M-VAR's.
    """
    var = read_var_config(shapes, pyramid)
    if var.shared_adaln:
        raise ValueError("its layers share a modulation, which the published code cannot run")
    mamba = "blocks.0.mamba"
    inner, (mixed, _, span) = shapes[f"{mamba}.out_proj.weight"][1], shapes[f"{mamba}.conv1d.weight"]
    heads, size = shapes[f"{mamba}.A_log"][0], (mixed - inner) // 2
    if size < 1 or heads < 1 or inner % heads or inner + 2 * size != mixed or span < 2:
        raise ValueError(f"{mixed} channels of the scan do not fit {heads} heads and {inner} channels")
    sizes = {name: getattr(var, name) for name in vars(var)}
    return MVARConfig(**sizes, inner=inner, scan_heads=heads, scan_size=size, span=span)

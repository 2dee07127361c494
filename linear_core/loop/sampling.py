"""From logits to tokens, on the device, without a value that the host would have to wait for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import copy

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def apply_guidance(logits: Tensor, images: int, scale: float) -> Tensor:
    """Classifier-free guidance: logits (2 B) V, conditional rows first, then unconditional -> B V."""
    conditional, unconditional = logits[:images], logits[images:]
    return unconditional + (conditional - unconditional) * scale


def filter_logits(logits: Tensor, top_k: int, top_p: float, temperature: float = 1.0) -> Tensor:
    """Set logits to -inf outside the `top_k` most likely codes (0: all) and outside the smallest set of probability
    `top_p`.

    Top-p uses softmax(logits / temperature) over the codes that top-k has left. logits B V -> B V.
    """
    if 0 < top_k < logits.shape[-1]:
        logits = torch.where(logits < _least_of(top_k, logits), float("-inf"), logits)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = (ordered / (temperature or 1.0)).softmax(-1)
        before = probabilities.cumsum(-1).roll(1, dims=-1)  # mass before each code; the first code always stays
        before[..., 0] = 0
        outside = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, order, before > top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def _least_of(top: int, logits: Tensor) -> Tensor:
    """The least of the `top` greatest logits of each row: ... V -> ... 1."""
    if logits.device.type == "cpu":  # NumPy takes a tenth of PyTorch's time
        place = logits.shape[-1] - top
        return torch.from_numpy(np.partition(logits.numpy(), place)[..., place, None])
    return logits.topk(top, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _signed(number: int) -> int:
    """The int32 with the last 32 bits of `number`."""
    return (number + 2**31) % 2**32 - 2**31


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (Mueller's lowbias32 constants) in int32, whose products wrap on every device.

    A shift repeats the sign, so what it brings in is masked. In place, here and below: allocating memory for each of a
    dozen operations would take longer than computing them.
    """
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(0x846CA68B))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


class Noise:
    """Random numbers addressed by (seed, token, code), so that they depend on nothing else.

    Image i of a batch with seed s gets the noise of a single image with seed s + i, on every device; given several
    seeds, one for each image, that of its own. Two runs that differ only in their cache use the same noise, which makes
    their pictures comparable.
    """

    def __init__(self, seed: int | Sequence[int], images: int, codes: int, device: torch.device | str):
        seeds = [seed + i for i in range(images)] if isinstance(seed, int) else seed
        keys = [(each * 0x9E3779B97F4A7C15 ^ each >> 29) % 2**64 for each in seeds]
        low, self.high = (
            torch.tensor([_signed(k >> bits) for k in keys], dtype=torch.int32, device=device)[:, None]
            for bits in (0, 32)
        )
        self.start = _mix(torch.arange(codes, dtype=torch.int32, device=device)[None] ^ low)

    def exponential(self, token: int | Tensor) -> Tensor:
        """Standard exponential noise for image token number `token`: float32 B V, all positive.

        For several tokens of each image, `token` int64 B T, or T of all: B T V.
        """
        return self.uniform(token).neg_().log1p_().neg_()

    def normal(self, token: int | Tensor) -> Tensor:
        """Standard normal noise: half as many numbers, each made of two (Box and Muller)."""
        radius, angle = self.uniform(token).chunk(2, -1)
        return (-2 * torch.log1p(-radius)).sqrt() * (2 * math.pi * angle).cos()

    def select(self, images: Tensor) -> Noise:
        """The noise of these images alone, int64 B."""
        some = copy(self)
        some.high, some.start = self.high[images], self.start[images]
        return some

    def uniform(self, token: int | Tensor) -> Tensor:
        """Numbers between 0 and 1, neither of them included."""
        start, high, offset = self.start, self.high, (token + 1) * 0x9E3779B1
        if isinstance(offset, Tensor):
            start, high, offset = start[:, None], high[:, None], offset[..., None].int()
        else:
            offset = _signed(offset)
        bits = _mix((start + offset).bitwise_xor_(high)).long().bitwise_and_(_MASK)
        # u is finest near 0, where the race below is decided. It stays below 1: infinite noise would rule out a code,
        # even the only one that is left.
        return bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)


def sample_codes(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Sample one code per row: logits B V (already filtered), exponential noise B V -> int64 B.

    An exponential race: code v finishes at noise / p(v), and the first one wins with probability p(v). Temperature 0 is
    greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return (logits.float() / temperature - noise.log()).argmax(-1)


def as_number(digits: Tensor, base: int) -> Tensor:
    """The numbers that the digits ... D stand for, the highest digit first: int64 ..."""
    place = torch.arange(digits.shape[-1] - 1, -1, -1, device=digits.device)
    return (digits * base**place).sum(-1)


def not_finite(name: str, dtype: torch.dtype, where: str, what: str = "logits") -> str:
    """What to tell when logits are NaN or infinite; `where`: "line 3 of 24"."""
    hint = (
        "float16 ends at 65504, which large models exceed; use bfloat16 or float32"
        if dtype == torch.float16
        else "its file may be damaged or belong to another model; download it again or choose another"
    )
    kind = str(dtype).removeprefix("torch.")
    return f"{name}: its {what} are not finite (NaN or infinity, {kind}) in {where}; {hint}."

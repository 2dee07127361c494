"""From logits to tokens, on the device, without asking the host anything."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def apply_guidance(logits: Tensor, images: int, scale: float) -> Tensor:
    """Classifier-free guidance. Logits of conditional rows, then unconditional: (2 B) V -> B V."""
    conditional, unconditional = logits[:images], logits[images:]
    return unconditional + (conditional - unconditional) * scale


def filter_logits(logits: Tensor, top_k: int, top_p: float, temperature: float = 1.0) -> Tensor:
    """-inf for codes outside the `top_k` likeliest (0: all) and outside the smallest set of mass `top_p`.

    The mass is that of softmax(logits / temperature), of what `top_k` has left.
    """
    if 0 < top_k < logits.shape[-1]:
        least = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        logits = logits.masked_fill(logits < least, float("-inf"))
    if top_p < 1:
        ordered, place = logits.sort(dim=-1, descending=True)
        shares = (ordered / (temperature or 1.0)).softmax(-1)
        before = shares.cumsum(-1).roll(1, dims=-1)  # mass in front of each code; the first always stays
        before[..., 0] = 0
        outside = torch.zeros_like(before, dtype=torch.bool).scatter_(-1, place, before > top_p)
        logits = logits.masked_fill(outside, float("-inf"))
    return logits


def _mix(x: Tensor) -> Tensor:
    """A 32-bit finaliser (Mueller's lowbias32 constants) in int64 arithmetic, which every device has.

    In place, here and below: fresh memory for each of a dozen operations would take longer than what they compute.
    """
    x.bitwise_xor_(x >> 16).mul_(0x7FEB352D).bitwise_and_(_MASK)
    x.bitwise_xor_(x >> 15).mul_(0x846CA68B).bitwise_and_(_MASK)
    return x.bitwise_xor_(x >> 16)


class Noise:
    """Random numbers addressed by (seed, token, code), so they depend on nothing else.

    Image i of a batch with seed s gets what a batch of one with seed s + i gets, on every device; and two runs that
    differ in their cache alone draw with the same noise, which is what makes their pictures comparable.
    """

    def __init__(self, seed: int, images: int, codes: int, device: torch.device | str):
        keys = [((seed + i) * 0x9E3779B97F4A7C15 ^ (seed + i) >> 29) % 2**64 for i in range(images)]
        low = torch.tensor([k & _MASK for k in keys], device=device)[:, None]
        self.high = torch.tensor([k >> 32 for k in keys], device=device)[:, None]
        self.start = _mix(torch.arange(codes, device=device)[None] ^ low)

    def exponential(self, token: int) -> Tensor:
        """Standard exponential noise for image token number `token`: float32 B V, all positive."""
        bits = self.start + (token + 1) * 0x9E3779B1
        bits = _mix(bits.bitwise_and_(_MASK).bitwise_xor_(self.high))
        # u is finest near 0, where the winner of the race below is decided. It stays below 1: infinite noise would rule
        # a code out, even the only one that is left.
        u = bits.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
        return u.neg_().log1p_().neg_()


def sample_codes(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """Draw one code a row. Logits B V (restricted already), exponential noise B V -> int64 B.

    A race: code v finishes at noise / p(v), the first wins with probability p(v). Temperature 0 is greedy.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return (logits.float() / temperature - noise.log()).argmax(-1)

"""Weights drawn at random, as the same bits everywhere, for parity with numbers that published code gave for them.

Uniform numbers of a given mean and deviation, in the order in which they are asked for: nobody's sine or logarithm is
in them.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

Weights = dict[str, Tensor]


def draw(rng: np.random.Generator, shape: tuple[int, ...], deviation: float, mean: float = 0.0) -> Tensor:
    return torch.from_numpy(((rng.random(shape) - 0.5) * (12**0.5 * deviation) + mean).astype(np.float32))


def digest(tensors: Weights) -> np.ndarray:
    """SHA-256 over names and values, in order."""
    sha = hashlib.sha256()
    for name, tensor in tensors.items():
        sha.update(name.encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return np.frombuffer(sha.digest(), np.uint8)


class Layers:
    """A VQ-GAN's layers, drawn into the state dict `weights` one after the other."""

    def __init__(self, seed: int, code_dim: int = 0):
        self.rng, self.code_dim = np.random.default_rng(seed), code_dim
        self.weights: Weights = {}

    def conv(self, name: str, outer: int, inner: int, side: int = 1) -> None:
        self.weights[f"{name}.weight"] = draw(self.rng, (outer, inner, side, side), (inner * side * side) ** -0.5)
        self.weights[f"{name}.bias"] = draw(self.rng, (outer,), 0.1)

    def norm(self, name: str, channels: int) -> None:
        """A group norm; within a MoVQ's decoder its scale and shift come from entries of `code_dim` numbers."""
        if self.code_dim and name.startswith("decoder."):
            self.conv(f"{name}.conv_y", channels, self.code_dim)
            self.conv(f"{name}.conv_b", channels, self.code_dim)
            name = f"{name}.norm_layer"
        self.weights[f"{name}.weight"] = draw(self.rng, (channels,), 0.1, mean=1.0)
        self.weights[f"{name}.bias"] = draw(self.rng, (channels,), 0.1)

    def residual(self, name: str, inner: int, outer: int) -> None:
        self.norm(f"{name}.norm1", inner)
        self.conv(f"{name}.conv1", outer, inner, 3)
        self.norm(f"{name}.norm2", outer)
        self.conv(f"{name}.conv2", outer, outer, 3)
        if inner != outer:
            self.conv(f"{name}.nin_shortcut", outer, inner)

    def attention(self, name: str, channels: int) -> None:
        self.norm(f"{name}.norm", channels)
        for part in ("q", "k", "v", "proj_out"):
            self.conv(f"{name}.{part}", channels, channels)

    def codebook(self, codes: int, dim: int, deviation: float) -> None:
        self.weights["quantize.embedding.weight"] = draw(self.rng, (codes, dim), deviation)

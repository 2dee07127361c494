"""The one door to attention. B batch, H heads, T queries, S slots, D numbers a head, L layers, C tokens a line."""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError
from .storage import RawSlots

ATTENTIONS = ("sdpa", "kernel")
SWITCH = "LINEAR_ATTENTION"
Kernel = Callable[[Tensor, RawSlots, RawSlots, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Queries B H T D over slots B H S D; `bias` is ln(weight) of each slot, -inf where there is nothing.

    B H S: the same for all queries; B H T S: each its own.
    """
    if q.shape[2] == 1 and bias.ndim == 3 and q.device.type == "cpu":
        return _attend_one(q, k, v, bias)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None] if bias.ndim == 3 else bias)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same for T = 1 as two products, which read keys and values where they lie.

    The kernel for CPUs is made for many queries: for one it takes a fifth longer, in bfloat16 more than twice as long.
    """
    scores = (k @ q.transpose(-1, -2))[..., 0] * q.shape[-1] ** -0.5 + bias
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    return weights.to(v.dtype)[:, :, None] @ v


def kernel(device: torch.device | str, dtype: torch.dtype) -> Kernel | None:
    """Our own kernel for one query, where LINEAR_ATTENTION=kernel asks for it; None: PyTorch's own.

    It is asked for by name and never chosen by a timing: the same seed would draw another picture on another day.
    Raises UserError where it is asked for and cannot be had.
    """
    name = os.environ.get(SWITCH, "sdpa")
    if name not in ATTENTIONS:
        raise UserError(f"{SWITCH}: '{name}' is no attention; write sdpa or kernel.")
    if name == "sdpa":
        return None
    if why := no_kernel(torch.device(device), dtype):
        raise UserError(f"{SWITCH}: the kernel cannot be used, as {why}; write sdpa or leave it unset.")
    from .kernel import attend_one

    return attend_one


def no_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why our own kernel cannot be used there; empty: it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Windows triton-windows)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32, and this is {str(dtype).removeprefix('torch.')}"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's own way of running kernels anywhere, slowly, for tests
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it is for NVIDIA GPUs, and this runs on {'an AMD GPU' if device.type == 'cuda' else device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it is for NVIDIA GPUs from Ampere (RTX 30, A100) on, and this one is older"
    return ""


def attention_weights(queries: Tensor, keys: Tensor, bias: Tensor, index: Tensor, first: int | Tensor) -> Tensor:
    """Full softmax of a line's queries over everything held, causal within the line, for one layer.

    queries B H C D (the token at `first`, `first` + 1, …), keys B H S D, bias and index B H S -> float32 B H C S.
    """
    scores = (queries @ keys.transpose(-1, -2)).float() * queries.shape[-1] ** -0.5 + bias.float()[:, :, None]
    own = first + torch.arange(queries.shape[2], device=index.device, dtype=index.dtype)
    later = index[:, :, None] > own[:, None]
    return scores.masked_fill(later, float("-inf")).softmax(-1)

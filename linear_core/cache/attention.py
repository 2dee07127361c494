"""The only way to attention.

B batch, H key heads, Q query heads, T tokens, S slots, D head size, L layers, C tokens per line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from ..defaults import wins
from ..errors import UserError
from .look_ahead import upcast
from .storage import RawSlots

ATTENTIONS = ("sdpa", "kernel")
SWITCH = "LINEAR_ATTENTION"
# Whether a single query is two matrix products on a CPU. Where a CPU has AMX, PyTorch's own kernel is a quarter faster;
# where not, it was a fifth slower, in bfloat16 over twice as slow (bench/NOTES.md).
PRODUCTS = not getattr(torch.cpu, "_is_amx_tile_supported", bool)()
Kernel = Callable[[Tensor, RawSlots, RawSlots, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention of queries B Q T D over slots B H S D. `bias` is ln(weight) of each slot, -inf for an empty one.

    Q is a multiple of H: each key head serves as many query heads, in order. A bias of shape B H S holds for all
    queries; B H T S gives each token's its own.
    """
    group = q.shape[1] // k.shape[1]
    if group > 1:  # the queries of a group stand side by side like tokens, so that no key is copied or read twice
        q = stack_groups(q, group)
        bias = bias if bias.ndim == 3 else bias.repeat(1, 1, group, 1)
    # Not float16: products overflow there, up to where sdpa, which keeps them in float32, is finite.
    if PRODUCTS and q.shape[2] == group and bias.ndim == 3 and q.device.type == "cpu" and q.dtype != torch.float16:
        out = _attend_one(q, k, v, bias)
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, :, None] if bias.ndim == 3 else bias)
    return out if group == 1 else out.unflatten(2, (group, -1)).flatten(1, 2)


def stack_groups(queries: Tensor, group: int) -> Tensor:
    """Queries ... Q T D as ... H group*T D: those of the query heads that share a key head, one after the other."""
    return queries.unflatten(-3, (-1, group)).flatten(-3, -2)


def _attend_one(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """`attend` for one token, and few queries of a group, as two matrix products that read keys and values in place."""
    scores = (k @ q.transpose(-1, -2)).transpose(-1, -2) * q.shape[-1] ** -0.5 + bias[:, :, None]
    weights = scores.to(torch.promote_types(scores.dtype, torch.float32)).softmax(-1)
    return weights.to(v.dtype) @ v


def kernel(device: torch.device | str, dtype: torch.dtype, rows: int) -> Kernel | None:
    """Our own single-query kernel if LINEAR_ATTENTION=kernel; None means PyTorch's attention.

    Users choose it by name; otherwise a table in `defaults.py` decides, for a batch of `rows` sequences. It is never
    chosen by timing, or the same seed could draw another picture another day. Raises UserError if it is requested but
    cannot run here.
    """
    device = torch.device(device)
    name = os.environ.get(SWITCH) or ("kernel" if wins("kernel", gpu_name(device), rows) else "sdpa")
    if name not in ATTENTIONS:
        raise UserError(f"{SWITCH}: '{name}' is unknown; set it to sdpa or kernel.")
    if name == "sdpa":
        return None
    if why := no_kernel(device, dtype):
        if SWITCH not in os.environ:
            return None
        raise UserError(f"{SWITCH}: the kernel cannot be used because {why}; set it to sdpa or leave it unset.")
    from .kernel import attend_one

    return attend_one


def gpu_name(device: torch.device) -> str:
    """The GPU's name as PyTorch gives it; empty if the device is none."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


def no_kernel(device: torch.device, dtype: torch.dtype) -> str:
    """Why our own kernel cannot run on this device with this dtype; empty if it can."""
    if find_spec("triton") is None:
        return "Triton is not installed (pip install triton, on Windows triton-windows)"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"it computes in float32 and the model uses {str(dtype).removeprefix('torch.')}"
    if os.environ.get("TRITON_INTERPRET") == "1":  # Triton's interpreter runs kernels on any device, slowly: for tests
        return ""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"it needs an NVIDIA GPU and this runs on {'an AMD GPU' if device.type == 'cuda' else device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "it needs an NVIDIA GPU from Ampere on (RTX 30, A100) and this one is older"
    return ""


def attention_weights(
    queries: Tensor, keys: Tensor, bias: Tensor, index: Tensor, first: int | Tensor, apart: bool = False
) -> Tensor:
    """Softmax of a line's queries over all slots, causal within the line, for one layer.

    queries B Q C D (of the tokens at index `first`, `first` + 1, …), keys B H S D, bias and index B H S
    -> float32 B H C S, mean over the query heads that share a key head; if they are wanted `apart`, B H G C S for G of
    them.
    """
    group = queries.shape[1] // keys.shape[1]
    products = upcast(stack_groups(queries, group)) @ upcast(keys).transpose(-1, -2)  # which overflow in float16
    scores = (products.float() * queries.shape[-1] ** -0.5 + bias.float()[:, :, None]).unflatten(2, (group, -1))
    own = first + torch.arange(queries.shape[2], device=index.device, dtype=index.dtype)
    later = index[:, :, None] > own[:, None]
    weights = scores.masked_fill(later[:, :, None], float("-inf")).softmax(-1)
    if apart:
        return weights
    return weights.mean(2) if group > 1 else weights[:, :, 0]

"""Weight matrices packed for oneDNN: takes about half the time off a step on a CPU.

PyTorch's compiler does the same when it freezes a model. A packed matrix takes no additional memory.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import FeedForward
from .quantised import INT8, PackedInt8, QuantisedLinear, packs

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """A Linear whose matrix is in oneDNN's layout; stays on the CPU."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.matrix = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias, self.size = linear.bias, linear.out_features

    def forward(self, x: Tensor) -> Tensor:
        """x ... I -> ... O."""
        if torch.compiler.is_compiling():
            return torch.ops.linear_ar.packed_linear(x, self.matrix, self.bias, self.size)
        return _packed_linear(x, self.matrix, self.bias, self.size)


def _packed_linear(x: Tensor, matrix: Tensor, bias: Tensor | None, size: int) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, matrix, bias, "none", [], "")


# The compiler would decompose PyTorch's own operation and pack again; it calls a custom one as it is.
_opaque = torch.library.custom_op(
    "linear_ar::packed_linear",
    _packed_linear,
    mutates_args=(),
    schema="(Tensor x, Tensor matrix, Tensor? bias, int size) -> Tensor",
)
_opaque.register_fake(lambda x, matrix, bias, size: x.new_empty(*x.shape[:-1], size))


def available() -> bool:
    """Whether this PyTorch has the operations that packing needs. They are internal to its compiler."""
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return torch.backends.mkldnn.is_available() and all(hasattr(torch.ops.mkldnn, name) for name in names)


class PackedFeedForward(nn.Module):
    """A FeedForward in 8 bits, whose first two matrices are one, as they read the same input: one product less."""

    def __init__(self, block: FeedForward):
        super().__init__()
        first, third = block.w1, block.w3
        both = QuantisedLinear(first.in_features, first.out_features + third.out_features, False, INT8)
        both.weight.data, both.scale.data = (
            torch.cat([getattr(first, name).data, getattr(third, name).data]) for name in ("weight", "scale")
        )
        self.w13, self.w2 = PackedInt8(both), PackedInt8(block.w2)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w13(x).chunk(2, -1)
        out: Tensor = self.w2(F.silu(gate) * value)
        return out


class PackedNorm(nn.Module):
    """An RMSNorm in four operations in place of eight: the LayerNorm of x and -x side by side, whose mean is 0."""

    def __init__(self, norm: nn.RMSNorm):
        super().__init__()
        self.weight = nn.Parameter(torch.cat([norm.weight, norm.weight]), requires_grad=False)
        self.eps = norm.eps or torch.finfo(norm.weight.dtype).eps

    def forward(self, x: Tensor) -> Tensor:
        """x ... W -> ... W."""
        both = F.layer_norm(torch.cat([x, -x], -1), self.weight.shape, self.weight, None, self.eps)
        return both[..., : x.shape[-1]]


def pack(model: nn.Module) -> int:
    """Pack every plain Linear of `model` on the CPU, and every one in 8 bits, in place; returns how many there were.

    Norms become few operations each: their number is what a step of a small batch takes its time for, next to reading
    the weights. The packed model can only compute: it can be neither moved nor saved. Does nothing if packing is
    unavailable.
    """
    if not available():
        return 0
    found = [(parent, name, child) for parent in model.modules() for name, child in parent.named_children()]
    count = 0
    while found:  # layers are freed as they are packed
        parent, name, child = found.pop(0)
        packed: nn.Module | None = None
        if isinstance(child, FeedForward) and all(_in_8_bits(linear) for linear in child.children()):
            packed = PackedFeedForward(child)
            found = [one for one in found if one[0] is not child]
        elif isinstance(child, QuantisedLinear) and _in_8_bits(child):
            packed = PackedInt8(child)
        elif type(child) is nn.RMSNorm and child.weight.device.type == "cpu":
            setattr(parent, name, PackedNorm(child))
        elif isinstance(child, nn.Linear) and type(child) is nn.Linear:
            fits = child.weight.device.type == "cpu" and child.weight.dtype in DTYPES
            packed = PackedLinear(child) if fits else None
        if packed is not None:
            setattr(parent, name, packed)
            count += 3 if isinstance(packed, PackedFeedForward) else 1
    return count


def _in_8_bits(layer: nn.Module) -> bool:
    found = type(layer) is QuantisedLinear and layer.kind == INT8 and layer.weight.device.type == "cpu"
    return found and packs()

"""Linear layers whose matrices take 8 or 4 bits a weight, and are multiplied as they lie: fewer bytes, less time.

Only weights are rounded. int8 has one scale for each output channel: w = q s. int4 has a scale and a zero for each
`group` of input channels: w = q s + z. Both are rounded to bfloat16 before the weights are, so every product below uses
the same numbers.

Which product is used follows from device and shape alone, never from a timing. Each is tried once on a small matrix,
and one that is missing or computes something else is passed over; the last resort converts the matrix back first.

    CPU   int8  oneDNN's for 8-bit integers, for packed models (see `PackedInt8`), else PyTorch's weight-only product
          int4  PyTorch's weight-only product, which has a layout of its own
    CUDA  int8  our Triton kernel, else PyTorch's weight-only product
          int4  PyTorch's tinygemm, which has a layout of its own, else comfy-kitchen's, which ComfyUI brings

I, O input and output channels, G = I / group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Ops

HALF = torch.bfloat16  # what PyTorch's products of few bits take and give

FEW = 16  # rows, at most, that the products for single tokens are given; more are worth converting the matrix for
AT_ONCE = {"cpu": 2**18, "cuda": 2**26}  # weights that are converted at once: what a core's cache holds
ROUNDED = 2**22  # weights that are rounded at once


@dataclass(frozen=True)
class Quantisation:
    """How matrices are stored. `group`: input channels that share a scale; 0: all of an output channel do."""

    bits: int
    group: int = 0

    def fits(self, outputs: int, inputs: int) -> bool:
        """Whether the products take a matrix of this size. int8 fits all."""
        return self.bits == 8 or (inputs % self.group == 0 and outputs % 64 == 0)

    def bytes(self, outputs: int, inputs: int) -> int:
        """Of a matrix with its scales."""
        return outputs * (inputs + 2) if self.bits == 8 else outputs * (inputs // 2 + 4 * inputs // self.group)


INT8, INT4 = Quantisation(8), Quantisation(4, 64)
QUANTISATIONS = {"int8": INT8, "int4": INT4}


def chosen(kind: Quantisation, outputs: int, inputs: int) -> Quantisation:
    """`kind`, or int8 for a matrix whose sides do not divide into its groups."""
    return kind if kind.fits(outputs, inputs) else INT8


# -- the arithmetic ----------------------------------------------------------------------------------------------------


def quantise(rows: Tensor, kind: Quantisation) -> tuple[Tensor, Tensor]:
    """Rows O I, floating-point -> int8 O I and scales bfloat16 O; or uint8 O I/2 and scales with zeros G O 2.

    A byte of int4 holds two neighbouring weights plus 8, the first in its upper half.
    """
    rows = rows.float()
    if kind.bits == 8:
        scale = (rows.abs().amax(1) / 127).to(HALF)
        return (rows / _nonzero(scale)[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale
    groups = rows.unflatten(1, (-1, kind.group))
    low, high = groups.aminmax(dim=2)
    scale = ((high - low) / 15).to(HALF)
    zero = (low + 8 * scale.float()).to(HALF)
    numbers = ((groups - zero.float()[..., None]) / _nonzero(scale)[..., None]).round_().clamp_(-8, 7) + 8
    halves = numbers.flatten(1).to(torch.uint8).unflatten(1, (-1, 2))
    return halves[..., 0] << 4 | halves[..., 1], torch.stack([scale, zero], -1).transpose(0, 1).contiguous()


def _nonzero(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1, scale).float()


def dequantise(stored: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What `quantise` stored, as numbers: the matrix O I. All products are compared with the one by this matrix."""
    if stored.dtype == torch.int8:
        return stored.to(dtype).mul_(scale.to(dtype)[:, None])
    numbers = torch.stack([stored >> 4, stored & 15], -1).flatten(1)
    s, z = scale.to(dtype).transpose(0, 1).unbind(-1)
    groups = numbers.to(dtype).sub_(8).unflatten(1, (s.shape[1], -1))
    return (groups.mul_(s[..., None]).add_(z[..., None])).flatten(1)


# -- the products: x M I, a matrix and its scales -> M O in x's dtype --------------------------------------------------

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def _converted(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """By way of the matrix in x's dtype, some rows of it at a time."""
    rows = max(AT_ONCE.get(x.device.type, 2**26) // x.shape[1], 1)
    parts = zip(matrix.split(rows), scale.split(rows, -1 if scale.ndim == 1 else 1), strict=True)
    out = [F.linear(x, dequantise(part, of_part, x.dtype)) for part, of_part in parts]
    return out[0] if len(out) == 1 else torch.cat(out, -1)


def _weight_only_8(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    return torch._weight_int8pack_mm(x.to(HALF), matrix, scale).to(x.dtype)


def _kernel_8(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    from .quantised_kernel import multiply

    return multiply(x, matrix, scale)


def _cpu_4(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    group = x.shape[1] // len(scale)
    return torch.ops.aten._weight_int4pack_mm_for_cpu(x.to(HALF), matrix, group, scale).to(x.dtype)


def _cuda_4(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten._weight_int4pack_mm(x.to(HALF), matrix, x.shape[1] // len(scale), scale).to(x.dtype)


def _kitchen_4(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    from comfy_kitchen import gemv_awq_w4a16

    scales, zeros = (part.contiguous() for part in scale.unbind(-1))
    out: Tensor = gemv_awq_w4a16(x.to(HALF), matrix.view(torch.int8), scales, zeros, None, x.shape[1] // len(scale))
    return out.to(x.dtype)


@dataclass(frozen=True)
class Layout:
    """How a matrix lies in memory, for a device's product. `unpack`: back to rows, for products of many rows.

    multiple  what the number of input channels must be a multiple of
    block     output channels, or a multiple of them, that `pack` lays out by themselves, in as many bytes: a matrix is
              packed where it lies. 0: `pack` takes whole matrices
    """

    product: Product
    pack: Callable[[Tensor], Tensor] = lambda stored: stored
    unpack: Callable[[Tensor], Tensor] = lambda packed: packed
    multiple: int = 1
    block: int = 0


def _pack_cpu_4(stored: Tensor) -> Tensor:
    numbers = torch.stack([stored >> 4, stored & 15], -1).flatten(1)
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers.int(), 1)
    return packed


def _unpack_cpu_4(packed: Tensor) -> Tensor:
    """For each block of output channels and each input channel, the block's halves are in the halves of its bytes."""
    block = 64 if torch.backends.cpu.get_cpu_capability().startswith("AVX512") else 32
    outputs, half = packed.shape
    bytes_ = packed.view(outputs // block, 2 * half, block // 2)
    numbers = torch.cat([bytes_ & 15, bytes_ >> 4], -1).transpose(1, 2).reshape(outputs, half, 2)
    return numbers[..., 0] << 4 | numbers[..., 1]


def _pack_cuda_4(stored: Tensor) -> Tensor:
    tiles = 8 if stored.shape[1] % 64 == 0 else 4  # of 16 input channels each
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(stored, tiles)
    return packed


def _unpack_cuda_4(packed: Tensor) -> Tensor:
    """By asking the product itself: scales of one and zeros of eight show the numbers."""
    inputs = packed.shape[1] * 32 * packed.shape[3]
    one = torch.ones(inputs // 32, packed.shape[0] * 8, 2, dtype=HALF, device=packed.device)
    one[..., 1] = 8
    eye = torch.eye(inputs, dtype=HALF, device=packed.device)
    numbers = (
        torch.cat([_cuda_4(rows, packed, one) for rows in eye.split(1024)]).t().to(torch.uint8).unflatten(1, (-1, 2))
    )
    return numbers[..., 0] << 4 | numbers[..., 1]


def _swap_halves(stored: Tensor) -> Tensor:
    """Of each byte: comfy-kitchen has the first of two weights in the lower half."""
    return stored << 4 | stored >> 4


PLAIN = "rows"
LAYOUTS = {
    PLAIN: Layout(_converted),
    "int8, kernel": Layout(_kernel_8),
    "int8": Layout(_weight_only_8, multiple=64),  # it reads past the end of a row that is no multiple (torch 2.13)
    "int4 on CPU": Layout(_cpu_4, _pack_cpu_4, _unpack_cpu_4, block=64),
    "int4 on CUDA": Layout(_cuda_4, _pack_cuda_4, _unpack_cuda_4),
    "int4, kitchen": Layout(_kitchen_4, _swap_halves, _swap_halves, block=1),
}


def layout(bits: int, device: torch.device, inputs: int) -> str:
    """The first of the layouts for this device and so many input channels whose product works there."""
    names = {
        (8, "cpu"): ("int8",),
        (8, "cuda"): ("int8, kernel", "int8"),
        (4, "cpu"): ("int4 on CPU",),
        (4, "cuda"): ("int4 on CUDA", "int4, kitchen"),
    }.get((bits, device.type), ())
    fitting = (name for name in names if inputs % LAYOUTS[name].multiple == 0)
    return next((name for name in fitting if works(name, str(device))), PLAIN)


@lru_cache
@torch.no_grad()
def works(name: str, device: str) -> bool:
    """Whether a layout's product can be called on `device`, and computes what it should."""
    if name == "int8, kernel" and (
        find_spec("triton") is None
        or torch.device(device).type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (8, 0)
    ):
        return False
    kind, of = INT4 if name.startswith("int4") else INT8, LAYOUTS[name]
    numbers = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 256, generator=numbers).to(device) for rows in (64, 3))
    stored, scale = quantise(weight, kind)
    expected = _converted(x.to(HALF).float(), stored, scale)
    try:
        packed = of.pack(stored)
        found = of.product(x.to(HALF), packed, scale).float()
        same = bool(torch.equal(of.unpack(packed), stored))
    except Exception:  # of any kind: a missing operation, dtype or architecture; the next product is tried
        return False
    return same and bool((found - expected).abs().max() < 0.02 * expected.abs().max())


# -- the layers --------------------------------------------------------------------------------------------------------


class QuantisedLinear(nn.Module):
    """A Linear whose matrix is stored in 8 or 4 bits; bias and scales as computed.

    weight  int8 O I or uint8 O I/2, or whatever a device's product wants it to be (see `arrange`)
    scale   bfloat16 O or G O 2
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, kind: Quantisation):
        super().__init__()
        self.in_features, self.out_features, self.kind, self.layout = inputs, outputs, kind, PLAIN
        eight = kind.bits == 8
        stored = torch.empty(outputs, inputs if eight else inputs // 2, dtype=torch.int8 if eight else torch.uint8)
        scale = torch.empty((outputs,) if eight else (inputs // kind.group, outputs, 2), dtype=HALF)
        self.weight, self.scale = (nn.Parameter(x, requires_grad=False) for x in (stored, scale))
        self.bias = nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None

    def fill(self, rows: slice, numbers: Tensor) -> None:
        """Quantise and keep these rows of the matrix, floating-point rows I."""
        for first in range(rows.start, rows.stop, step := max(ROUNDED // self.in_features, 1)):
            some = slice(first, min(first + step, rows.stop))
            stored, scale = quantise(numbers[some.start - rows.start : some.stop - rows.start], self.kind)
            self.weight.data[some] = stored
            (self.scale.data if self.kind.bits == 8 else self.scale.data.transpose(0, 1))[some] = (
                scale if self.kind.bits == 8 else scale.transpose(0, 1)
            )

    def arrange(self, device: torch.device) -> None:
        """Lay the filled matrix out for the product of `device`. Afterwards it computes only there."""
        self.layout = layout(self.kind.bits, device, self.in_features)
        if self.kind.bits == 8:
            return
        of, stored = LAYOUTS[self.layout], self.weight.data
        if of.block:  # a second copy of each matrix would stay in the heap, between those that are kept
            for part in stored.split(max(ROUNDED // self.in_features // of.block, 1) * of.block):
                part.copy_(of.pack(part))
        else:
            self.weight.data = of.pack(stored.to(device)).to(stored.device)

    def forward(self, x: Tensor) -> Tensor:
        """x ... I -> ... O."""
        return self.multiply(x, self.weight, self.scale, self.bias)

    def multiply(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """`forward` with weights that a host may have moved."""
        flat, of = x.reshape(-1, x.shape[-1]).contiguous(), LAYOUTS[self.layout]  # some products want it so
        out = _converted(flat, of.unpack(weight), scale) if len(flat) > FEW else of.product(flat, weight, scale)
        out = out if bias is None else out + bias.to(out.dtype)
        return out.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.kind.bits}, layout={self.layout!r}"


class PackedInt8(nn.Module):
    """A QuantisedLinear in 8 bits for oneDNN's product of integers, several times faster than PyTorch's own on a CPU.

    That product takes activations in 8 bits, too few for some models. So each row is given in 16, as two rows of 8:
    x = s (256 high + low), which is as exact as a product with x itself in bfloat16 would be, and still bound by
    reading the matrix. Rows do not see each other. The packed layer can only compute: neither moved nor saved.
    """

    STEPS = 32639  # 127 * 256 + 127: the largest number of two such digits

    def __init__(self, linear: QuantisedLinear):
        super().__init__()
        self.matrix = torch.ops.onednn.qlinear_prepack(linear.weight.data, None)
        self.scale = linear.scale.data.float() / self.STEPS
        self.zero = torch.zeros(len(self.scale), dtype=torch.int64)
        self.bias, self.size = linear.bias, linear.out_features
        self.middle = torch.full((1,), 128 * 257 + 0.5)
        self.places = torch.tensor([1, 1 / 256])[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """x ... I -> ... O."""
        rows = x.reshape(-1, x.shape[-1])
        largest = rows.abs().amax(-1, True)  # if it is 0, the digits are whatever NaN becomes, and count 0 times
        numbers = torch.addcdiv(self.middle, rows, largest, value=self.STEPS)
        digits = (numbers * self.places).to(torch.int32).to(torch.uint8).flatten(0, 1)  # which keeps the last 8 bits
        product = torch.ops.linear_ar.product_8 if torch.compiler.is_compiling() else _product_8
        low, high = product(digits, self.matrix, self.scale, self.zero, self.size).chunk(2)
        out = torch.add(low, high, alpha=256).mul_(largest)
        if self.bias is not None:
            out += self.bias
        return out.to(x.dtype).view(*x.shape[:-1], self.size)


def _product_8(digits: Tensor, matrix: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """Digits uint8 M I, each plus 128, times a packed matrix -> float32 M O, O = `size`."""
    out: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        digits, 1.0, 128, matrix, scale, zero, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return out


# The compiler only takes a packed matrix that it has frozen into its program; it calls a custom operation as it is.
_opaque = torch.library.custom_op(
    "linear_ar::product_8",
    _product_8,
    mutates_args=(),
    schema="(Tensor digits, Tensor matrix, Tensor scale, Tensor zero, int size) -> Tensor",
)
_opaque.register_fake(lambda digits, matrix, scale, zero, size: scale.new_empty(len(digits), size))


@lru_cache
@torch.no_grad()
def packs() -> bool:
    """Whether `PackedInt8` can be used on this CPU. Older ones saturate the sums of oneDNN's product."""
    linear = QuantisedLinear(256, 64, False, INT8)
    linear.fill(slice(0, 64), torch.ones(64, 256))  # the largest sums that there can be
    x = torch.tensor([1.0, -1.0, 0.5])[:, None].repeat(1, 256)
    try:
        found = PackedInt8(linear)(x)
    except Exception:  # of any kind: there is no such operation, or not for this CPU
        return False
    return bool((found - _converted(x, linear.weight, linear.scale)).abs().max() < 0.1)


def quantised(model: nn.Module, stored: Callable[[str, Tensor], Quantisation | None], ops: Ops = nn) -> dict[str, Any]:
    """New layers to take the place of those Linears of `model` that are quantised, by the matrix's name.

    stored  asked with a matrix's name and the matrix: how to store it; None: as it is
    ops     whose QuantisedLinear is made, if it has one
    """
    make = getattr(ops, "QuantisedLinear", QuantisedLinear)
    layers = {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and (kind := stored(f"{name}.weight", linear.weight)):
            outputs, inputs = linear.weight.shape
            layers[f"{name}.weight"] = make(inputs, outputs, linear.bias is not None, chosen(kind, outputs, inputs))
    return layers


def quantise_model(model: nn.Module, stored: Callable[[str, Tensor], Quantisation | None]) -> nn.Module:
    """`model` with the Linears quantised that are to be `stored` so, in place. Files are quantised as they are read."""
    for name, layer in quantised(model, stored).items():
        linear: Any = model.get_submodule(where := name.removesuffix(".weight"))
        layer.to(linear.weight.device).fill(slice(0, layer.out_features), linear.weight.data)
        layer.bias = linear.bias
        layer.arrange(linear.weight.device)
        model.set_submodule(where, layer)
    return model

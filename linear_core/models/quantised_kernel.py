"""A product of few rows with a matrix in 8 bits, in a single pass: a Triton kernel for NVIDIA GPUs.

Importing this module needs Triton. `quantised.works` says where the kernel is used: PyTorch has no product on a GPU for
one row and 8 bits that reads the matrix once and well. M rows of x, I input and O output channels.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from torch import Tensor

OUTPUTS, INPUTS = 16, 256  # of the matrix, that a program holds at a time


def multiply(x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
    """x M I (at most 16 rows), matrix int8 O I, scale O -> M O in x's dtype. Sums are float32.

    Each program has some output channels to itself, so equal shapes give equal results. It can be captured in a CUDA
    graph: compiled at the first call with such shapes, and all memory is PyTorch's.
    """
    (rows, inputs), outputs = x.shape, len(matrix)
    x, out = x.contiguous(), x.new_empty(rows, outputs)
    assert rows <= 16 and matrix.stride() == (inputs, 1)
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():  # Triton launches on the current device
        _multiply[(triton.cdiv(outputs, OUTPUTS),)](
            out, x, matrix, scale, rows, inputs, outputs, OUTPUTS=OUTPUTS, INPUTS=INPUTS, ROWS=16
        )
    return out


@triton.jit(do_not_specialize=["rows"])
def _multiply(
    out, x, matrix, scale, rows, inputs, outputs, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """OUTPUTS of the output channels. Rows are padded to what tensor cores take; the matrix is read once."""
    row, column = tl.arange(0, ROWS), tl.arange(0, INPUTS)
    output = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    in_rows, in_outputs = row < rows, output < outputs
    line = output.to(tl.int64)[:, None] * inputs  # a matrix may have over 2^31 elements
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, inputs, INPUTS):
        at = first + column
        numbers = tl.load(matrix + line + at[None, :], mask=in_outputs[:, None] & (at < inputs)[None, :], other=0)
        given = tl.load(
            x + row[:, None] * inputs + at[None, :], mask=in_rows[:, None] & (at < inputs)[None, :], other=0.0
        )
        acc += tl.dot(given, tl.trans(numbers.to(given.dtype)), input_precision="ieee")  # 8 bits are exact in each
    acc *= tl.load(scale + output, mask=in_outputs, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * outputs + output[None, :], acc, mask=in_rows[:, None] & in_outputs[None, :])

"""Quantisation of rows to float8 in one Triton kernel: a row is read, scaled and written, with no tensor in between.

With torch's operators it takes six passes over the input, which cost about as much as the product in float8 saves at the widths of
a 3B model. No GPU has confirmed this module yet; Triton's interpreter runs it on a CPU (`make test-triton`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 2048  # of a row that a program reads at a time
LARGEST = tl.constexpr(448.0)
LEAST_SCALE = tl.constexpr(1e-30)
SMALLEST_NORMAL = tl.constexpr(2.0**-6)
SHIFT = tl.constexpr(1.5 * 2.0**14)  # float32 has multiples of 2^-9 beside it


@triton.jit
def _rounded(z):
    """z, at most 448 in size, rounded to the nearest number of e4m3, to the even one of two, so that the conversion is exact."""
    bits = z.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)  # 3 of 23 bits of mantissa
    small = (z + SHIFT) - SHIFT  # to a multiple of 2^-9
    return tl.where(tl.abs(z) < SMALLEST_NORMAL, small, normal)


@triton.jit
def _scaled(x, factors, there, has_factors: tl.constexpr):
    """Read a block of x · factor, in float32; 0 where nothing is there."""
    z = tl.load(x, mask=there, other=0.0).to(tl.float32)
    if has_factors:
        z = z * tl.load(factors, mask=there, other=0.0)
    return z


@triton.jit
def _quantise(
    x, factors, quantised, scales, columns, stride, has_factors: tl.constexpr, block: tl.constexpr
):  # fmt: skip
    """One row: scale = max |x · factor| / 448, then x · factor / scale, rounded to the nearest; see `fp8_teacher.quantise_rows`."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, block)
    most = tl.zeros((block,), tl.float32)
    start = 0
    while start < columns:
        there = start + offsets < columns
        z = _scaled(x + row * stride + start + offsets, factors + start + offsets, there, has_factors)
        most = tl.maximum(most, tl.abs(z), propagate_nan=tl.PropagateNan.ALL)
        start += block
    scale = tl.math.div_rn(tl.max(most, 0), tl.full((), LARGEST, tl.float32))
    scale = tl.where(scale < LEAST_SCALE, LEAST_SCALE, scale)
    tl.store(scales + row, scale)
    start = 0
    while start < columns:
        there = start + offsets < columns
        z = _scaled(x + row * stride + start + offsets, factors + start + offsets, there, has_factors)
        z = tl.math.div_rn(z, tl.zeros((block,), tl.float32) + scale)
        tl.store(quantised + row * columns + start + offsets, _rounded(z).to(tl.float8e4nv), mask=there)
        start += block


def quantise_rows_in_triton(x: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `fp8_teacher.quantise_rows`; x: [T, n] with adjacent columns, else it is copied."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    quantised = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, device=x.device)
    if len(x):
        _quantise[(len(x),)](
            x, x if columns is None else columns.contiguous(), quantised, scales, x.shape[1], x.stride(0),
            has_factors=columns is not None, block=COLUMNS,
        )  # fmt: skip
    return quantised, scales

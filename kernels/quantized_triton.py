# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Tokens in 8 bits on a GPU, as in quantized.py: a launch, a program per token.

A program holds its token and finds the scale before it writes, so that the values are read once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.quantized import FP8, FP8_MAX, LEAST_LARGEST

_VALUES_OF_A_WARP = 1024
_MOST_WARPS = 8
_LEAST_NORMAL = tl.constexpr(2.0**-6)
# A power of two times this, added to a number between it and its double, leaves of that number
# three bits after the point.
_TO_THREE_BITS = tl.constexpr(1.5 * 2.0**20)


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [T, K] -> the nearest float8 e4m3 values [T, K] and their scales [T] fp32, with the bits of
    the reference but for the sign of a zero."""
    assert x.stride(1) == 1
    tokens, width = x.shape
    values = torch.empty((tokens, width), dtype=FP8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_kernel[(tokens,)](
        x,
        values,
        scale,
        width,
        x.stride(0),
        most=FP8_MAX,
        least_largest=LEAST_LARGEST,
        block=block,
        num_warps=min(_MOST_WARPS, max(1, block // _VALUES_OF_A_WARP)),
    )
    return values, scale


@triton.jit
def _quantize_kernel(
    x,
    values,
    scale,
    width,
    stride,
    most: tl.constexpr,
    least_largest: tl.constexpr,
    block: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, block)
    within = lane < width
    wide = tl.load(x + token * stride + lane, mask=within, other=0.0).to(tl.float32)
    magnitude = tl.abs(wide)
    # The maximum may leave NaN out.
    finite = tl.sum((magnitude < float("inf")).to(tl.int32), axis=0) == block
    largest = tl.max(magnitude, axis=0)
    divisor = tl.where(largest > least_largest, tl.math.div_rn(largest, most), 1.0)
    quotient = tl.math.div_rn(wide, tl.where(finite, divisor, 1.0))
    quotient = tl.minimum(tl.maximum(quotient, -most), most)
    # Rounded here, ties to even: Triton's interpreter converts to 8 bits without the carry into the
    # exponent. What is left for the conversion is exact.
    power = (quotient.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    shift = tl.maximum(power, _LEAST_NORMAL) * _TO_THREE_BITS
    rounded = tl.where(finite, (quotient + shift) - shift, 0.0)
    tl.store(values + token * width + lane, rounded.to(tl.float8e4nv), mask=within)
    tl.store(scale + token, tl.where(finite, divisor, float("nan")))

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Products to fp32's precision inside Triton kernels, for the scans.

An fp32 number is the sum of three bf16 numbers, whose products with a bf16 number fp32 holds
exactly: so tensor cores multiply fp32 by bf16 without loss. Source: Henry et al. 2019, "Leveraging
the bfloat16 datatype for higher-precision computations".
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand(loaded):
    """A loaded tile as an operand of `product`: bf16 as it is, else fp32 (fp16 too, as the state
    cannot be fp16)."""
    return loaded if loaded.dtype == tl.bfloat16 else loaded.to(tl.float32)


@triton.jit
def _parts(wide):
    """Three bf16 tiles that add up to the fp32 tile `wide`, the smallest first."""
    high = wide.to(tl.bfloat16)
    rest = wide - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return (rest - middle.to(tl.float32)).to(tl.bfloat16), middle, high


@triton.jit
def product(a, b):
    """a @ b to fp32's precision. If only one operand is bf16, the fp32 operand is split into three
    bf16 parts that add up to it, so that tensor cores multiply it exactly."""
    if a.dtype == b.dtype:
        out = tl.dot(a, b, input_precision="ieee")
    elif a.dtype == tl.float32:
        low, middle, high = _parts(a)
        out = tl.dot(high, b, tl.dot(middle, b, tl.dot(low, b)))
    else:
        low, middle, high = _parts(b)
        out = tl.dot(a, high, tl.dot(a, middle, tl.dot(a, low)))
    return out

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Dense products on a GPU by our own kernel, beside a library's.

    y[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]

A product is weight @ x^T, as in experts_triton.py: channels are the first operand, so that 16 rows
already use Hopper's widest instruction. Sums run along k in order in fp32 (fp64 for fp64), and are
rounded once. A narrow weight has fewer tiles than a GPU has multiprocessors: its inner dimension is
cut into `split` parts, whose sums a second launch adds in their order, without atomics.

`shape_of` chooses the tile. Under `deterministic` it does not look at the number of rows, and a
row's bits depend on that row and the weight alone; otherwise few rows take a narrower tile.
Source: Osama et al. 2023 (Stream-K), section 3, for products split along the inner dimension.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.determinism import is_deterministic
from twotower.kernels.elementwise import relu_squared
from twotower.kernels.overlap_triton import overlap, wait

# Numbers that a program of the second launch adds up.
_ADDED = 1024
# A weight of at most so many tiles is split; a part has at least _LEAST_STEPS steps of `inner`.
_NARROW, _SPLIT, _LEAST_STEPS = 32, 4, 8


@dataclass(frozen=True)
class Shape:
    """Rows, output channels and inner length of a tile, parts of the inner dimension, warps and
    pipeline stages of a program."""

    rows: int
    channels: int
    inner: int
    split: int
    num_warps: int
    num_stages: int


# While weights are what takes the time, a tile of 64 rows costs as much as one of 16.
_STEADY = Shape(64, 128, 64, 1, num_warps=4, num_stages=4)
_FEW = Shape(16, 64, 128, 1, num_warps=4, num_stages=4)
_MANY = Shape(128, 128, 64, 1, num_warps=8, num_stages=4)
# Exact fp32 and fp64 products hold their operands in registers.
_FP32 = Shape(16, 32, 32, 1, num_warps=4, num_stages=2)
_FP64 = Shape(16, 32, 16, 1, num_warps=4, num_stages=2)
_FEW_ROWS, _STEADY_ROWS = 16, 256


def shape_of(
    tokens: int, outputs: int, inner: int, dtype: torch.dtype, deterministic: bool
) -> Shape:
    """The launch of `tokens` rows with a weight [outputs, inner]; if `deterministic`, the same for
    every number of rows."""
    shape = _tile_of(tokens, dtype, deterministic)
    tiles = triton.cdiv(outputs, shape.channels)
    if not deterministic:
        # Tiles of rows fill a GPU as well as parts of the inner dimension do.
        tiles *= triton.cdiv(tokens, shape.rows)
    narrow = tiles * shape.channels <= _NARROW * _STEADY.channels
    steps = triton.cdiv(inner, shape.inner)
    split = min(_SPLIT, max(1, steps // _LEAST_STEPS)) if narrow else 1
    return Shape(shape.rows, shape.channels, shape.inner, split, shape.num_warps, shape.num_stages)


def _tile_of(tokens: int, dtype: torch.dtype, deterministic: bool) -> Shape:
    if dtype == torch.float64:
        return _FP64
    if dtype == torch.float32:
        return _FP32
    if deterministic or _FEW_ROWS < tokens <= _STEADY_ROWS:
        return _STEADY
    return _FEW if tokens <= _FEW_ROWS else _MANY


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [T, K], weight [N, K] and bias [N] of one dtype -> [T, N] of that dtype, written to `out`
    if it is given. Raises ValueError for dtypes that differ."""
    tokens, inner = x.shape
    outputs = weight.shape[0]
    _check(x, weight, bias)
    if out is None:
        out = torch.empty((tokens, outputs), dtype=x.dtype, device=x.device)
    assert out.shape == (tokens, outputs)
    assert out.dtype == x.dtype
    assert out.stride(1) == 1
    if tokens == 0:
        return out
    shape = shape_of(tokens, outputs, inner, x.dtype, is_deterministic())
    if shape.split == 1:
        _multiply(x, weight, bias, out, shape)
        return out
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    parts = torch.empty((shape.split, tokens, outputs), dtype=wide, device=x.device)
    _multiply(x, weight, None, parts, shape)
    _add_kernel[(tokens, triton.cdiv(outputs, _ADDED))](
        parts,
        parts if bias is None else bias,
        out,
        tokens,
        outputs,
        out.stride(0),
        split=shape.split,
        has_bias=bias is not None,
        block=min(_ADDED, triton.next_power_of_2(outputs)),
        num_warps=4,
        **overlap(x.device),
    )
    return out


def mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """x [T, H], up [F, H], down [H, F], biases [F] and [H] -> down(relu(up x)^2), [T, H]."""
    return linear(relu_squared(linear(x, up, up_bias)), down, down_bias)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Asserts layouts that the kernel assumes; raises ValueError for dtypes that differ."""
    tensors = [x, weight] if bias is None else [x, weight, bias]
    kinds = {str(tensor.dtype) for tensor in tensors}
    if len(kinds) > 1:
        raise ValueError(f"x, weight, bias: got {', '.join(sorted(kinds))}, expected one dtype")
    assert x.shape[1] == weight.shape[1], "inner dimensions"
    assert bias is None or bias.shape == weight.shape[:1]
    assert all(tensor.stride(-1) == 1 for tensor in tensors), "inner elements are neighbours"


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, shape: Shape) -> None:
    """Writes the product to `target` [T, N], or its parts' sums to `target` [split, T, N]."""
    tokens, inner = x.shape
    outputs = weight.shape[0]
    steps = triton.cdiv(triton.cdiv(inner, shape.inner), shape.split)
    tiles = triton.cdiv(tokens, shape.rows) * triton.cdiv(outputs, shape.channels)
    _linear_kernel[(tiles, shape.split)](
        x,
        weight,
        weight if bias is None else bias,
        target,
        tokens,
        outputs,
        x.stride(0),
        weight.stride(0),
        target.stride(-2),
        length=inner,
        span=steps * shape.inner,
        split=shape.split,
        has_bias=bias is not None,
        wide=x.dtype == torch.float64,
        tile_rows=shape.rows,
        tile_channels=shape.channels,
        tile_inner=shape.inner,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **overlap(x.device),
    )


# A row's bits must not come from code that was made for a number of rows.
@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x,
    weight,
    bias,
    target,
    tokens,
    outputs,
    x_stride,
    weight_stride,
    target_stride,
    length: tl.constexpr,
    span: tl.constexpr,
    split: tl.constexpr,
    has_bias: tl.constexpr,
    wide: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_channels: tl.constexpr,
    tile_inner: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (tile of rows and channels, part of the inner dimension). Neighbours have the
    same channels, so that the weight comes from memory once."""
    wait(waits)
    row_tiles = tl.cdiv(tokens, tile_rows)
    row = (tl.program_id(0) % row_tiles) * tile_rows + tl.arange(0, tile_rows)
    channel = (tl.program_id(0) // row_tiles) * tile_channels + tl.arange(0, tile_channels)
    part = tl.program_id(1)
    first = part * span
    lanes = tl.arange(0, tile_inner)
    # Rows and channels past the end repeat the last one and are not stored.
    line = tl.minimum(channel, outputs - 1).to(tl.int64) * weight_stride + first
    token = tl.minimum(row, tokens - 1).to(tl.int64) * x_stride + first
    left = weight + line[:, None] + lanes[None, :]
    right = x + token[None, :] + lanes[:, None]
    kind: tl.constexpr = tl.float64 if wide else tl.float32
    total = tl.zeros([tile_channels, tile_rows], kind)
    for start in range(0, span, tile_inner):
        if length % tile_inner == 0 and span * split == length:
            w = tl.load(left)
            values = tl.load(right)
        else:
            within = lanes < length - first - start
            w = tl.load(left, mask=within[None, :], other=0.0)
            values = tl.load(right, mask=within[:, None], other=0.0)
        if wide:
            total = tl.dot(w, values, total, out_dtype=tl.float64)
        else:
            total = tl.dot(w, values, total, input_precision="ieee")
        left += tile_inner
        right += tile_inner
    if has_bias:
        added = tl.load(bias + tl.minimum(channel, outputs - 1))
        total += added.to(kind)[:, None]
    at = part.to(tl.int64) * tokens * outputs + row.to(tl.int64)[None, :] * target_stride
    inside = (channel < outputs)[:, None] & (row < tokens)[None, :]
    result = total.to(target.dtype.element_ty)
    tl.store(target + at + channel[:, None], result, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def _add_kernel(
    parts,
    bias,
    out,
    tokens,
    outputs,
    out_stride,
    split: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (row, block of channels): adds the parts in their order."""
    wait(waits)
    row = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * block + tl.arange(0, block)
    inside = channel < outputs
    size = tl.cast(tokens, tl.int64) * outputs
    total = tl.load(parts + row * outputs + channel, mask=inside, other=0.0)
    for part in tl.static_range(1, split):
        total += tl.load(parts + part * size + row * outputs + channel, mask=inside, other=0.0)
    if has_bias:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(total.dtype)
    tl.store(out + row * out_stride + channel, total.to(out.dtype.element_ty), mask=inside)

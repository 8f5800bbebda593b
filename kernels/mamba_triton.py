# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""Short convolution and step sizes of a Mamba-2 layer, for its Triton kernels.

    xBC = silu(conv(xBC));  step = softplus(dt + dt_bias)

`conv_tile` and `softplus` are called inside a kernel; `prepare` is a separate launch that writes
both to memory, for kernels that walk over more tokens than a tile holds.
Source: Gu and Dao 2023 (Mamba), section 3.4; Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower.kernels.overlap_triton import overlap, wait
from twotower.kernels.rows import Rows

_TOKENS, _CHANNELS = 16, 128


@triton.jit
def softplus(x):
    """log(1 + exp(x)) of fp32, exact to a few units in the last place for every x."""
    # With u = exp(-|x|) <= 1: log(1 + u) = 2 atanh(u / (2 + u)), whose series converges fast.
    # A GPU's logarithm has an absolute error near 1, which would drop the digits of small steps.
    u = tl.exp(-tl.abs(x))
    s = u / (2.0 + u)
    q = s * s
    tail = 1.0 / 9.0 + q * (1.0 / 11.0 + q * (1.0 / 13.0 + q * (1.0 / 15.0)))
    tail = 1.0 / 7.0 + q * tail
    series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * tail))
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def conv_tile(
    inputs,
    input_stride,
    history,
    history_stride,
    weight,
    weight_stride_c,
    weight_stride_k,
    bias,
    tokens,
    length,
    channels,
    live,
    taps: tl.constexpr,
):
    """silu(conv) at tokens [l] of a row and channels [c] where `live`, [l, c] fp32 rounded to the
    inputs' dtype. `inputs` points to the row's first token, `history` to its slot's conv state."""
    total = tl.zeros([tokens.shape[0], channels.shape[0]], tl.float32)
    for tap in tl.static_range(taps):
        at = tokens + (tap - taps + 1)
        address = tl.where(
            (at >= 0)[:, None],
            inputs + at[:, None].to(tl.int64) * input_stride + channels[None, :],
            history + (tokens + tap)[:, None] * history_stride + channels[None, :],
        )
        raw = tl.load(address, mask=(at < length)[:, None] & live[None, :], other=0.0)
        column = weight + channels * weight_stride_c + tap * weight_stride_k
        factor = tl.load(column, mask=live, other=0.0).to(tl.float32)
        total += raw.to(tl.float32) * factor[None, :]
    if bias is not None:
        total += tl.load(bias + channels, mask=live, other=0.0).to(tl.float32)[None, :]
    total = total / (1.0 + tl.exp(-total))
    return total.to(inputs.dtype.element_ty).to(tl.float32)


@triton.jit
def _prepare_kernel(
    xbc,
    xbc_stride_m,
    xbc_stride_t,
    dt,
    dt_stride_m,
    dt_stride_t,
    conv_state,
    conv_state_stride_s,
    conv_state_stride_m,
    conv_state_stride_k,
    conv_weight,
    conv_weight_stride_m,
    conv_weight_stride_c,
    conv_weight_stride_k,
    conv_bias,
    conv_bias_stride_m,
    dt_bias,
    dt_bias_stride_m,
    conv_out,
    steps_out,
    cu_seqlens,
    slots,
    counts,
    total_tokens,
    row_count,
    heads,
    wanted_channels,
    taps: tl.constexpr,
    block_t: tl.constexpr,
    block_c: tl.constexpr,
    block_h: tl.constexpr,
    waits: tl.constexpr,
):
    """A program per (channel tile, token tile, layer and row); those of the first channel tile
    also write the steps."""
    wait(waits)
    row = tl.program_id(2) % row_count
    layer = (tl.program_id(2) // row_count).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    start = tl.load(cu_seqlens + row).to(tl.int64)
    length = (tl.load(cu_seqlens + row + 1) - start).to(tl.int32)
    if counts is not None:
        length = tl.minimum(length, tl.load(counts + row))
    first = tl.program_id(1) * block_t
    if slot < 0 or first >= length:
        return
    tokens = first + tl.arange(0, block_t)
    channels = tl.program_id(0) * block_c + tl.arange(0, block_c)
    live = channels < wanted_channels
    conv = conv_tile(
        xbc + layer * xbc_stride_m + start * xbc_stride_t,
        xbc_stride_t,
        conv_state + slot * conv_state_stride_s + layer * conv_state_stride_m,
        conv_state_stride_k,
        conv_weight + layer * conv_weight_stride_m,
        conv_weight_stride_c,
        conv_weight_stride_k,
        conv_bias if conv_bias is None else conv_bias + layer * conv_bias_stride_m,
        tokens,
        length,
        channels,
        live,
        taps,
    )
    written = (layer * total_tokens + start + tokens)[:, None]
    tl.store(
        conv_out + written * wanted_channels + channels[None, :],
        conv.to(conv_out.dtype.element_ty),
        mask=(tokens < length)[:, None] & live[None, :],
    )
    if tl.program_id(0) == 0:
        head = tl.arange(0, block_h)
        inside = (tokens < length)[:, None] & (head < heads)[None, :]
        raw = tl.load(
            dt + layer * dt_stride_m + (start + tokens)[:, None] * dt_stride_t + head[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        bias = tl.load(dt_bias + layer * dt_bias_stride_m + head, mask=head < heads, other=0.0)
        tl.store(
            steps_out + written * heads + head[None, :],
            softplus(raw + bias.to(tl.float32)[None, :]),
            mask=inside,
        )


def prepare(
    xbc: Tensor,
    dt: Tensor,
    conv_state: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    rows: Rows,
    channels: int,
    counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """xbc [M, T, Cd], dt [M, T, H], conv_state [S, M, K-1, Cd], conv_weight [M, Cd, K], conv_bias
    [M, Cd], dt_bias [M, H] -> silu(conv) of the first `channels` channels [M, T, channels] in xbc's
    dtype, and steps softplus(dt + dt_bias) [M, T, H] fp32. With `counts` [B] int32 only the first
    counts[row] tokens of a row. Tokens of padding or of no row are not written."""
    layers, tokens, heads = dt.shape
    assert xbc.stride(2) == dt.stride(2) == conv_state.stride(3) == dt_bias.stride(1) == 1
    assert conv_bias is None or conv_bias.stride(1) == 1
    conv = torch.empty((layers, tokens, channels), dtype=xbc.dtype, device=xbc.device)
    steps = torch.empty((layers, tokens, heads), dtype=torch.float32, device=xbc.device)
    grid = (
        triton.cdiv(channels, _CHANNELS),
        triton.cdiv(rows.max_seqlen, _TOKENS),
        rows.count * layers,
    )
    _prepare_kernel[grid](
        xbc,
        xbc.stride(0),
        xbc.stride(1),
        dt,
        dt.stride(0),
        dt.stride(1),
        conv_state,
        conv_state.stride(0),
        conv_state.stride(1),
        conv_state.stride(2),
        conv_weight,
        conv_weight.stride(0),
        conv_weight.stride(1),
        conv_weight.stride(2),
        conv_bias,
        0 if conv_bias is None else conv_bias.stride(0),
        dt_bias,
        dt_bias.stride(0),
        conv,
        steps,
        rows.cu_seqlens,
        rows.slots,
        counts,
        tokens,
        rows.count,
        heads,
        channels,
        taps=conv_weight.shape[2],
        block_t=_TOKENS,
        block_c=_CHANNELS,
        block_h=triton.next_power_of_2(heads),
        num_warps=4,
        **overlap(xbc.device),
    )
    return conv, steps

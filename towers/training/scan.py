"""The differentiable parts of a Mamba-2 layer: short convolution and scan over chunks.

Within a chunk of L tokens everything is an L x L or L x N matrix per head; between chunks a small
matrix of decays replaces a loop. dt, decay and D are folded into these small matrices, never into
the L x P inputs, which makes this fast on a CPU.
Source: Dao and Gu 2024 (Mamba-2), section 6.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx


class _CausalConv(Function):
    """Depthwise convolution as K shifted products; slices under autograd would cost K copies."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(padded, weight)
        taps = weight.shape[1]
        length = padded.shape[1] - taps + 1
        out = padded[:, :length] * weight[:, 0]
        for tap in range(1, taps):
            out += padded[:, tap : tap + length] * weight[:, tap]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        grad = cast(Tensor, grads[0])
        padded, weight = ctx.saved_tensors
        length = grad.shape[1]
        grad_padded = torch.zeros_like(padded)
        grad_weight = []
        for tap in range(weight.shape[1]):
            window = slice(tap, tap + length)
            grad_padded[:, window] += grad * weight[:, tap]
            grad_weight.append((grad * padded[:, window]).sum((0, 1)))
        return grad_padded, torch.stack(grad_weight, dim=1)


def causal_conv(padded: Tensor, weight: Tensor) -> Tensor:
    """Depthwise causal convolution of `padded` [R, K-1+T, C] with `weight` [C, K], [R, T, C].

    Source: Gu and Dao 2023 (Mamba), section 3.4.
    """
    return cast(Tensor, _CausalConv.apply(padded, weight))  # type: ignore[no-untyped-call]


def chunk_scan(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    dt: Tensor,
    decay_rate: Tensor,
    skip: Tensor,
    borders: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Runs h <- exp(dt A) h + dt x B, y = h C + D x over chunks; returns y and the border states.

    `x` [R, n, L, heads, P]; `b`, `c` [R, n, L, G, N]; `dt` fp32 [R, n, L, heads]; `decay_rate` (A)
    and `skip` (D) fp32 [heads]. With `borders` [R, n, heads, N, P] chunk i starts from state i;
    without, the chunks follow each other from a zero state and n + 1 border states are returned,
    the last of them after the sequence. y has the shape of `x`.
    """
    heads, groups = x.shape[3], b.shape[3]
    x, b, c = x.transpose(2, 3), b.transpose(2, 3), c.transpose(2, 3)
    dt = dt.transpose(2, 3)
    total = (dt * decay_rate[:, None]).cumsum(-1)
    inner = _inner_matrix(c @ b.mT, dt, total, skip).to(x.dtype)
    share = heads // groups
    if borders is None:
        into = (dt * (total[..., -1:] - total).exp()).to(x.dtype)
        added = (b.repeat_interleave(share, 2) * into[..., None]).mT @ x
        borders = _border_states(added, total[..., -1])
    reach = c.repeat_interleave(share, 2) * total.exp().to(x.dtype)[..., None]
    y = inner @ x + reach @ borders[:, : x.shape[1]]
    return y.transpose(2, 3), borders


def _inner_matrix(scores: Tensor, dt: Tensor, total: Tensor, skip: Tensor) -> Tensor:
    """[R, n, heads, L, L]: the weight of x_j in y_i within a chunk, with D on the diagonal."""
    length = dt.shape[-1]
    future = torch.ones(length, length, dtype=torch.bool, device=dt.device).triu(1)
    gap = (total[..., :, None] - total[..., None, :]).masked_fill(future, -torch.inf)
    weight = gap.exp() * dt[..., None, :]
    share = dt.shape[2] // scores.shape[2]
    eye = torch.eye(length, dtype=dt.dtype, device=dt.device)
    return weight * scores.to(dt.dtype).repeat_interleave(share, 2) + skip[:, None, None] * eye


def _border_states(added: Tensor, log_decay: Tensor) -> Tensor:
    """States [R, n+1, heads, N, P] from what each chunk adds and its whole decay [R, n, heads]."""
    rows, chunks, heads = log_decay.shape
    until = log_decay.new_zeros(rows, heads, chunks + 1)
    until = torch.cat([until[..., :1], log_decay.transpose(1, 2).cumsum(-1)], dim=-1)
    later = torch.ones(chunks + 1, chunks, dtype=torch.bool, device=added.device).triu(0)
    gap = (until[..., :, None] - until[..., None, 1:]).masked_fill(later, -torch.inf)
    flat = added.transpose(1, 2).reshape(rows, heads, chunks, -1)
    states = gap.exp().to(added.dtype) @ flat
    return states.view(rows, heads, chunks + 1, *added.shape[3:]).transpose(1, 2)


class _TakeRows(Function):
    """Gathers rows, each equally often, so that the gradient is a gather too, not a scatter."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.count = rows.shape[0]
        return rows.index_select(0, index)

    @staticmethod
    def backward(ctx: FunctionCtx, *grads: Any) -> tuple[Tensor, None, None]:
        (inverse,) = cast(Any, ctx).saved_tensors
        count = cast(Any, ctx).count
        grad = cast(Tensor, grads[0]).index_select(0, inverse)
        return grad.view(count, -1, grad.shape[-1]).sum(1), None, None


def take_rows(rows: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """`rows[index]` [M, D]; `inverse` [M] lists, for each row in turn, its indices in the result.

    Every row has to be taken equally often.
    """
    return cast(Tensor, _TakeRows.apply(rows, index, inverse))  # type: ignore[no-untyped-call]

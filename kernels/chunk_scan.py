"""Mamba-2's selective scan over a block, from a given state.

Per head, with A = -exp(A_log) a scalar:

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        h [P, N]
    y_t = h_t C_t + D x_t

`chunk_scan` computes y in the chunked (SSD) form: inside a chunk of up to 32 tokens everything is
a product of small matrices, from chunk to chunk the state is carried. `chunk_scan_recurrent` is
the recurrence itself, the truth for tests. The state handed in is not changed; a state is moved
by `twotower.kernels.replay` alone. All in fp32: bf16 scans from a grown state overflow.
Source: Dao and Gu 2024 (Mamba-2), sections 5 and 6.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Differences of cumulative sums lose digits as the sums grow: short chunks are more accurate.
_CHUNK = 32
# Rows that are not whole vectors are padded: MKL sums some by their alignment (seen on Zen 4).
_VECTOR = 8


def chunk_scan(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> Tensor:
    """x [B, L, H, P], dt [B, L, H] after softplus, a_log and d [H], b and c [B, L, G, N],
    state [B, H, P, N], all fp32 -> y [B, L, H, P] fp32. Head h uses group h // (H / G)."""
    head_dim, state_dim = state.shape[-2:]
    if head_dim % _VECTOR or state_dim % _VECTOR:
        more, further = -head_dim % _VECTOR, -state_dim % _VECTOR
        x, state = F.pad(x, (0, more)), F.pad(state, (0, further, 0, more))
        b, c = F.pad(b, (0, further)), F.pad(c, (0, further))
        return chunk_scan(x, dt, a_log, b, c, d, state)[..., :head_dim]
    if b.shape[2] == 1:
        # A product of one matrix alone would be cut up among threads, and have other bits.
        b, c = (shared.expand(-1, -1, x.shape[2], -1) for shared in (b, c))
    a = -torch.exp(a_log)
    outputs = []
    length = x.shape[1]
    for start in range(0, length, _CHUNK):
        piece = slice(start, min(start + _CHUNK, length))
        y, state = _scan_chunk(
            x[:, piece], dt[:, piece], a, b[:, piece], c[:, piece], state, piece.stop < length
        )
        outputs.append(y)
    y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
    return y.add_(d.view(1, 1, -1, 1) * x)


def chunk_scan_recurrent(
    x: Tensor, dt: Tensor, a_log: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor
) -> Tensor:
    """`chunk_scan` by its recurrence, token by token, in the dtype of the arguments."""
    per_group = x.shape[2] // b.shape[2]
    outputs = []
    for t in range(x.shape[1]):
        keys = b[:, t].repeat_interleave(per_group, dim=1)
        queries = c[:, t].repeat_interleave(per_group, dim=1)
        decay = torch.exp(dt[:, t] * -torch.exp(a_log))[..., None, None]
        added = (dt[:, t, :, None] * x[:, t])[..., None] * keys[:, :, None, :]
        state = decay * state + added
        outputs.append((state * queries[:, :, None, :]).sum(-1) + d.view(1, -1, 1) * x[:, t])
    return torch.stack(outputs, dim=1)


def _scan_chunk(
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, state: Tensor, need_state: bool
) -> tuple[Tensor, Tensor]:
    """One chunk [B, L, ...] from `state` [B, H, P, N] -> y [B, L, H, P] without the D x term, and
    the state after it, or `state` itself unless `need_state`. What heads of a group share is
    multiplied once: their queries and keys, and the queries with all of their states."""
    rows, length, heads, head_dim = x.shape
    groups = b.shape[2]
    by_group = rows, groups, heads // groups
    log_decay = dt * a  # [B, L, H], never above 0
    if length > 1:
        log_decay = torch.cumsum(log_decay, dim=1)
    queries, keys = _by_group(c), _by_group(b)
    grown = state.reshape(rows * groups, -1, state.shape[-1])
    values = (dt[..., None] * x).unflatten(2, (groups, -1))  # [B, L, G, H / G, P]
    from_state = torch.bmm(queries, grown.transpose(1, 2)).view(rows, groups, length, -1, head_dim)
    to_here = torch.exp(log_decay).unflatten(2, (groups, -1))
    y = from_state.transpose(1, 2).mul_(to_here[..., None])
    if length == 1 and not need_state:
        scores = (queries * keys).sum(-1).view(rows, 1, groups, 1, 1)
        return y.add_(scores * values).flatten(2, 3), state
    # The exponent is masked, not its result: above the diagonal it could overflow.
    flat = log_decay.transpose(1, 2).contiguous().view(*by_group, length, 1)
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    decay = (flat - flat.transpose(-1, -2)).masked_fill_(future, float("-inf")).exp_()
    scores = torch.bmm(queries, keys.transpose(1, 2)).view(rows, groups, 1, length, length)
    by_head = values.permute(0, 2, 3, 1, 4).reshape(-1, length, head_dim)
    inside = torch.bmm(decay.mul_(scores).view(-1, length, length), by_head)
    y = y.add_(inside.view(*by_group, length, head_dim).permute(0, 3, 1, 2, 4)).flatten(2, 3)
    if not need_state:
        return y, state
    whole = flat[..., -1:, :]
    by_head = by_head.view(*by_group, length, head_dim).mul_(torch.exp(whole - flat))
    late = by_head.transpose(3, 4).reshape(rows * groups, -1, length)
    carried = state.unflatten(1, (groups, -1)) * torch.exp(whole)
    added = torch.bmm(late, keys).view_as(carried)
    return y, carried.add_(added).flatten(1, 2)


def _by_group(shared: Tensor) -> Tensor:
    """[B, L, G, N] -> [B * G, L, N]."""
    return shared.transpose(1, 2).flatten(0, 1)

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
    return y + d.view(1, 1, -1, 1) * x


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
    the state after it, or `state` itself unless `need_state`."""
    rows, length, heads, head_dim = x.shape
    per_group = heads // b.shape[2]
    log_decay = torch.cumsum(dt * a, dim=1).transpose(1, 2)  # [B, H, L], never above 0
    queries = _per_head(c, per_group)  # [B * H, L, N]
    keys = _per_head(b, per_group)
    values = (dt[..., None] * x).transpose(1, 2).reshape(rows * heads, length, head_dim)
    grown = state.reshape(rows * heads, head_dim, -1)

    flat = log_decay.reshape(rows * heads, length, 1)
    from_state = torch.bmm(queries, grown.transpose(1, 2)) * torch.exp(flat)
    if length == 1 and not need_state:
        scores = (queries * keys).sum(-1, keepdim=True)
        return (from_state + scores * values).view(rows, 1, heads, head_dim), state
    # The exponent is masked, not its result: above the diagonal it could overflow.
    future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu_(1)
    decay = torch.exp((flat - flat.transpose(1, 2)).masked_fill_(future, float("-inf")))
    scores = torch.bmm(queries, keys.transpose(1, 2)) * decay
    y = (from_state + torch.bmm(scores, values)).view(rows, heads, length, head_dim).transpose(1, 2)
    if not need_state:
        return y, state
    to_end = torch.exp(flat[:, -1:] - flat)
    added = torch.bmm((values * to_end).transpose(1, 2), keys)
    carried = grown * torch.exp(flat[:, -1:]) + added
    return y, carried.view(rows, heads, head_dim, -1)


def _per_head(shared: Tensor, per_group: int) -> Tensor:
    """[B, L, G, N] -> [B * G * per_group, L, N]."""
    rows, length, groups, state_dim = shared.shape
    by_group = shared.transpose(1, 2).unsqueeze(2).expand(-1, -1, per_group, -1, -1)
    return by_group.reshape(rows * groups * per_group, length, state_dim)

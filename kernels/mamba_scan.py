"""The conv and scan of a Mamba-2 mixer, from the states in the rows' slots.

    xBC = silu(conv(xBC));  dt = softplus(dt + dt_bias);  y = scan(x, dt, B, C) + D x

The states are only read: a pass leaves them unchanged, `twotower.kernels.replay` advances them.
Source: Dao and Gu 2024 (Mamba-2), section 7.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels.causal_conv1d import causal_conv1d
from twotower.kernels.chunk_scan import chunk_scan
from twotower.kernels.elementwise import softplus
from twotower.kernels.rows import Rows, Run

# Limit on the GPU kernels' buffer for the states between chunks of long rows, which a GPU's L2
# cache holds about as many of; heads take turns where there are more.
SCAN_SCRATCH_BYTES = 40 << 20


@dataclass(frozen=True)
class MambaScanWeights:
    """Weights of one layer that `mamba_scan` reads: conv_weight [Cd, K], conv_bias [Cd] or None,
    and a_log, d and dt_bias [H] fp32. Heads of a group share B and C; there are `groups` groups."""

    conv_weight: Tensor
    conv_bias: Tensor | None
    a_log: Tensor
    d: Tensor
    dt_bias: Tensor
    groups: int


def mamba_scan(
    projected: Tensor,
    weights: MambaScanWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Rows,
) -> Tensor:
    """projected [T, Di + Cd + H] (z, xBC, dt), conv_state [S, K-1, Cd] (oldest first), ssm_state
    [S, H, P, N] fp32 -> y [T, Di] fp32, not gated yet. Di = H P, Cd = Di + 2 G N; z is not read."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    inner, shared = heads * head_dim, weights.groups * state_dim
    _, xbc, dt = projected.split_with_sizes((inner, inner + 2 * shared, heads), dim=-1)
    steps = softplus(dt.float() + weights.dt_bias)
    runs = rows.host.runs
    if len(runs) == 1 and runs[0].count == rows.count:
        return _scan_run(xbc, steps, weights, conv_state, ssm_state, rows, runs[0])
    y = projected.new_zeros((projected.shape[0], inner), dtype=torch.float32)
    for run in runs:
        scanned = _scan_run(xbc, steps, weights, conv_state, ssm_state, rows, run)
        y[run.token : run.token + len(scanned)] = scanned
    return y


def _scan_run(
    xbc: Tensor,
    steps: Tensor,
    weights: MambaScanWeights,
    conv_state: Tensor,
    ssm_state: Tensor,
    rows: Rows,
    run: Run,
) -> Tensor:
    """y of a run of rows of one length, [count * length, Di] fp32."""
    heads, head_dim, state_dim = ssm_state.shape[1:]
    shared = weights.groups * state_dim
    history = _of_slots(conv_state, run, rows)
    conv = causal_conv1d(run.take(xbc), weights.conv_weight, weights.conv_bias, history).float()
    values, keys, queries = conv.split_with_sizes((heads * head_dim, shared, shared), dim=-1)
    y = chunk_scan(
        values.unflatten(-1, (heads, -1)),
        run.take(steps),
        weights.a_log,
        keys.unflatten(-1, (weights.groups, -1)),
        queries.unflatten(-1, (weights.groups, -1)),
        weights.d,
        _of_slots(ssm_state, run, rows),
    )
    return y.reshape(-1, heads * head_dim)


def _of_slots(states: Tensor, run: Run, rows: Rows) -> Tensor:
    """States [S, ...] of the run's slots -> [count, ...]; a view for a single row."""
    slots = [rows.host.slots[row] for row in run.rows]
    if len(slots) == 1:
        return states[slots[0]].unsqueeze(0)
    return torch.stack([states[slot] for slot in slots])

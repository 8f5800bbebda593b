"""Replaying a log: the recurrence in fp64, and the same bits however the log is cut."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.causal_conv1d import causal_conv1d
from twotower.kernels.chunk_scan import chunk_scan
from twotower.kernels.elementwise import softplus
from twotower.kernels.replay import ReplayWeights, replay

HEADS, WIDTH, N, GROUPS, TAPS = 6, 5, 7, 2, 4
CHANNELS = HEADS * WIDTH + 2 * GROUPS * N


def make_weights(taps: int = TAPS, with_bias: bool = True) -> ReplayWeights:
    return ReplayWeights(
        normal(CHANNELS, taps, seed=1) * 0.5,
        normal(CHANNELS, seed=2) * 0.1 if with_bias else None,
        normal(HEADS, seed=3) * 0.5,
        normal(HEADS, seed=4),
        GROUPS,
    )


def make_row(tokens: int, taps: int = TAPS, scale: float = 1.0) -> tuple[Tensor, ...]:
    """state, history, xbc, dt."""
    return (
        normal(HEADS, WIDTH, N, seed=5, scale=scale),
        normal(taps - 1, CHANNELS, seed=6),
        normal(tokens, CHANNELS, seed=7),
        normal(tokens, HEADS, seed=8),
    )


def true_replay(
    state: Tensor, history: Tensor, xbc: Tensor, dt: Tensor, weights: ReplayWeights
) -> Tensor:
    state, history, xbc, dt = (part.double() for part in (state, history, xbc, dt))
    taps = weights.conv_weight.double()
    inputs = torch.cat((history, xbc))
    for t in range(len(xbc)):
        u = (inputs[t : t + taps.shape[1]] * taps.T).sum(0)
        if weights.conv_bias is not None:
            u = u + weights.conv_bias.double()
        u = u * torch.sigmoid(u)
        x, b, _ = u.split((HEADS * WIDTH, GROUPS * N, GROUPS * N))
        for head in range(HEADS):
            step = math.log1p(math.exp(float(dt[t, head]) + float(weights.dt_bias[head])))
            decay = math.exp(-step * math.exp(float(weights.a_log[head])))
            own = x[head * WIDTH : (head + 1) * WIDTH]
            group = head // (HEADS // GROUPS)
            key = b[group * N : (group + 1) * N]
            state[head] = decay * state[head] + step * torch.outer(own, key)
    return state


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize(("taps", "with_bias"), [(4, True), (3, False)])
def test_values(tokens: int, scale: float, taps: int, with_bias: bool) -> None:
    weights = make_weights(taps, with_bias)
    state, history, xbc, dt = make_row(tokens, taps, scale)
    want = true_replay(state, history, xbc, dt, weights)
    raw = torch.cat((history, xbc))[-(taps - 1) :]
    replay(state, history, xbc, dt, weights)
    assert_relative_rms(state, want, 1e-6)
    assert_same_bits(history, raw)


@pytest.mark.parametrize("cut", range(14))
def test_a_log_may_be_cut_anywhere(cut: int) -> None:
    weights = make_weights()
    state, history, xbc, dt = make_row(13)
    state_in_two, history_in_two = state.clone(), history.clone()
    replay(state, history, xbc, dt, weights)
    replay(state_in_two, history_in_two, xbc[:cut], dt[:cut], weights)
    replay(state_in_two, history_in_two, xbc[cut:], dt[cut:], weights)
    assert_same_bits(state_in_two, state)
    assert_same_bits(history_in_two, history)


def test_an_empty_log_changes_nothing() -> None:
    state, history, xbc, dt = make_row(0)
    before = state.clone(), history.clone()
    replay(state, history, xbc, dt, make_weights())
    assert_same_bits(state, before[0])
    assert_same_bits(history, before[1])


def test_the_log_is_only_read() -> None:
    state, history, xbc, dt = make_row(5)
    before = xbc.clone(), dt.clone()
    replay(state, history, xbc, dt, make_weights())
    assert_same_bits(xbc, before[0])
    assert_same_bits(dt, before[1])


def test_it_leads_where_a_scan_of_the_same_tokens_goes() -> None:
    """Scanning A + B from the start equals scanning B from the state that replaying A leaves."""
    weights = make_weights()
    state, history, xbc, dt = make_row(29)

    def scan(part: Tensor, steps: Tensor, past: Tensor, start: Tensor) -> Tensor:
        conv = causal_conv1d(part[None], weights.conv_weight, weights.conv_bias, past[None])
        x, b, c = conv.split((HEADS * WIDTH, GROUPS * N, GROUPS * N), dim=-1)
        return chunk_scan(
            x.unflatten(-1, (HEADS, WIDTH)),
            softplus(steps + weights.dt_bias)[None],
            weights.a_log,
            b.unflatten(-1, (GROUPS, N)),
            c.unflatten(-1, (GROUPS, N)),
            torch.zeros(HEADS),
            start[None],
        )

    whole = scan(xbc, dt, history, state)
    replay(state, history, xbc[:12], dt[:12], weights)
    assert_relative_rms(scan(xbc[12:], dt[12:], history, state), whole[:, 12:], 2e-6)


def test_strided_logs() -> None:
    weights = make_weights()
    state, history, xbc, dt = make_row(9)
    twin, past = state.clone(), history.clone()
    wide = torch.cat((dt, xbc, dt), dim=1)
    replay(twin, past, wide[:, HEADS:-HEADS], wide[:, :HEADS], weights)
    replay(state, history, xbc, dt, weights)
    assert_same_bits(twin, state)
    assert_same_bits(past, history)

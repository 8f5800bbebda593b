"""Replaying a log: the recurrence in fp64, and the same bits however the log is cut."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels import replay as module
from twotower.kernels.causal_conv1d import causal_conv1d
from twotower.kernels.chunk_scan import chunk_scan
from twotower.kernels.elementwise import softplus
from twotower.kernels.replay import ReplayWeights, replay
from twotower.kernels.rows import Rows

HEADS, WIDTH, N, GROUPS, TAPS = 6, 5, 7, 2, 4
CHANNELS = HEADS * WIDTH + 2 * GROUPS * N


def make_weights(taps: int = TAPS, with_bias: bool = True, layers: int = 1) -> ReplayWeights:
    return ReplayWeights(
        normal(layers, CHANNELS, taps, seed=1) * 0.5,
        normal(layers, CHANNELS, seed=2) * 0.1 if with_bias else None,
        normal(layers, HEADS, seed=3) * 0.5,
        normal(layers, HEADS, seed=4),
        GROUPS,
    )


def make_row(tokens: int, taps: int = TAPS, scale: float = 1.0) -> tuple[Tensor, ...]:
    """state, history, xbc, dt of one layer."""
    return (
        normal(HEADS, WIDTH, N, seed=5, scale=scale),
        normal(taps - 1, CHANNELS, seed=6),
        normal(tokens, CHANNELS, seed=7),
        normal(tokens, HEADS, seed=8),
    )


def replay_row(
    state: Tensor, history: Tensor, xbc: Tensor, dt: Tensor, weights: ReplayWeights
) -> None:
    """The operator on all tokens of one row with one layer."""
    rows, count = rows_of([len(xbc)], [0]), torch.tensor([len(xbc)], dtype=torch.int32)
    replay(state[None, None], history[None, None], xbc[None], dt[None], weights, rows, count)


def rows_of(lengths: Sequence[int], slots: Sequence[int]) -> Rows:
    """Rows of a pass; a replay reads no pages."""
    return Rows.build(lengths, slots, [0] * len(slots), torch.zeros(1, 1, dtype=torch.int32), 64)


def true_replay(
    state: Tensor, history: Tensor, xbc: Tensor, dt: Tensor, weights: ReplayWeights
) -> Tensor:
    state, history, xbc, dt = (part.double() for part in (state, history, xbc, dt))
    taps, (a_log,), (dt_bias,) = weights.conv_weight[0].double(), weights.a_log, weights.dt_bias
    inputs = torch.cat((history, xbc))
    for t in range(len(xbc)):
        u = (inputs[t : t + taps.shape[1]] * taps.T).sum(0)
        if weights.conv_bias is not None:
            u = u + weights.conv_bias[0].double()
        u = u * torch.sigmoid(u)
        x, b, _ = u.split((HEADS * WIDTH, GROUPS * N, GROUPS * N))
        for head in range(HEADS):
            step = math.log1p(math.exp(float(dt[t, head]) + float(dt_bias[head])))
            decay = math.exp(-step * math.exp(float(a_log[head])))
            own = x[head * WIDTH : (head + 1) * WIDTH]
            group = head // (HEADS // GROUPS)
            key = b[group * N : (group + 1) * N]
            state[head] = decay * state[head] + step * torch.outer(own, key)
    return state


@pytest.mark.parametrize("tokens", [1, 2, 3, 16, 33])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize(("taps", "with_bias"), [(4, True), (3, False), (1, True)])
def test_values(tokens: int, scale: float, taps: int, with_bias: bool) -> None:
    weights = make_weights(taps, with_bias)
    state, history, xbc, dt = make_row(tokens, taps, scale)
    want = true_replay(state, history, xbc, dt, weights)
    raw = torch.cat((history, xbc))[tokens:]
    replay_row(state, history, xbc, dt, weights)
    assert_relative_rms(state, want, 1e-6)
    assert_same_bits(history, raw)


@pytest.mark.parametrize("cut", range(14))
def test_a_log_may_be_cut_anywhere(cut: int) -> None:
    weights = make_weights()
    state, history, xbc, dt = make_row(13)
    state_in_two, history_in_two = state.clone(), history.clone()
    replay_row(state, history, xbc, dt, weights)
    replay_row(state_in_two, history_in_two, xbc[:cut], dt[:cut], weights)
    replay_row(state_in_two, history_in_two, xbc[cut:], dt[cut:], weights)
    assert_same_bits(state_in_two, state)
    assert_same_bits(history_in_two, history)


def test_an_empty_log_changes_nothing() -> None:
    state, history, xbc, dt = make_row(0)
    before = state.clone(), history.clone()
    replay_row(state, history, xbc, dt, make_weights())
    assert_same_bits(state, before[0])
    assert_same_bits(history, before[1])


def test_the_log_is_only_read() -> None:
    state, history, xbc, dt = make_row(5)
    before = xbc.clone(), dt.clone()
    replay_row(state, history, xbc, dt, make_weights())
    assert_same_bits(xbc, before[0])
    assert_same_bits(dt, before[1])


def test_it_leads_where_a_scan_of_the_same_tokens_goes() -> None:
    """Scanning A + B from the start equals scanning B from the state that replaying A leaves."""
    weights = make_weights()
    state, history, xbc, dt = make_row(29)

    def scan(part: Tensor, steps: Tensor, past: Tensor, start: Tensor) -> Tensor:
        assert weights.conv_bias is not None
        taps, bias = weights.conv_weight[0], weights.conv_bias[0]
        conv = causal_conv1d(part[None], taps, bias, past[None])
        x, b, c = conv.split((HEADS * WIDTH, GROUPS * N, GROUPS * N), dim=-1)
        return chunk_scan(
            x.unflatten(-1, (HEADS, WIDTH)),
            softplus(steps + weights.dt_bias[0])[None],
            weights.a_log[0],
            b.unflatten(-1, (GROUPS, N)),
            c.unflatten(-1, (GROUPS, N)),
            torch.zeros(HEADS),
            start[None],
        )

    whole = scan(xbc, dt, history, state)
    replay_row(state, history, xbc[:12], dt[:12], weights)
    assert_relative_rms(scan(xbc[12:], dt[12:], history, state), whole[:, 12:], 2e-6)


def test_strided_logs() -> None:
    weights = make_weights()
    state, history, xbc, dt = make_row(9)
    twin, past = state.clone(), history.clone()
    wide = torch.cat((dt, xbc, dt), dim=1)
    replay_row(twin, past, wide[:, HEADS:-HEADS], wide[:, :HEADS], weights)
    replay_row(state, history, xbc, dt, weights)
    assert_same_bits(twin, state)
    assert_same_bits(past, history)


LAYERS, SLOTS = 3, 5


def make_pool() -> tuple[Tensor, Tensor]:
    """ssm_state and conv_state of five slots."""
    return (
        normal(SLOTS, LAYERS, HEADS, WIDTH, N, seed=5),
        normal(SLOTS, LAYERS, TAPS - 1, CHANNELS, seed=6),
    )


def test_each_row_moves_its_own_slot_over_its_own_count() -> None:
    """Bit by bit what each layer of each row gives alone; what lies behind a count is not read."""
    weights, (ssm, conv) = make_weights(layers=LAYERS), make_pool()
    lengths, slots, counts = [4, 1, 6, 3], [3, 0, 4, 1], [4, 1, 2, 0]
    rows = rows_of(lengths, slots)
    xbc = normal(LAYERS, sum(lengths), CHANNELS, seed=7)
    dt = normal(LAYERS, sum(lengths), HEADS, seed=8)
    want = ssm.clone(), conv.clone()
    for row, (slot, count) in enumerate(zip(slots, counts, strict=True)):
        start = rows.host.cu_seqlens[row]
        for layer in range(LAYERS):
            replay_row(
                want[0][slot, layer],
                want[1][slot, layer],
                xbc[layer, start : start + count],
                dt[layer, start : start + count],
                weights.layers(slice(layer, layer + 1)),
            )
        for log in (xbc, dt):
            log[:, start + count : rows.host.cu_seqlens[row + 1]] = float("nan")
    before = ssm.clone(), conv.clone()
    replay(ssm, conv, xbc, dt, weights, rows, torch.tensor(counts, dtype=torch.int32))
    assert_same_bits(ssm, want[0])
    assert_same_bits(conv, want[1])
    for slot in range(SLOTS):
        moved = not torch.equal(ssm[slot], before[0][slot])
        assert moved == (slot in (3, 0, 4)), slot


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("limit", [1, 2 * CHANNELS, 1 << 20])
def test_rows_of_one_count_move_together(
    count: int, gaps: bool, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows and layers one operation takes, each has the bits that it has alone; the
    log's tokens may lie side by side or not."""
    weights, (ssm, conv) = make_weights(layers=LAYERS), make_pool()
    slots, length = [3, 0, 4, 1], count + gaps
    xbc = normal(LAYERS, 4 * length, CHANNELS, seed=7)
    dt = normal(LAYERS, 4 * length, HEADS, seed=8)
    want = ssm.clone(), conv.clone()
    for row, slot in enumerate(slots):
        own = slice(row * length, row * length + count)
        one = torch.tensor([count], dtype=torch.int32)
        replay(*want, xbc[:, own], dt[:, own], weights, rows_of([count], [slot]), one)
    monkeypatch.setattr(module, "_CONV_ELEMENTS", limit)
    monkeypatch.setattr(module, "_STATE_ELEMENTS", limit)
    counts = torch.full((4,), count, dtype=torch.int32)
    replay(ssm, conv, xbc, dt, weights, rows_of([length] * 4, slots), counts)
    assert_same_bits(ssm, want[0])
    assert_same_bits(conv, want[1])


def test_padding_moves_nothing() -> None:
    weights, (ssm, conv) = make_weights(layers=LAYERS), make_pool()
    want = ssm.clone(), conv.clone()
    xbc, dt = normal(LAYERS, 6, CHANNELS, seed=7), normal(LAYERS, 6, HEADS, seed=8)
    two = torch.full((3,), 2, dtype=torch.int32)
    replay(ssm, conv, xbc, dt, weights, rows_of([2, 2, 2], [-1] * 3), two)
    assert_same_bits(ssm, want[0])
    assert_same_bits(conv, want[1])
    replay(*want, xbc[:, 2:4], dt[:, 2:4], weights, rows_of([2], [4]), two[:1])
    for log in (xbc, dt):
        log[:, :2], log[:, 4:] = float("nan"), float("nan")
    replay(ssm, conv, xbc, dt, weights, rows_of([2, 2, 2], [-1, 4, -1]), two)
    assert_same_bits(ssm, want[0])
    assert_same_bits(conv, want[1])


def test_states_may_be_a_part_of_the_layers_of_a_pool() -> None:
    """Layer by layer over views of the pool gives the bits of all layers at once."""
    weights, (ssm, conv) = make_weights(layers=LAYERS), make_pool()
    one = ssm.clone(), conv.clone()
    xbc, dt = normal(LAYERS, 5, CHANNELS, seed=7), normal(LAYERS, 5, HEADS, seed=8)
    rows, counts = rows_of([5], [2]), torch.tensor([5], dtype=torch.int32)
    replay(ssm, conv, xbc, dt, weights, rows, counts)
    for layer in range(LAYERS):
        own = slice(layer, layer + 1)
        parts = one[0][:, own], one[1][:, own], xbc[own], dt[own]
        replay(*parts, weights.layers(own), rows, counts)
    assert_same_bits(one[0], ssm)
    assert_same_bits(one[1], conv)


@pytest.mark.parametrize("with_bias", [False, True])
def test_weights_travel_as_named_tensors(with_bias: bool) -> None:
    weights = make_weights(layers=LAYERS, with_bias=with_bias)
    named = weights.tensors()
    assert set(named) == {"conv_weight", "a_log", "dt_bias"} | (
        {"conv_bias"} if with_bias else set()
    )
    back = ReplayWeights.from_tensors({name: part.clone() for name, part in named.items()}, GROUPS)
    assert len(back) == len(weights) == LAYERS
    for name, part in back.tensors().items():
        assert_same_bits(part, named[name], name)
    # Taps of neighbouring channels side by side, as the conv reads them.
    assert back.conv_weight.stride() == (CHANNELS * TAPS, 1, CHANNELS)
    for layer in range(LAYERS):
        for name, part in back.layers(slice(layer, layer + 1)).tensors().items():
            assert_same_bits(part, named[name][layer : layer + 1], name)


@pytest.mark.parametrize("missing", ["conv_weight", "a_log", "dt_bias"])
def test_weights_that_are_missing_are_named(missing: str) -> None:
    named = make_weights().tensors()
    del named[missing]
    with pytest.raises(KeyError, match=missing):
        ReplayWeights.from_tensors(named, GROUPS)

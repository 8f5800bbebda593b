"""The mixer between its projections, against the recurrence in fp64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.chunk_scan import chunk_scan_recurrent
from twotower.kernels.mamba_scan import MambaScanWeights, mamba_scan
from twotower.kernels.rows import Rows

HEADS, WIDTH, N, GROUPS, SLOTS = 6, 5, 7, 2, 6
INNER, SHARED = HEADS * WIDTH, GROUPS * N
CHANNELS = INNER + 2 * SHARED

# Neighbours of one length, a single token, and more tokens than the scan's chunk.
LENGTHS, ROW_SLOTS = [3, 3, 1, 37, 16, 1, 1], [4, 1, 0, 5, 2, 3, 3]


def make_weights(taps: int = 4, with_bias: bool = True) -> MambaScanWeights:
    return MambaScanWeights(
        normal(CHANNELS, taps, seed=1) * 0.5,
        normal(CHANNELS, seed=2) * 0.1 if with_bias else None,
        normal(HEADS, seed=3) * 0.5,
        normal(HEADS, seed=4),
        normal(HEADS, seed=5),
        GROUPS,
    )


def make_states(taps: int = 4, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """conv_state and ssm_state of all slots."""
    conv = normal(SLOTS, taps - 1, CHANNELS, seed=6)
    return conv, normal(SLOTS, HEADS, WIDTH, N, seed=7, scale=scale)


def projections(tokens: int) -> Tensor:
    """z, which must not be read, xBC and dt."""
    projected = normal(tokens, INNER + CHANNELS + HEADS)
    projected[:, :INNER] = float("nan")
    return projected


def rows_of(lengths: Sequence[int], slots: Sequence[int]) -> Rows:
    """Rows of a pass; a scan reads no pages."""
    return Rows.build(lengths, slots, [0] * len(slots), torch.zeros(1, 1, dtype=torch.int32), 64)


def true_scan(
    projected: Tensor, weights: MambaScanWeights, conv_state: Tensor, ssm_state: Tensor
) -> Tensor:
    """One row's y [L, Di] from its own states, a token at a time, in fp64."""
    _, xbc, dt = projected.double().split((INNER, CHANNELS, HEADS), dim=-1)
    taps = weights.conv_weight.double()
    inputs = torch.cat((conv_state.double(), xbc))
    conv = torch.stack(
        [(inputs[t : t + taps.shape[1]] * taps.T).sum(0) for t in range(len(projected))]
    )
    if weights.conv_bias is not None:
        conv = conv + weights.conv_bias.double()
    conv = conv * torch.sigmoid(conv)
    x, b, c = conv.split((INNER, SHARED, SHARED), dim=-1)
    y = chunk_scan_recurrent(
        x.unflatten(-1, (HEADS, WIDTH))[None],
        torch.log1p(torch.exp(dt + weights.dt_bias.double()))[None],
        weights.a_log.double(),
        b.unflatten(-1, (GROUPS, N))[None],
        c.unflatten(-1, (GROUPS, N))[None],
        weights.d.double(),
        ssm_state.double()[None],
    )
    return y[0].flatten(-2)


@pytest.mark.parametrize("length", [1, 2, 16, 33, 70])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
@pytest.mark.parametrize(("taps", "with_bias"), [(4, True), (3, False), (2, True)])
def test_values_of_a_row(length: int, scale: float, taps: int, with_bias: bool) -> None:
    weights, (conv, ssm) = make_weights(taps, with_bias), make_states(taps, scale)
    projected = projections(length)
    got = mamba_scan(projected, weights, conv, ssm, rows_of([length], [2]))
    assert got.dtype == torch.float32
    assert_relative_rms(got, true_scan(projected, weights, conv[2], ssm[2]), 3e-6)


def test_rows_of_different_lengths_read_their_own_slots() -> None:
    """Against fp64, and bit by bit against each row alone."""
    weights, (conv, ssm) = make_weights(), make_states()
    projected, rows = projections(sum(LENGTHS)), rows_of(LENGTHS, ROW_SLOTS)
    got = mamba_scan(projected, weights, conv, ssm, rows)
    assert got.shape == (sum(LENGTHS), INNER)
    for row, (length, slot) in enumerate(zip(LENGTHS, ROW_SLOTS, strict=True)):
        own = rows.host.slice_of(row)
        want = true_scan(projected[own], weights, conv[slot], ssm[slot])
        assert_relative_rms(got[own], want, 3e-6)
        alone = mamba_scan(projected[own], weights, conv, ssm, rows_of([length], [slot]))
        assert_same_bits(got[own], alone, row)


@pytest.mark.parametrize("padding", [[0], [1, 3], [2, 5, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_padding_is_not_computed_and_harms_no_row(padding: list[int]) -> None:
    weights, (conv, ssm) = make_weights(), make_states()
    projected, rows = projections(sum(LENGTHS)), rows_of(LENGTHS, ROW_SLOTS)
    want = mamba_scan(projected, weights, conv, ssm, rows)
    slots = [-1 if row in padding else slot for row, slot in enumerate(ROW_SLOTS)]
    for row in padding:
        projected[rows.host.slice_of(row)] = float("nan")
    got = mamba_scan(projected, weights, conv, ssm, rows_of(LENGTHS, slots))
    assert got.shape == want.shape
    for row in set(range(len(LENGTHS))) - set(padding):
        assert_same_bits(got[rows.host.slice_of(row)], want[rows.host.slice_of(row)], row)


def test_states_and_projections_are_only_read() -> None:
    weights, (conv, ssm) = make_weights(), make_states()
    projected = projections(sum(LENGTHS))
    before = conv.clone(), ssm.clone(), projected.clone()
    mamba_scan(projected, weights, conv, ssm, rows_of(LENGTHS, ROW_SLOTS))
    for got, want in zip((conv, ssm, projected), before, strict=True):
        assert_same_bits(got, want)


def test_the_slots_of_other_rows_are_not_read() -> None:
    weights, (conv, ssm) = make_weights(), make_states()
    projected, rows = projections(6), rows_of([3, 3], [4, 1])
    want = mamba_scan(projected, weights, conv, ssm, rows)
    conv[[0, 2, 3, 5]], ssm[[0, 2, 3, 5]] = float("nan"), float("nan")
    assert_same_bits(mamba_scan(projected, weights, conv, ssm, rows), want)


def test_one_layer_of_a_pool_of_many() -> None:
    """The states of a layer are a slice of those of all layers."""
    weights, (conv, ssm) = make_weights(), make_states()
    projected, rows = projections(sum(LENGTHS)), rows_of(LENGTHS, ROW_SLOTS)
    want = mamba_scan(projected, weights, conv, ssm, rows)
    pools = [torch.stack((torch.full_like(s, 9.0), s, -s), dim=1) for s in (conv, ssm)]
    got = mamba_scan(projected, weights, pools[0][:, 1], pools[1][:, 1], rows)
    assert_same_bits(got, want)


def test_bf16_projections_are_scanned_in_fp32() -> None:
    weights, (conv, ssm) = make_weights(), make_states()
    half = MambaScanWeights(
        weights.conv_weight.bfloat16(),
        weights.conv_bias.bfloat16() if weights.conv_bias is not None else None,
        weights.a_log,
        weights.d,
        weights.dt_bias,
        GROUPS,
    )
    projected, rows = projections(40).bfloat16(), rows_of([20, 20], [0, 3])
    got = mamba_scan(projected, half, conv.bfloat16(), ssm, rows)
    assert got.dtype == torch.float32
    for row, slot in enumerate((0, 3)):
        own = rows.host.slice_of(row)
        want = true_scan(projected[own], half, conv[slot].bfloat16(), ssm[slot])
        assert_relative_rms(got[own], want, 2e-2)

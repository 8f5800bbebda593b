"""The short convolution against its sum, written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.causal_conv1d import causal_conv1d, convolve


def true_conv(x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor) -> Tensor:
    rows, length, channels = x.shape
    taps = weight.shape[1]
    inputs = torch.cat((history, x), dim=1).double()
    out = torch.zeros(rows, length, channels, dtype=torch.float64)
    for row in range(rows):
        for t in range(length):
            for c in range(channels):
                total = 0.0 if bias is None else float(bias[c])
                for back in range(taps):
                    # The last tap meets the current token, the one before it the token before.
                    place = t + taps - 1 - back
                    total += float(weight[c, taps - 1 - back]) * float(inputs[row, place, c])
                out[row, t, c] = total / (1.0 + math.exp(-total))
    return out


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values(taps: int, length: int, with_bias: bool) -> None:
    x, weight = normal(2, length, 5), normal(5, taps, seed=1)
    bias = normal(5, seed=2) if with_bias else None
    history = normal(2, taps - 1, 5, seed=3)
    want = true_conv(x, weight, bias, history)
    assert_relative_rms(causal_conv1d(x, weight, bias, history), want, 1e-6)


@pytest.mark.parametrize("cut", [1, 2, 3, 7, 12])
def test_a_sequence_may_be_cut_anywhere(cut: int) -> None:
    x, weight, bias = normal(1, 13, 6), normal(6, 4, seed=1), normal(6, seed=2)
    history = normal(1, 3, 6, seed=3)
    whole = causal_conv1d(x, weight, bias, history)
    moved = torch.cat((history, x[:, :cut]), dim=1)[:, -3:]
    first = causal_conv1d(x[:, :cut], weight, bias, history)
    second = causal_conv1d(x[:, cut:], weight, bias, moved)
    assert_same_bits(torch.cat((first, second), dim=1), whole)


@pytest.mark.parametrize("with_bias", [False, True])
def test_several_layers_at_once(with_bias: bool) -> None:
    """Layers between tokens and channels have the bits that each has alone."""
    x, history = normal(2, 5, 3, 6), normal(2, 3, 3, 6, seed=1)
    weight, bias = normal(3, 6, 4, seed=2), normal(3, 6, seed=3) if with_bias else None
    got = causal_conv1d(x, weight, bias, history)
    for layer in range(3):
        own = None if bias is None else bias[layer]
        want = causal_conv1d(x[:, :, layer], weight[layer], own, history[:, :, layer])
        assert_same_bits(got[:, :, layer], want)


@pytest.mark.parametrize("taps", [1, 4])
def test_inputs_are_only_read(taps: int) -> None:
    padded, weight, bias = normal(2, 7, 6), normal(6, taps, seed=1), normal(6, seed=2)
    before = padded.clone(), weight.clone(), bias.clone()
    assert convolve(padded, weight, bias).shape == (2, 8 - taps, 6)
    for got, want in zip((padded, weight, bias), before, strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize("length", [1, 3, 16])
def test_rows_are_independent(length: int) -> None:
    weight, bias = normal(7, 4, seed=1), normal(7, seed=2)
    rows = normal(40, length + 3, 7)
    assert_rows_are_independent(
        lambda part: causal_conv1d(part[:, 3:], weight, bias, part[:, :3]), rows
    )


def test_strided_inputs() -> None:
    packed = normal(2, 5, 30)
    x, weight, history = packed[..., 4:10], normal(6, 4, seed=1), normal(2, 3, 6, seed=2)
    got = causal_conv1d(x, weight, None, history)
    assert_same_bits(got, causal_conv1d(x.contiguous(), weight, None, history))


def test_bf16_is_summed_in_fp32() -> None:
    x, weight = normal(2, 5, 6).bfloat16(), normal(6, 4, seed=1).bfloat16()
    history = normal(2, 3, 6, seed=2).bfloat16()
    got = causal_conv1d(x, weight, None, history)
    assert got.dtype == torch.bfloat16
    assert_relative_rms(got, true_conv(x, weight, None, history), 3e-3)

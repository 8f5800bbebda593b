"""Experts in 8 bits: how far a value moves, and what stays as it is."""

from __future__ import annotations

import math

import pytest
import torch

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.quantized import (
    FP8,
    FP8_MAX,
    QuantizedExperts,
    quantize,
    quantize_tokens,
    widen,
)

EXPERTS, ROWS, COLUMNS = 3, 5, 40


def widened(quantized: QuantizedExperts) -> torch.Tensor:
    return torch.stack([quantized[expert] for expert in range(len(quantized))])


@pytest.mark.parametrize("scale", [1e-20, 1e-3, 1.0, 1e4, 1e30])
def test_a_value_moves_by_half_a_step_at_most(scale: float) -> None:
    """Three bits after the point: 1/16 of a normal number, and half of 2^-9 scales below."""
    weight = normal(EXPERTS, ROWS, COLUMNS) * scale
    weight[..., ::4] *= 1e-4
    quantized = quantize(weight)
    assert quantized.values.dtype == FP8
    assert quantized.scale.dtype == torch.float32
    assert quantized.values.shape == weight.shape
    assert quantized.scale.shape == (EXPERTS, ROWS)
    error = (widened(quantized).double() - weight.double()).abs()
    least = quantized.scale.double().unsqueeze(-1) * 2.0**-10
    # A little more than half a step: the quotient and the product round in fp32.
    limit = torch.maximum(weight.double().abs() / 16, least) * (1 + 1e-6)
    assert bool((error <= limit).all())
    # What is that small loses its bits; the rest is far from zero.
    assert bool((error > 0).any())
    assert_relative_rms(widened(quantized), weight, 0.04)


def test_the_nearest_values_are_taken() -> None:
    """Against every value of the format."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).double()
    codes = codes[codes.isfinite()]
    weight = normal(1, 4, 60, seed=3)
    weight[0, 1, ::2] *= 1e-3
    quantized = quantize(weight)
    scaled = weight.double() / quantized.scale.double().unsqueeze(-1)
    nearest = (scaled.unsqueeze(-1) - codes).abs().amin(-1)
    got = (scaled - quantized.values.double()).abs()
    assert bool((got <= nearest * (1 + 1e-6) + 1e-5).all())


def test_the_largest_of_a_channel_stands_at_the_limit() -> None:
    """Each channel has its own scale: a loud one takes nothing from its neighbours."""
    weight = normal(EXPERTS, ROWS, COLUMNS)
    weight[1, 2, 7], weight[0, 4, 0] = 3000.0, -5e-6
    weight[0, 4, 1:] *= 1e-7
    quantized = quantize(weight)
    largest = quantized.values.float().abs().amax(-1)
    assert largest.tolist() == [[FP8_MAX] * ROWS] * EXPERTS
    assert torch.allclose(quantized.scale, weight.abs().amax(-1) / 448.0, rtol=1e-6, atol=0.0)
    assert torch.allclose(widened(quantized).abs().amax(-1), weight.abs().amax(-1), rtol=1e-6)
    plain = weight.clone()
    plain[1, 2, 7] = 0.1
    others = [row for row in range(ROWS) if row != 2]
    assert_same_bits(widened(quantize(plain))[1, others], widened(quantized)[1, others])


def test_values_of_the_format_come_back_bit_by_bit() -> None:
    """Powers of two as scales: nothing rounds on the way there or back."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    codes = codes[codes.isfinite()]
    assert float(codes.max()) == FP8_MAX
    weight = codes * 2.0 ** torch.tensor([-20, -3, 0, 9]).view(1, 4, 1)
    again = quantize(widened(quantize(weight)))
    assert_same_bits(widened(again), weight)
    assert again.scale.tolist() == [[2.0**-20, 2.0**-3, 1.0, 2.0**9]]


def test_a_channel_of_zeros_stays_zero() -> None:
    weight = normal(2, 3, 8)
    weight[0, 1], weight[1] = 0.0, -0.0
    quantized = quantize(weight)
    assert quantized.scale[0, 1] == 1.0
    assert quantized.scale[1].tolist() == [1.0] * 3
    assert not bool(widened(quantized)[0, 1].any())
    assert not bool(widened(quantized)[1].any())
    assert bool(widened(quantized)[0, 0].any())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 4, 39), (1, 2, 20)])
def test_values_that_are_not_finite_are_refused(wrong: float, place: tuple[int, ...]) -> None:
    weight = normal(EXPERTS, ROWS, COLUMNS)
    weight[place] = wrong
    with pytest.raises(ValueError, match="weight: got values that are not finite"):
        quantize(weight)


def test_one_experts_matrix_is_its_values_by_its_scales() -> None:
    weight = normal(EXPERTS, ROWS, COLUMNS)
    quantized = quantize(weight)
    assert len(quantized) == EXPERTS
    for expert in range(EXPERTS):
        want = quantized.values[expert].float() * quantized.scale[expert][:, None]
        assert quantized[expert].dtype == torch.float32
        assert_same_bits(quantized[expert], want, expert)
        # An expert does not depend on those beside it.
        assert_same_bits(quantize(weight[expert : expert + 1])[0], want, expert)


def test_bf16_weights_are_widened_first() -> None:
    weight = normal(EXPERTS, ROWS, COLUMNS).bfloat16()
    before = weight.clone()
    half, full = quantize(weight), quantize(weight.float())
    assert_same_bits(widened(half), widened(full))
    assert_same_bits(half.scale, full.scale)
    assert_same_bits(weight, before)


@pytest.mark.parametrize("largest", [1e-45, 1e-40, 1e-38, 1e-37, 1e-36])
def test_a_channel_too_small_for_a_scale_becomes_zeros(largest: float) -> None:
    """Its scale would be no normal number; nothing may turn into NaN or grow."""
    weight = normal(1, 2, 8)
    weight[0, 1] = torch.tensor([largest, -largest, largest / 2, 0.0] * 2)
    quantized = quantize(weight)
    assert bool(torch.isfinite(quantized.scale).all())
    assert bool((quantized.scale > 0).all())
    assert bool(((widened(quantized) - weight)[0, 1].abs() <= largest).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tokens_largest_value_stands_at_the_limit(dtype: torch.dtype) -> None:
    x = normal(6, COLUMNS).to(dtype)
    x[2] *= 1e6
    values, scale = quantize_tokens(x)
    assert (values.dtype, scale.dtype) == (FP8, torch.float32)
    assert values.float().abs().amax(-1).tolist() == [FP8_MAX] * 6
    again = values.double() * scale.double().unsqueeze(1)
    least = scale.double().unsqueeze(1) * 2.0**-10
    limit = torch.maximum(x.double().abs() / 16, least) * (1 + 1e-6)
    assert bool(((again - x.double()).abs() <= limit).all())
    assert_relative_rms(again, x, 0.04)


def test_tokens_of_zeros_and_of_subnormal_numbers_have_scale_1() -> None:
    x = normal(3, COLUMNS)
    x[0], x[2] = 0.0, 1e-41
    values, scale = quantize_tokens(x)
    assert scale[[0, 2]].tolist() == [1.0, 1.0]
    assert not bool(values[[0, 2]].float().any())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, COLUMNS - 1])
def test_a_token_that_is_not_finite_has_a_scale_that_says_so(wrong: float, place: int) -> None:
    """In 8 bits infinity would become the largest number, and the token would look right."""
    x = normal(4, COLUMNS)
    plain = quantize_tokens(x)
    x[2, place] = wrong
    values, scale = quantize_tokens(x)
    assert bool(scale[2].isnan())
    assert not bool(values[2].float().any())
    others = [0, 1, 3]
    assert_same_bits(scale[others], plain[1][others])
    assert_same_bits(values[others].float(), plain[0][others].float())


def test_a_token_does_not_depend_on_those_beside_it() -> None:
    def dequantized(x: torch.Tensor) -> torch.Tensor:
        values, scale = quantize_tokens(x)
        return values.float() * scale.unsqueeze(1)

    assert_rows_are_independent(dequantized, normal(20, COLUMNS), sizes=(1, 3, 17))


def test_widening_is_that_of_torch_for_every_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(FP8)
    assert_same_bits(widen(codes), codes.float())
    assert widen(codes.view(2, 4, 32)).shape == (2, 4, 32)


def test_products_are_widened_unless_said_otherwise() -> None:
    weight = normal(EXPERTS, ROWS, COLUMNS)
    assert quantize(weight).products == "widened"
    narrow = quantize(weight, "fp8")
    assert narrow.products == "fp8"
    assert_same_bits(widened(narrow), widened(quantize(weight)))

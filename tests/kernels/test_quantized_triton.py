"""The kernel that quantizes tokens: the reference's bits, at any width."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_same_bits, normal
from twotower.kernels import quantized
from twotower.kernels.quantized import FP8, FP8_MAX
from twotower.kernels.quantized_triton import quantize_tokens

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def assert_as_the_reference(x: Tensor) -> None:
    values, scale = (one.cpu() for one in quantize_tokens(x.to(DEVICE)))
    want_values, want_scale = quantized.quantize_tokens(x)
    assert (values.dtype, scale.dtype) == (FP8, torch.float32)
    assert_same_bits(scale, want_scale, "scale")
    assert_same_bits(values.float(), want_values.float(), "values")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 12, 37, 64, 200])
def test_the_bits_of_the_reference(width: int, dtype: torch.dtype) -> None:
    """Over all sizes of numbers, of which most are below the least normal 8-bit one."""
    x = normal(30, width) * torch.exp(3.0 * normal(30, width, seed=1))
    assert_as_the_reference(x.to(dtype))


def test_numbers_in_the_middle_between_two_8_bit_ones() -> None:
    """Ties go to the even one; a carry goes into the exponent."""
    codes = torch.arange(0x7F, dtype=torch.uint8).view(FP8).float()
    middle = (codes[1:] + codes[:-1]) / 2
    beside = [middle, middle.nextafter(torch.zeros(1)), middle.nextafter(codes[1:]), codes[1:]]
    x = torch.stack([*beside, *(-one for one in beside)])
    # The scale is 1, so that the numbers are quantized as they are.
    assert_as_the_reference(torch.cat((x, torch.full((len(x), 1), FP8_MAX)), dim=1))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 36])
def test_a_token_that_is_not_finite_is_seen(wrong: float, place: int) -> None:
    x = normal(5, 37)
    x[1], x[2], x[3, place] = 0.0, 1e-41, wrong
    assert_as_the_reference(x)


def test_rows_of_a_wider_tensor() -> None:
    wide = torch.full((9, 50), math.nan)
    wide[2:7, 3:40] = normal(5, 37)
    values, scale = quantize_tokens(wide.to(DEVICE)[2:7, 3:40])
    want = quantize_tokens(normal(5, 37).to(DEVICE))
    assert_same_bits(values.float().cpu(), want[0].float().cpu())
    assert_same_bits(scale.cpu(), want[1].cpu())

"""Pointwise functions against fp64, and the same bits at any place of a tensor."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels.elementwise import relu_squared, sigmoid, silu, silu_, softplus

Function = Callable[[Tensor], Tensor]
TRUTHS: list[tuple[Function, Callable[[float], float]]] = [
    (silu, lambda x: x / (1.0 + math.exp(-x))),
    (sigmoid, lambda x: 1.0 / (1.0 + math.exp(-x))),
    (softplus, lambda x: math.log1p(math.exp(x))),
    (relu_squared, lambda x: max(x, 0.0) ** 2),
]
FUNCTIONS = [function for function, _ in TRUTHS]


@pytest.mark.parametrize(("function", "truth"), TRUTHS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_values(function: Function, truth: Callable[[float], float], scale: float) -> None:
    x = normal(1001, scale=scale)
    want = torch.tensor([truth(value) for value in x.tolist()], dtype=torch.float64)
    got = function(x.clone())
    assert_relative_rms(got, want, 2e-7)
    # Small results count as well, down to the last digit of 1 + exp(x) in fp64.
    assert bool(((got.double() - want).abs() <= 2e-6 * want.abs() + 3e-16).all())


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_an_element_has_the_same_bits_anywhere(function: Function, dtype: torch.dtype) -> None:
    x = normal(83, scale=4.0).to(dtype)
    whole = function(x.clone())
    for start in range(83):
        assert_same_bits(function(x[start : start + 1].clone()), whole[start : start + 1], start)
        assert_same_bits(function(x[start:].clone()), whole[start:], start)
    assert_same_bits(function(x.repeat(3)[::3].clone()), function(x.repeat(3))[::3].clone())


def test_silu_in_place() -> None:
    x = normal(83, scale=4.0)
    want = silu(x)
    assert silu_(x) is x
    assert_same_bits(x, want)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_large_values_stay_finite(function: Function) -> None:
    got = function(torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]))
    assert bool(torch.isfinite(got).all())


def test_far_ends() -> None:
    x = torch.tensor([-200.0, 200.0])
    assert silu(x).tolist() == [-0.0, 200.0]
    assert sigmoid(x.double()).tolist() == [pytest.approx(0.0, abs=1e-80), 1.0]
    assert softplus(x).tolist() == [0.0, 200.0]


def test_softplus_is_smooth_where_its_form_changes() -> None:
    below, above = softplus(torch.tensor([math.nextafter(20.0, 0.0), 20.0001])).tolist()
    assert below == pytest.approx(math.log1p(math.exp(20.0)), rel=1e-7)
    assert above == pytest.approx(math.log1p(math.exp(20.0001)), rel=1e-7)


def test_dtypes() -> None:
    x = normal(9).bfloat16()
    assert silu(x).dtype == torch.bfloat16
    assert sigmoid(x.double()).dtype == torch.float64
    assert softplus(x).dtype == torch.float32


def test_relu_squared_takes_its_inputs_memory() -> None:
    x = normal(9)
    assert relu_squared(x).data_ptr() == x.data_ptr()

"""The three norms against plain loops in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.norm import adaln, gated_group_norm, rms_norm

EPSILONS = [1e-5, 5e-3]


def true_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    rows = [row * (row.dot(row) / len(row) + eps) ** -0.5 for row in wide.reshape(-1, x.shape[-1])]
    return torch.stack(rows).view(x.shape) * weight.double()


@pytest.mark.parametrize("width", [1, 7, 56, 1027])
@pytest.mark.parametrize("eps", EPSILONS)
def test_rms_norm(width: int, eps: float) -> None:
    # Small inputs, so that eps matters.
    x, weight = normal(5, width, scale=0.05), normal(width, seed=1)
    assert_relative_rms(rms_norm(x, weight, eps), true_norm(x, weight, eps), 1e-6)


def test_rms_norm_in_bf16_is_the_fp32_norm_rounded() -> None:
    x, weight = normal(5, 56).bfloat16(), normal(56, seed=1).bfloat16()
    got = rms_norm(x, weight, 1e-5)
    assert got.dtype == torch.bfloat16
    assert_same_bits(got, rms_norm(x.float(), weight.float(), 1e-5).bfloat16())


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("rows_of_shift", [1, 6])
def test_modulate_then_norm(eps: float, rows_of_shift: int) -> None:
    x, weight = normal(6, 40, scale=0.1), normal(40, seed=1)
    shift, scale = normal(rows_of_shift, 40, seed=2), normal(rows_of_shift, 40, seed=3)
    got = adaln(x, weight, eps, shift, scale, modulate_first=True)
    want = true_norm(x.double() * (1 + scale.double()) + shift.double(), weight, eps)
    assert_relative_rms(got, want, 1e-6)


@pytest.mark.parametrize("eps", EPSILONS)
def test_norm_then_modulate(eps: float) -> None:
    x, weight = normal(6, 40, scale=0.1), normal(40, seed=1)
    shift, scale = normal(6, 40, seed=2), normal(6, 40, seed=3)
    got = adaln(x, weight, eps, shift, scale, modulate_first=False)
    want = true_norm(x, weight, eps) * (1 + scale.double()) + shift.double()
    assert_relative_rms(got, want, 1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_no_modulation_is_the_plain_norm(first: bool) -> None:
    x, weight, zero = normal(6, 40), normal(40, seed=1), torch.zeros(1, 40)
    assert_same_bits(adaln(x, weight, 1e-5, zero, zero, first), rms_norm(x, weight, 1e-5))


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("eps", EPSILONS)
def test_the_gate_comes_before_the_group_norm(groups: int, eps: float) -> None:
    y, z, weight = normal(6, 48, scale=0.1), normal(6, 48, seed=1), normal(48, seed=2)
    gated = y.double() * z.double() * torch.sigmoid(z.double())
    parts = [
        true_norm(part, torch.ones(48 // groups), eps) for part in gated.split(48 // groups, -1)
    ]
    want = torch.cat(parts, dim=-1) * weight.double()
    assert_relative_rms(gated_group_norm(y, z, weight, groups, eps), want, 1e-6)


def test_the_group_norm_has_the_dtype_of_the_gate() -> None:
    got = gated_group_norm(normal(3, 8), normal(3, 8, seed=1).bfloat16(), normal(8), 2, 1e-5)
    assert got.dtype == torch.bfloat16


@pytest.mark.parametrize("width", [40, 72, 1031])
def test_rows_are_independent(width: int) -> None:
    weight, shift, scale = (normal(width, seed=seed) for seed in (1, 2, 3))
    rows = normal(40, width)
    assert_rows_are_independent(lambda x: rms_norm(x, weight, 1e-5), rows)
    for first in (False, True):

        def modulated(x: Tensor, first: bool = first) -> Tensor:
            return adaln(x, weight, 1e-5, shift[None], scale[None], first)

        assert_rows_are_independent(modulated, rows)


@pytest.mark.parametrize("groups", [1, 3])
def test_rows_of_the_group_norm_are_independent(groups: int) -> None:
    weight = normal(66, seed=1)
    assert_rows_are_independent(
        lambda x: gated_group_norm(x[:, :66], x[:, 66:], weight, groups, 1e-5), normal(40, 132)
    )


def test_strided_inputs() -> None:
    weight, wide = normal(20, seed=1), normal(6, 60)
    for strided in (wide[:, 5:25], wide[:, ::3], normal(20, 6).T):
        assert_relative_rms(rms_norm(strided, weight, 1e-5), true_norm(strided, weight, 1e-5), 1e-6)
        plain = strided.contiguous()
        got = gated_group_norm(strided, strided, weight, 2, 1e-5)
        assert_relative_rms(got, gated_group_norm(plain, plain, weight, 2, 1e-5), 1e-6)


def test_columns_of_a_wider_product_have_the_bits_of_a_copy() -> None:
    """The gate is a slice of the Mamba projection."""
    weight, wide, y = normal(20, seed=1), normal(6, 60), normal(6, 20, seed=2)
    got = gated_group_norm(y, wide[:, :20], weight, 2, 1e-5)
    assert_same_bits(got, gated_group_norm(y, wide[:, :20].contiguous(), weight, 2, 1e-5))

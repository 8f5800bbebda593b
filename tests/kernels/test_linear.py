"""Matrix products: against fp64, and with bits that do not depend on the other rows.

Each with the products of every kind of processor that this one can stand in for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.linear import linear, linear_tiled, pack
from twotower.kernels.products import Products

pytestmark = pytest.mark.usefixtures("each_products")

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]
SHAPES = [(1, 7, 3), (2, 56, 24), (5, 40, 129), (17, 131, 64), (33, 1000, 10)]


@pytest.mark.parametrize("operator", [linear, linear_tiled])
@pytest.mark.parametrize(("rows", "width", "out"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_it_is_the_product(
    operator: Linear, rows: int, width: int, out: int, with_bias: bool
) -> None:
    x, weight = normal(rows, width), normal(out, width, seed=1)
    bias = normal(out, seed=2) if with_bias else None
    want = torch.einsum("tk,nk->tn", x.double(), weight.double())
    if bias is not None:
        want = want + bias.double()
    assert_relative_rms(operator(x, weight, bias), want, 1e-6)
    if operator is linear:
        assert_same_bits(linear(x, pack(weight), bias), linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_dtype_stays(dtype: torch.dtype) -> None:
    x, weight = normal(5, 24).to(dtype), normal(8, 24, seed=1).to(dtype)
    got = linear(x, pack(weight))
    assert got.dtype == dtype
    limit = 1e-2 if dtype == torch.bfloat16 else 1e-14
    assert_relative_rms(got, x.double() @ weight.double().T, limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    # oneDNN has another order of summation for a single row that is wider than 1024 on AVX-512.
    ("width", "out"),
    [(56, 40), (7, 3), (515, 33), (1024, 72), (1025, 8), (2048, 1)],
)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_are_independent(dtype: torch.dtype, width: int, out: int, packed: bool) -> None:
    weight = normal(out, width, seed=1).to(dtype)
    held = pack(weight) if packed else weight
    assert_rows_are_independent(lambda x: linear(x, held), normal(40, width).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_the_fallback_are_independent(dtype: torch.dtype) -> None:
    weight = normal(24, 130, seed=1).to(dtype)
    assert_rows_are_independent(lambda x: linear_tiled(x, weight), normal(40, 130).to(dtype))


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bf16_is_summed_in_fp32_and_rounded_once(
    each_products: Products, rows: int, with_bias: bool
) -> None:
    x, weight = normal(rows, 515).bfloat16(), normal(33, 515, seed=1).bfloat16()
    bias = normal(33, seed=2).bfloat16() if with_bias else None
    got = linear(x, pack(weight), bias)
    wide = linear(x.float(), weight.float(), None if bias is None else bias.float())
    # Sums of bf16 would be off by 1e-2.
    assert_relative_rms(got, wide, 2e-3)
    if each_products != "onednn":
        assert_same_bits(got, wide.bfloat16())


def test_the_number_of_threads_does_not_matter() -> None:
    x, weight = normal(19, 700), pack(normal(260, 700, seed=1))
    want = linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        got = linear(x, weight)
    finally:
        torch.set_num_threads(before)
    assert_same_bits(got, want)


@pytest.mark.parametrize("rows", [1, 6])
def test_strided_inputs(rows: int) -> None:
    weight = normal(9, 20, seed=1)
    wide = normal(rows, 60)
    for strided in (wide[:, 5:25], wide[:, ::3], normal(20, rows, seed=3).T):
        assert_same_bits(linear(strided, weight), linear(strided.clone().contiguous(), weight))


@pytest.mark.parametrize("operator", [linear, linear_tiled])
def test_no_rows_give_no_rows(operator: Linear) -> None:
    assert operator(normal(0, 20), normal(9, 20), None).shape == (0, 9)


def test_no_rows_through_a_packed_weight() -> None:
    assert linear(normal(0, 20), pack(normal(9, 20))).shape == (0, 9)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (16, 16), (64, 64), (256, 128), (1000, 30)])
def test_a_packed_weight_owns_its_numbers(shape: tuple[int, int]) -> None:
    """The loader packs from one buffer that it fills again and again."""
    weight = normal(*shape, seed=1)
    x = normal(5, shape[1])
    packed, want = pack(weight), linear(x, weight.clone())
    if packed is weight:
        pytest.skip("this build has no packed layout")
    weight.fill_(float("nan"))
    assert packed.shape == shape
    assert_same_bits(linear(x, packed), want)

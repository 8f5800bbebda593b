"""The three norms against plain loops in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels.norm import Modulation, add_norm, gated_group_norm, rms_norm

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


def modulation(entries: int, width: int = 40, tokens: int = 6) -> Modulation:
    """A table of some entries; the tokens take them in turns, from the last on."""
    index = torch.arange(entries - 1, entries - 1 - tokens, -1) % entries
    return Modulation(normal(entries, 3, width, seed=2), index)


def own_parts(how: Modulation) -> Tensor:
    """Every token's own shift, scale and gate in fp64, [3, T, H]."""
    return torch.stack([how.table[entry] for entry in how.index.tolist()], dim=1).double()


@pytest.mark.parametrize("eps", EPSILONS)
@pytest.mark.parametrize("entries", [1, 4, 6])
@pytest.mark.parametrize("modulate_first", [False, True])
def test_modulation_before_and_after_the_norm(
    eps: float, entries: int, modulate_first: bool
) -> None:
    x, weight, how = normal(6, 40, scale=0.1), normal(40, seed=1), modulation(entries)
    stream, got = add_norm(x, None, None, weight, eps, how, modulate_first)
    shift, scale, _ = own_parts(how)
    if modulate_first:
        want = true_norm(x.double() * (1 + scale) + shift, weight, eps)
    else:
        want = true_norm(x, weight, eps) * (1 + scale) + shift
    assert_relative_rms(got, want, 1e-6)
    assert_same_bits(stream, x)


@pytest.mark.parametrize("first", [False, True])
def test_no_modulation_is_the_plain_norm(first: bool) -> None:
    x, weight = normal(6, 40), normal(40, seed=1)
    zero = Modulation(torch.zeros(1, 3, 40), torch.zeros(6, dtype=torch.int64))
    want = rms_norm(x, weight, 1e-5)
    assert_same_bits(add_norm(x, None, None, weight, 1e-5, zero, first)[1], want)
    assert_same_bits(add_norm(x, None, None, weight, 1e-5, None, first)[1], want)


@pytest.mark.parametrize("gated", [None, 1, 4])
@pytest.mark.parametrize("modulated", [None, 1, 3])
@pytest.mark.parametrize("modulate_first", [False, True])
def test_the_last_mixers_output_joins_the_stream_by_its_gate(
    gated: int | None, modulated: int | None, modulate_first: bool
) -> None:
    """The gate is of the layer that is left, the modulation of the one that is entered."""
    x, delta, weight = normal(6, 40), normal(6, 40, seed=7), normal(40, seed=1)
    before = x.clone(), delta.clone()
    gate = None if gated is None else modulation(gated)
    how = None if modulated is None else modulation(modulated)
    stream, normed = add_norm(x, delta, gate, weight, 1e-5, how, modulate_first)
    weighed = delta.double() if gate is None else own_parts(gate)[2] * delta.double()
    assert_relative_rms(stream, x.double() + weighed, 1e-6)
    again = add_norm(stream, None, None, weight, 1e-5, how, modulate_first)[1]
    assert_same_bits(normed, again)
    assert_same_bits(x, before[0])
    assert_same_bits(delta, before[1])


def test_one_entry_serves_all_tokens_whatever_the_index() -> None:
    x, delta, weight = normal(6, 40), normal(6, 40, seed=7), normal(40, seed=1)
    table = normal(1, 3, 40, seed=2)
    one = Modulation(table, torch.zeros(1, dtype=torch.int64))
    many = Modulation(table.repeat(6, 1, 1), torch.arange(6))
    for got, want in zip(
        add_norm(x, delta, one, weight, 1e-5, one, True),
        add_norm(x, delta, many, weight, 1e-5, many, True),
        strict=True,
    ):
        assert_same_bits(got, want)


def test_the_stream_and_the_norm_keep_bf16() -> None:
    x, delta = normal(6, 40).bfloat16(), normal(6, 40, seed=7).bfloat16()
    weight, table = normal(40, seed=1).bfloat16(), normal(2, 3, 40, seed=2)
    how = Modulation(table.bfloat16(), torch.arange(6) % 2)
    wide = Modulation(how.table.float(), how.index)
    got = add_norm(x, delta, how, weight, 1e-5, how, True)
    want = add_norm(x.float(), delta.float(), wide, weight.float(), 1e-5, wide, True)
    for own, exact in zip(got, want, strict=True):
        assert own.dtype == torch.bfloat16
        assert_relative_rms(own, exact, 1e-2)


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
    weight, rows, tables = normal(width, seed=1), normal(40, width), normal(3, 3, width, seed=2)
    assert_rows_are_independent(lambda x: rms_norm(x, weight, 1e-5), rows)
    # Each row with its delta and its entry of the table behind it.
    entries = (torch.arange(40.0) % 3).unsqueeze(1)
    whole = torch.cat((rows, normal(40, width, seed=7), entries), dim=1)
    for first in (False, True):

        def modulated(x: Tensor, first: bool = first) -> Tensor:
            how = Modulation(tables, x[:, -1].long())
            hidden, delta = x[:, :width], x[:, width:-1]
            return torch.cat(add_norm(hidden, delta, how, weight, 1e-5, how, first), dim=1)

        assert_rows_are_independent(modulated, whole)


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

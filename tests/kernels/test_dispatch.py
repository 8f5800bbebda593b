"""The choice between a reference and its Triton kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.dispatch import Operator, force

NAMES = [
    "linear",
    "rms_norm",
    "adaln",
    "gated_group_norm",
    "causal_conv1d",
    "chunk_scan",
    "replay",
    "attention",
    "route",
    "experts",
    "mlp",
    "predict",
]


def plus_one(x: Tensor) -> Tensor:
    return x + 1


def plus_two(x: Tensor) -> Tensor:
    return x + 2


def test_every_operator_is_here_under_its_references_name() -> None:
    for name in NAMES:
        operator = getattr(dispatch, name)
        assert isinstance(operator, Operator)
        assert operator.reference.__name__ == name
    found = [name for name in vars(dispatch) if isinstance(getattr(dispatch, name), Operator)]
    assert sorted(found) == sorted(NAMES)


def test_a_cpu_tensor_takes_the_reference() -> None:
    assert Operator(plus_one, plus_two)(torch.zeros(1)).tolist() == [1.0]


def test_force_takes_either_and_ends_with_its_block() -> None:
    operator = Operator(plus_one, plus_two)
    zero = torch.zeros(1)
    with force("triton"):
        assert operator(zero).tolist() == [2.0]
        with force("reference"):
            assert operator(zero).tolist() == [1.0]
        assert operator(zero).tolist() == [2.0]
    assert operator(zero).tolist() == [1.0]


def test_force_ends_after_an_error_too() -> None:
    operator = Operator(plus_one)
    with pytest.raises(ValueError, match="plus_one: has no Triton kernel"), force("triton"):
        operator(torch.zeros(1))
    assert operator(torch.zeros(1)).tolist() == [1.0]


def test_keyword_arguments_pass_through() -> None:
    got = dispatch.rms_norm(torch.ones(1, 4), weight=torch.ones(4), eps=0.0)
    assert got.tolist() == [[1.0] * 4]

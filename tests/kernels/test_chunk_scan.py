"""The chunked scan against the recurrence in fp64: short, odd and seeded blocks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from twotower.kernels import chunk_scan as module
from twotower.kernels.chunk_scan import chunk_scan, chunk_scan_recurrent

LENGTHS = [1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 65, 100]


@dataclass
class Inputs:
    """x, dt, a_log, b, c, d, state: in the order of the operator."""

    x: Tensor
    dt: Tensor
    a_log: Tensor
    b: Tensor
    c: Tensor
    d: Tensor
    state: Tensor

    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.x, self.dt, self.a_log, self.b, self.c, self.d, self.state


def make(
    length: int, rows: int = 2, heads: int = 6, groups: int = 2, state_scale: float = 1.0
) -> Inputs:
    width, n = 5, 7
    return Inputs(
        normal(rows, length, heads, width),
        normal(rows, length, heads, seed=1).abs() * 0.3,
        normal(heads, seed=2) * 0.5,
        normal(rows, length, groups, n, seed=3),
        normal(rows, length, groups, n, seed=4),
        normal(heads, seed=5),
        normal(rows, heads, width, n, seed=6) * state_scale,
    )


def recurrence(inputs: Inputs) -> Tensor:
    """Head by head, token by token, in fp64."""
    x, dt, a_log, b, c, d, state = (part.double() for part in inputs.all())
    per_group = x.shape[2] // b.shape[2]
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for head in range(x.shape[2]):
            group = head // per_group
            held = state[row, head].clone()
            for t in range(x.shape[1]):
                step = dt[row, t, head]
                held = held * torch.exp(-step * torch.exp(a_log[head]))
                held = held + step * torch.outer(x[row, t, head], b[row, t, group])
                y[row, t, head] = held @ c[row, t, group] + d[head] * x[row, t, head]
    return y


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("state_scale", [0.0, 1.0, 1e3])
def test_values(length: int, state_scale: float) -> None:
    inputs = make(length, state_scale=state_scale)
    want = recurrence(inputs)
    assert_relative_rms(chunk_scan(*inputs.all()), want, 2e-6)
    doubles = [part.double() for part in inputs.all()]
    assert_relative_rms(chunk_scan_recurrent(*doubles), want, 1e-13)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 1), (4, 4), (6, 3)])
def test_heads_share_groups_in_order(heads: int, groups: int) -> None:
    inputs = make(19, heads=heads, groups=groups)
    assert_relative_rms(chunk_scan(*inputs.all()), recurrence(inputs), 2e-6)


@pytest.mark.parametrize("chunk", [1, 7, 16, 128])
def test_the_chunk_size_does_not_matter(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(45, state_scale=1e3)
    monkeypatch.setattr(module, "_CHUNK", chunk)
    assert_relative_rms(chunk_scan(*inputs.all()), recurrence(inputs), 2e-6)


@pytest.mark.parametrize("length", [5, 70])
def test_the_state_is_only_read(length: int) -> None:
    inputs = make(length)
    before = [part.clone() for part in inputs.all()]
    chunk_scan(*inputs.all())
    for part, old in zip(inputs.all(), before, strict=True):
        assert_same_bits(part, old)


def test_steps_that_forget_everything_stay_finite() -> None:
    inputs = make(40, state_scale=1e3)
    inputs.dt = inputs.dt * 1e3
    got = chunk_scan(*inputs.all())
    assert bool(torch.isfinite(got).all())
    assert_relative_rms(got, recurrence(inputs), 5e-5)


@pytest.mark.parametrize("length", [1, 16, 40])
def test_rows_are_independent(length: int) -> None:
    inputs = make(length, rows=40, heads=3, groups=3)
    numbers = torch.arange(40.0)

    def scan(rows: Tensor) -> Tensor:
        own = rows.long()
        return chunk_scan(
            inputs.x[own],
            inputs.dt[own],
            inputs.a_log,
            inputs.b[own],
            inputs.c[own],
            inputs.d,
            inputs.state[own],
        )

    assert_rows_are_independent(scan, numbers)


def test_strided_inputs() -> None:
    rows, length, heads, width, n = 2, 9, 4, 5, 7
    packed = normal(rows, length, heads * width + 2 * 2 * n)
    x, b, c = packed.split((heads * width, 2 * n, 2 * n), dim=-1)
    views = x.unflatten(-1, (heads, width)), b.unflatten(-1, (2, n)), c.unflatten(-1, (2, n))
    dt = normal(heads, length, rows, seed=1).abs().permute(2, 1, 0)
    a_log, d = normal(heads, seed=2), normal(heads, seed=3)
    state = normal(rows, heads, n, width, seed=4).transpose(2, 3)
    got = chunk_scan(views[0], dt, a_log, views[1], views[2], d, state)
    want = chunk_scan(
        views[0].contiguous(),
        dt.contiguous(),
        a_log,
        views[1].contiguous(),
        views[2].contiguous(),
        d,
        state.contiguous(),
    )
    assert_same_bits(got, want)

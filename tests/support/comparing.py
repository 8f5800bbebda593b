"""Comparisons that say by how much something is off."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

BATCH_SIZES = range(1, 41)


def assert_relative_rms(got: Tensor, want: Tensor, limit: float) -> None:
    """The error's root mean square, over that of what is wanted, is at most `limit`."""
    assert got.shape == want.shape, f"shape {list(got.shape)}, expected {list(want.shape)}"
    error = (got.double() - want.double()).square().mean().sqrt()
    size = want.double().square().mean().sqrt().clamp_min(1e-30)
    assert float(error / size) <= limit, f"relative RMS {float(error / size):.2e}, limit {limit:g}"


def assert_same_bits(got: Tensor, want: Tensor, what: object = "") -> None:
    """Equal elements; two NaN are equal here."""
    assert got.shape == want.shape, f"{what}: shape {list(got.shape)} and {list(want.shape)}"
    differing = (got != want) & ~(got.isnan() & want.isnan())
    assert not bool(differing.any()), f"{what}: {int(differing.sum())} of {got.numel()} differ"


def assert_rows_are_independent(
    operator: Callable[[Tensor], Tensor], rows: Tensor, sizes: Iterable[int] = BATCH_SIZES
) -> None:
    """`operator` gives row i [i, ...] of `rows` the same bits in any batch, at any place."""
    whole = operator(rows)
    for size in sizes:
        assert_same_bits(operator(rows[:size]), whole[:size], f"the first {size} rows")
        assert_same_bits(operator(rows[-size:]), whole[-size:], f"the last {size} rows")
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))
    assert_same_bits(operator(rows[order]), whole[order], "shuffled rows")


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal fp32 numbers that depend on shape and seed only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale

"""Ceilings of decoding speed from pass times."""

from __future__ import annotations

from functools import cache

import pytest

from tests.planner.test_floors import floor_ms
from twotower.planner.schedules import shuffled_rows
from twotower.planner.speedup import (
    PassSeconds,
    best_tokens_per_s,
    in_step_tokens_per_s,
    tokens_per_s,
)

FIXED = PassSeconds(lambda _: 1.0, lambda _: 2.0)


def test_one_row_alone_takes_its_steps_and_an_extension() -> None:
    assert tokens_per_s([[(4, 4, 4, 4)]], FIXED, 0.0) == pytest.approx(16 / (4 + 2))
    # Blocks of 1 and 3 steps by turns.
    assert tokens_per_s([[(16,), (8, 4, 4)]], FIXED, 0.0) == pytest.approx(32 / (4 + 4))


@pytest.mark.parametrize("patience", [0.0, 0.5, 1.0])
def test_rows_in_step_are_what_the_formula_says(patience: float) -> None:
    rows = [[(16,), (8, 4, 4)]] * 6
    expected = in_step_tokens_per_s(6, 16, 2.0, 1.0, 2.0)
    assert tokens_per_s(rows, FIXED, patience) == pytest.approx(expected)


def test_the_best_patience_is_found() -> None:
    rows = shuffled_rows("headline", 8, 0, in_step=False)
    by_patience = [tokens_per_s(rows, FIXED, patience) for patience in (0.0, 0.5, 1.0)]
    assert best_tokens_per_s(rows, FIXED) >= max(by_patience)
    # Passes cost the same whatever their rows, so waiting for all wastes most.
    assert max(by_patience) > by_patience[0]


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(1, 0.73), (16, 1.37), (32, 1.78), (48, 1.88), (64, 1.87), (96, 1.75), (128, 1.63)],
)
def test_the_released_model_over_its_own_ar(rows: int, expected: float) -> None:
    denoise = floor_ms("denoise", rows, masked=0.6)
    speed = in_step_tokens_per_s(rows, 16, 5.6, denoise, floor_ms("extend", rows))
    assert speed / (rows / floor_ms("ar", rows)) == pytest.approx(expected, rel=0.01)


def test_rows_out_of_step_on_one_device() -> None:
    """Sixty-four rows of the released model: 7.6 thousand tokens/s in step, 6.1 if an extension
    waits for half the rows, 5.1 if it waits for none."""

    @cache
    def denoise(rows: int) -> float:
        return floor_ms("denoise", rows, masked=0.6) / 1e3

    @cache
    def extend(rows: int) -> float:
        return floor_ms("extend", rows) / 1e3

    seconds = PassSeconds(denoise, extend)
    rows = shuffled_rows("headline", 64, 0, in_step=False)
    in_step = in_step_tokens_per_s(64, 16, 5.6, denoise(64), extend(64))
    assert in_step == pytest.approx(7600, rel=0.02)
    assert tokens_per_s(rows, seconds, 0.0) == pytest.approx(5100, rel=0.06)
    assert tokens_per_s(rows, seconds, 0.5) == pytest.approx(6100, rel=0.06)

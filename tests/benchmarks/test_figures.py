"""Statistics against hand-counted values."""

from __future__ import annotations

import random

import pytest

from benchmarks.figures import median, percentile


def test_median_of_an_even_count_is_between_its_middle_two() -> None:
    assert median([4.0, 1.0, 3.0, 2.0]) == 2.5


def test_percentiles_of_the_first_hundred_numbers() -> None:
    values = list(range(1, 101))
    random.Random(0).shuffle(values)
    assert [percentile(values, percent) for percent in (1, 50, 99, 99.5, 100)] == [
        1,
        50,
        99,
        100,
        100,
    ]


def test_a_single_value_is_every_percentile() -> None:
    assert percentile([7.0], 1) == percentile([7.0], 99) == 7.0


@pytest.mark.parametrize(("values", "percent"), [([], 50), ([1.0], 0), ([1.0], 101)])
def test_no_percentile_without_values_or_outside_its_range(
    values: list[float], percent: float
) -> None:
    with pytest.raises(ValueError, match=f"got {percent} of {len(values)} values"):
        percentile(values, percent)

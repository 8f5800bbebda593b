"""Numbers within limits; test_params has what each field of a request does with them."""

from __future__ import annotations

import math
import re

import pytest

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_real, check_whole, is_real


@pytest.mark.parametrize("value", [-5, 6, 2**70, True, 1.0, "1", None, math.nan])
def test_what_is_no_whole_number_within_its_limits(value: object) -> None:
    said = re.escape(f"n: got {value!r}, expected a whole number of at least -4, at most 5")
    with pytest.raises(InvalidRequestError, match=f"^{said}$"):
        check_whole("n", value, -4, 5)


@pytest.mark.parametrize("value", [-0.5, 1.5, math.nan, math.inf, True, "1", None, 10**400])
def test_what_is_no_real_number_within_its_limits(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^n: got .*, expected a finite number in \[0, "):
        check_real("n", value, 0.0, 1.0)
    with pytest.raises(InvalidRequestError, match=r"^n: got 0, .* number in \(0, inf\]$"):
        check_real("n", 0, 0.0, open_below=True)


def test_what_is_within() -> None:
    for whole in (-4, 0, 5):
        check_whole("n", whole, -4, 5)
    check_whole("n", 2**70, 0)
    for real in (0, 0.0, 0.5, 1):
        check_real("n", real, 0.0, 1.0)
    check_real("n", 1e300, 0.0)


def test_a_number_of_any_kind() -> None:
    assert all(map(is_real, (0, -1.5, math.nan, -math.inf, 10**400)))
    assert not any(map(is_real, (True, "1", b"1", None, 1j, [1.0])))

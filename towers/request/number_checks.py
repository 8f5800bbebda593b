"""Numbers of a request within their limits; errors name the field, the value and the limit."""

from __future__ import annotations

import math
import sys

from twotower.towers.errors import InvalidRequestError


def check_whole(field: str, value: object, low: int, high: int | None = None) -> None:
    """Raises InvalidRequestError unless the value is a whole number in [low, high], not a bool."""
    limit = f"a whole number of at least {low}" + ("" if high is None else f", at most {high}")
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequestError(field, value, limit)
    if value < low or (high is not None and value > high):
        raise InvalidRequestError(field, value, limit)


def check_real(
    field: str, value: object, low: float, high: float = math.inf, open_below: bool = False
) -> None:
    """Raises InvalidRequestError unless the value is a finite number in [low, high], or in
    (low, high] if `open_below`."""
    bracket = "(" if open_below else "["
    limit = f"a finite number in {bracket}{low:g}, {high:g}]"
    if not is_real(value):
        raise InvalidRequestError(field, value, limit)
    largest = min(high, sys.float_info.max)  # a NaN and a whole number beyond a float fail too
    if not low <= value <= largest or (open_below and value == low):  # type: ignore[operator]
        raise InvalidRequestError(field, value, limit)


def is_real(value: object) -> bool:
    """True for a number, also NaN and infinity; False for a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool)

"""The axes of a map of placements, as they are written on a command line."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from twotower.towers.errors import ConfigError

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_STEP = 0.5
TOKENS = tuple(1 + _STEP * place for place in range(15))
# More of them would take hours.
_MOST = 1000
_Number = TypeVar("_Number", int, float)


def batches_named(text: str) -> tuple[int, ...]:
    """Rows from "1,4,16" or "1,2,4,...,256", where `...` goes on by doubling to the number behind
    it. Raises ConfigError for other text."""
    found: list[int] = []
    parts = [part.strip() for part in text.split(",")]
    for place, part in enumerate(parts):
        if part != "...":
            found.append(_number("batches", part, text, int))
            continue
        if not found or found[-1] < 1 or place + 1 == len(parts):
            raise ConfigError(f"batches: got {text!r}, expected a number before and behind ...")
        last = _number("batches", parts[place + 1], text, int)
        while 2 * found[-1] < last:
            found.append(2 * found[-1])
    return tuple(found)


def tokens_named(text: str) -> tuple[float, ...]:
    """Tokens per pass from "1..8", in steps of a half, or from "1,1.5,3". Raises ConfigError for
    other text."""
    if ".." not in text:
        name = "tokens_per_pass"
        return tuple(_number(name, part.strip(), text, float) for part in text.split(","))
    low, high = (
        _number("tokens_per_pass", part.strip(), text, float) for part in text.split("..", 1)
    )
    count = int((high - low) / _STEP + 1e-9) + 1 if abs(high - low) < _MOST else 0
    inner = [low + _STEP * place for place in range(count)]
    return tuple(inner) if inner and inner[-1] == high else (*inner, high)


def _number(name: str, part: str, text: str, kind: Callable[[str], _Number]) -> _Number:
    try:
        return kind(part)
    except ValueError:
        raise ConfigError(f"{name}: got {part!r} in {text!r}, expected a number") from None

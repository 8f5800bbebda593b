"""What a message of the service can carry, checked before one is made: errors name the field.

Protobuf's own errors name the value alone, and not even that for a text. Which values make sense is
the service's to say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from twotower.towers.errors import InvalidRequestError
from twotower.towers.params import check_text

_BITS = {FieldDescriptor.TYPE_INT32: 32, FieldDescriptor.TYPE_INT64: 64}
_LONGEST_S = 1e9


def checked_scalars(message: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the values that are not None; `message` is the descriptor that has the fields.

    Raises InvalidRequestError for one that the field cannot hold.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return {name: _checked(message.fields_by_name[name], value) for name, value in given.items()}


def checked_text(field: str, value: object) -> str:
    """A text that can be sent. Raises InvalidRequestError."""
    if not isinstance(value, str):
        raise InvalidRequestError(field, value, "a text")
    check_text(field, value)
    return value


def checked_ids(field: str, value: object, expected: str = "a list of token ids") -> Sequence[int]:
    """Token ids that can be sent. Raises InvalidRequestError, naming the first that cannot."""
    if isinstance(value, str | bytes) or not _is_sequence(value):
        raise InvalidRequestError(field, value, expected)
    ids: list[Any] = list(value)  # type: ignore[call-overload]
    if not ids or (set(map(type, ids)) == {int} and _fits(min(ids), 32) and _fits(max(ids), 32)):
        return ids
    return [_whole(f"{field}[{index}]", one, 32) for index, one in enumerate(ids)]


def checked_seconds(field: str, value: float | None) -> float | None:
    """A time limit; None and infinity are none. Raises InvalidRequestError."""
    if value is None:
        return None
    number = _real(field, value)
    if not number >= 0:
        raise InvalidRequestError(field, value, "a number of seconds, at least 0")
    # gRPC keeps a deadline as 64 bits of nanoseconds.
    return number if number < _LONGEST_S else None


def _checked(field: FieldDescriptor, value: Any) -> Any:
    if field.type in _BITS:
        return _whole(field.name, value, _BITS[field.type])
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return _real(field.name, value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if value not in (False, True):
            raise InvalidRequestError(field.name, value, "true or false")
        return bool(value)
    return checked_text(field.name, value)


def _whole(field: str, value: Any, bits: int) -> int:
    limit = f"a whole number in [{-(1 << bits - 1)}, {(1 << bits - 1) - 1}]"
    try:
        # As range() takes it, numpy's whole numbers included; a bool is none.
        number = int(value.__index__())
    except (AttributeError, TypeError):
        raise InvalidRequestError(field, value, limit) from None
    if isinstance(value, bool) or not _fits(number, bits):
        raise InvalidRequestError(field, value, limit)
    return number


def _real(field: str, value: Any) -> float:
    try:
        if isinstance(value, bool | str | bytes):
            raise TypeError
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRequestError(field, value, "a number that a double can hold") from None


def _fits(number: int, bits: int) -> bool:
    return -(1 << bits - 1) <= number < 1 << bits - 1


def _is_sequence(value: object) -> bool:
    # Arrays have both without being a Sequence.
    return hasattr(value, "__len__") and hasattr(value, "__getitem__")

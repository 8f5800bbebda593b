"""Checks that a protobuf message can hold the values given: errors name the field.

Protobuf's errors name the value only, and not even that for a text. The ranges of parameters are
checked by the service.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request import logit_bias
from twotower.towers.request.number_checks import check_whole, is_real
from twotower.towers.request.token_ids import IDS, check_ids, check_text, id_row, plain_number

_BITS = {FieldDescriptor.TYPE_INT32: 32, FieldDescriptor.TYPE_INT64: 64}
_ID_VALUES = 2**31
_LONGEST_S = 1e9


def checked_scalars(message: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that are not None; `message` is the descriptor of their fields.

    Raises InvalidRequestError for a value that its field cannot hold.
    """
    given = {name: value for name, value in values.items() if value is not None}
    return {name: _checked(message.fields_by_name[name], value) for name, value in given.items()}


def checked_text(field: str, value: object) -> str:
    """A text that can be sent. Raises InvalidRequestError."""
    if not isinstance(value, str):
        raise InvalidRequestError(field, value, "a text")
    check_text(field, value)
    return value


def checked_ids(field: str, value: object, limit: str = IDS) -> list[int]:
    """Token ids that can be sent, from a list, an array or a tensor [n] or [1, n].

    Whether the model has them is checked by the service. Raises InvalidRequestError, with `limit`
    for anything but ids.
    """
    ids = id_row(field, value, limit)
    check_ids(field, ids, _ID_VALUES)
    return ids


def checked_bias(value: object) -> dict[int, float]:
    """Biases by token id, from a mapping or pairs. Raises InvalidRequestError, also for what every
    service refuses: the message could not say which pair it was."""
    return dict(logit_bias.checked_bias(value))


def checked_seconds(field: str, value: float | None) -> float | None:
    """A time limit; None and infinity are none. Raises InvalidRequestError."""
    if value is None:
        return None
    number = _real(field, plain_number(value))
    if not number >= 0:
        raise InvalidRequestError(field, plain_number(value), "a number of seconds, at least 0")
    # gRPC keeps a deadline as 64 bits of nanoseconds.
    return number if number < _LONGEST_S else None


def _checked(field: FieldDescriptor, given: Any) -> Any:
    value: Any = plain_number(given)
    if field.type in _BITS:
        most = 1 << _BITS[field.type] - 1
        check_whole(field.name, value, -most, most - 1)
        return value
    if field.type == FieldDescriptor.TYPE_DOUBLE:
        return _real(field.name, value)
    if field.type == FieldDescriptor.TYPE_BOOL:
        if not isinstance(value, bool):
            raise InvalidRequestError(field.name, value, "True or False")
        return value
    return checked_text(field.name, value)


def _real(field: str, value: Any) -> float:
    try:
        if is_real(value):
            return float(value)
    except OverflowError:
        pass
    raise InvalidRequestError(field, value, "a number that a double can hold")

"""Biases of tokens: read from a mapping or from pairs, checked, and kept by token id."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.number_checks import check_real, check_whole
from twotower.towers.request.token_ids import plain_number

MAX_LOGIT_BIAS = 1024
MAX_BIAS = 100.0
# Above every vocabulary: an id that is shown in the name of a field is short.
_MAX_ID = 2**31 - 1
_FORM = "a mapping of token ids to numbers, or pairs of these"
LogitBias = tuple[tuple[int, float], ...]


def checked_bias(value: object) -> LogitBias:
    """Pairs of token id and bias, ids ascending. Raises InvalidRequestError."""
    pairs = sorted(_pair(item) for item in _items(value))
    for (token, _), (following, _) in pairwise(pairs):
        if token == following:
            raise InvalidRequestError(f"logit_bias[{token}]", "two biases", "one for a token")
    return tuple(pairs)


def biased_within(bias: LogitBias, vocab_size: int) -> None:
    """Raises InvalidRequestError for a token that the model does not have."""
    if bias and bias[-1][0] >= vocab_size:
        token = next(token for token, _ in bias if token >= vocab_size)
        raise InvalidRequestError(f"logit_bias[{token}]", token, f"a token id below {vocab_size}")


def _items(value: object) -> Sequence[object]:
    items = list(value.items()) if isinstance(value, Mapping) else _sequence(value)
    if len(items) > MAX_LOGIT_BIAS:
        limit = f"at most {MAX_LOGIT_BIAS} tokens"
        raise InvalidRequestError("logit_bias", f"{len(items)} tokens", limit)
    return items


def _pair(item: object) -> tuple[int, float]:
    pair = _sequence(item)
    if len(pair) != 2:
        raise InvalidRequestError("logit_bias", item, _FORM)
    token, bias = (cast("Any", plain_number(part)) for part in pair)
    check_whole("logit_bias", token, 0, _MAX_ID)
    check_real(f"logit_bias[{token}]", bias, -MAX_BIAS, MAX_BIAS)
    return int(token), float(bias)


def _sequence(value: object) -> Sequence[object]:
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise InvalidRequestError("logit_bias", value, _FORM)
    return value

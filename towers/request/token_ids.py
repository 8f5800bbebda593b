"""Token ids, numbers and texts as callers have them: Python's, numpy's or torch's, one or several.

Needs neither library: arrays and tensors are told by their shape.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol, SupportsIndex

from twotower.towers.errors import InvalidRequestError


class Array(Protocol):
    """A numpy array or a tensor, on any device."""

    @property
    def shape(self) -> Any:
        """Its sizes."""

    def tolist(self) -> Any:
        """Its values as Python has them, in nested lists."""


TokenIds = Sequence[SupportsIndex] | Array
Prompt = str | TokenIds
# Iterable, but not in an order that is their ids', or not of ids at all.
_NO_ROWS = (str, bytes, bytearray, Mapping, Set)
IDS = "a list or array of token ids"
PROMPT = f"a text, or {IDS}"


def plain_number(value: object) -> object:
    """A number of numpy or a tensor without dimensions as Python's; else the value itself."""
    return value.tolist() if _is_array(value) and not _shape(value) else value  # type: ignore[attr-defined]


def id_row(field: str, value: object, limit: str = IDS) -> list[int]:
    """One row of ids: any sequence of numbers, or an array [n] or [1, n].

    What the numbers are is checked later. Raises InvalidRequestError for anything else, with the
    `limit`: PROMPT where a text would do too.
    """
    if _is_array(value):
        return _array_row(field, value)
    if isinstance(value, _NO_ROWS) or not isinstance(value, Iterable):
        raise InvalidRequestError(field, value, limit)
    return [plain_number(token) for token in value]  # type: ignore[misc]  # checked against limits


def prompt_rows(prompts: object) -> list[Any]:
    """Several prompts: any sequence of them, or an array [B, n] of ids.

    Raises InvalidRequestError for anything else, a single prompt among it.
    """
    limit = "a list of prompts, or an array of ids [B, n]"
    if _is_array(prompts):
        rows = prompts.tolist()  # type: ignore[attr-defined]
        texts = len(_shape(prompts)) == 1 and all(isinstance(row, str) for row in rows)
        if texts or len(_shape(prompts)) == 2:
            return list(rows)
        raise InvalidRequestError("prompts", _described(prompts), limit)
    if isinstance(prompts, Mapping):
        limit += " (of a tokenizer's output its input_ids)"
    if isinstance(prompts, _NO_ROWS) or not isinstance(prompts, Iterable):
        raise InvalidRequestError("prompts", prompts, limit)
    return list(prompts)


def text_list(field: str, value: object) -> Sequence[Any]:
    """Several texts; what each of them is is checked later.

    Raises InvalidRequestError for what is no list. A text is a sequence of texts too, but nobody
    means its letters.
    """
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise InvalidRequestError(field, value, "a list of strings")
    return value


def check_ids(field: str, ids: Sequence[object], vocab_size: int) -> None:
    """Raises InvalidRequestError for the first that is no id of the vocabulary."""
    # A prompt may have a hundred thousand ids: those that are all right are told at once.
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:  # type: ignore[type-var, operator]
        return
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field}[{index}]", token, f"an id in 0..{vocab_size - 1}")


def check_text(field: str, text: str) -> None:
    """Raises InvalidRequestError for what is no Unicode text: neither a tokenizer nor the wire
    takes half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        limit = "text that can be encoded in UTF-8, without lone surrogates"
        raise InvalidRequestError(f"{field}[{error.start}]", text[error.start], limit) from None


def _array_row(field: str, array: Any) -> list[int]:
    shape = _shape(array)
    if len(shape) == 1:
        return list(array.tolist())
    if len(shape) == 2 and shape[0] == 1:
        return list(array.tolist()[0])
    raise InvalidRequestError(field, _described(array), "ids of shape [n] or [1, n]")


def _is_array(value: object) -> bool:
    return hasattr(value, "shape") and hasattr(value, "tolist")


def _shape(array: Any) -> tuple[int, ...]:
    return tuple(array.shape)


def _described(array: Any) -> str:
    return f"an array of shape {list(_shape(array))}"

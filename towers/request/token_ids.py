"""Reads token ids, numbers and texts that callers give as Python lists, numpy arrays or tensors.

Imports neither numpy nor torch: arrays and tensors are recognised by their attributes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, Protocol, SupportsIndex

from twotower.towers.errors import InvalidRequestError


class Array(Protocol):
    """A numpy array or a tensor, on any device."""

    @property
    def shape(self) -> Any:
        """The size of each dimension."""

    def tolist(self) -> Any:
        """The values as nested lists of Python numbers."""


TokenIds = Sequence[SupportsIndex] | Array
Prompt = str | TokenIds
# Iterable, but not sequences of ids.
_NO_ROWS = (str, bytes, bytearray, Mapping, Set)
IDS = "a list or array of token ids"
PROMPT = f"a text, or {IDS}"


def plain_number(value: object) -> object:
    """A number of numpy or a tensor without dimensions as Python's; else the value itself."""
    return value.tolist() if _is_array(value) and not _shape(value) else value  # type: ignore[attr-defined]


def id_row(field: str, value: object, limit: str = IDS) -> list[int]:
    """One row of ids: any sequence of numbers, or an array [n] or [1, n].

    The numbers are not checked yet. Raises InvalidRequestError for anything else, with the
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
    """A list of texts, whose elements are not checked yet.

    Raises InvalidRequestError for what is no list, and for a single text, although it is a
    sequence of its letters.
    """
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence):
        raise InvalidRequestError(field, value, "a list of strings")
    return value


def check_ids(field: str, ids: Sequence[object], vocab_size: int) -> None:
    """Raises InvalidRequestError for the first element that is no id of the vocabulary."""
    # A prompt may have a hundred thousand ids: a valid list is recognised without a Python loop.
    if ids and set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size:  # type: ignore[type-var, operator]
        return
    for index, token in enumerate(ids):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:
            raise InvalidRequestError(f"{field}[{index}]", token, f"an id in 0..{vocab_size - 1}")


def check_text(field: str, text: str) -> None:
    """Raises InvalidRequestError for a text with a lone surrogate, which neither a tokenizer nor
    the wire takes."""
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

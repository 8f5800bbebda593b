"""Ids as lists, arrays and tensors; what is none is named."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.token_ids import (
    PROMPT,
    check_ids,
    check_text,
    id_row,
    plain_number,
    prompt_rows,
    text_list,
)

IDS = [5, 3, 17]
ROWS: list[Any] = [
    IDS,
    tuple(IDS),
    iter(IDS),
    np.array(IDS),
    np.array(IDS, np.uint8),
    np.array([IDS], np.int32),
    np.array(IDS, object),
    [np.int64(5), 3, np.uint8(17)],
    [np.array(5), torch.tensor(3), 17],
    torch.tensor(IDS),
    torch.tensor(IDS, dtype=torch.int16),
    torch.tensor([IDS]),
    list(torch.tensor(IDS)),
    torch.tensor([IDS])[0][:],
    torch.tensor([[5, 0], [3, 0], [17, 0]]).T[:1],
]


@pytest.mark.parametrize("value", ROWS, ids=lambda value: type(value).__name__)
def test_one_row_however_it_comes(value: object) -> None:
    row = id_row("prompt", value)
    assert row == IDS
    assert {type(token) for token in row} == {int}
    check_ids("prompt", row, 18)


@pytest.mark.parametrize("value", [[], (), np.array([], np.int64), torch.zeros(1, 0).long()])
def test_an_empty_row(value: object) -> None:
    assert id_row("prompt", value) == []


@pytest.mark.parametrize(
    "value", [5, None, 2.5, "53", b"53", {5: 3}, {5, 3}, {5: 3}.keys(), object(), np.str_("53")]
)
def test_no_row_at_all(value: object) -> None:
    with pytest.raises(InvalidRequestError, match=r"^prompt: got .*expected "):
        id_row("prompt", value)


@pytest.mark.parametrize("shape", [(), (2, 3), (0, 3), (3, 1), (1, 1, 3)])
def test_other_shapes_are_named(shape: tuple[int, ...]) -> None:
    said = re.escape(
        f"ids: got 'an array of shape {list(shape)}', expected ids of shape [n] or [1, n]"
    )
    for array in (np.zeros(shape, np.int64), torch.zeros(shape).long()):
        with pytest.raises(InvalidRequestError, match=f"^{said}$"):
            id_row("ids", array)


WRONG: list[tuple[Any, int, str]] = [
    ([1, True], 1, "True"),
    ([1, np.bool_(True)], 1, "True"),
    ([1, torch.tensor(True)], 1, "True"),
    (np.array([False, True]), 0, "False"),
    (torch.tensor([True]), 0, "True"),
    ([1.0], 0, "1.0"),
    ([1, np.float32(2)], 1, "2.0"),
    (np.array([1.5, 2.0]), 0, "1.5"),
    (torch.tensor([[1.0, 2.0]]), 0, "1.0"),
    ([3, -1], 1, "-1"),
    (torch.tensor([3, -1]), 1, "-1"),
    (np.array([3, 18]), 1, "18"),
    ([np.int64(18)], 0, "18"),
    ([2**70], 0, str(2**70)),
    (np.array([2**64 - 1], np.uint64), 0, str(2**64 - 1)),
    (["a"], 0, "'a'"),
    ([None], 0, "None"),
    ([[5, 3]], 0, "[5, 3]"),
    ([torch.tensor([5])], 0, "tensor([5])"),
]


@pytest.mark.parametrize(("value", "index", "shown"), WRONG, ids=lambda value: type(value).__name__)
def test_the_first_that_is_no_id_is_named(value: object, index: int, shown: str) -> None:
    said = re.escape(f"prompt[{index}]: got {shown}, expected an id in 0..17")
    with pytest.raises(InvalidRequestError, match=f"^{said}$"):
        check_ids("prompt", id_row("prompt", value), 18)


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (np.int64(3), 3),
        (np.uint8(3), 3),
        (np.array(3), 3),
        (torch.tensor(3), 3),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (torch.tensor(0.5), 0.5),
        (np.bool_(True), True),
        (torch.tensor(False), False),
        (3, 3),
        (None, None),
        ("3", "3"),
        ([3], [3]),
    ],
)
def test_numbers_become_pythons(value: object, plain: object) -> None:
    assert plain_number(value) == plain
    assert type(plain_number(value)) is type(plain)


def test_several_prompts() -> None:
    table = [[1, 2], [3, 4]]
    for prompts in (table, tuple(table), iter(table), np.array(table), torch.tensor(table)):
        assert prompt_rows(prompts) == table
    assert prompt_rows(np.array(["a", "b"])) == ["a", "b"]
    assert prompt_rows(["a", IDS]) == ["a", IDS]
    assert prompt_rows(torch.zeros(0, 4).long()) == []
    for wrong in ("text", b"text", None, 5, {"input_ids": table}, {"a", "b"}):
        with pytest.raises(
            InvalidRequestError, match=r"^prompts: got .*expected a list of prompts"
        ):
            prompt_rows(wrong)
    for array in (torch.tensor(IDS), np.array(5), torch.zeros(1, 2, 3), np.array([5])):
        with pytest.raises(InvalidRequestError, match=r"^prompts: got 'an array of shape "):
            prompt_rows(array)
    with pytest.raises(InvalidRequestError, match="its input_ids"):
        prompt_rows({"input_ids": table})


@pytest.mark.parametrize("text", ["\ud800", "ab\udfff", "🌍\udcff!"])
def test_half_of_a_surrogate_pair_is_no_text(text: str) -> None:
    place = next(i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff")
    with pytest.raises(InvalidRequestError) as caught:
        check_text("prompt", text)
    assert str(caught.value) == (
        f"prompt[{place}]: got '\\u{ord(text[place]):x}', "
        "expected text that can be encoded in UTF-8, without lone surrogates"
    )
    str(caught.value).encode()


def test_whole_text_is_text() -> None:
    for text in ("", "größe", "🌍\u200d", "a🙂", "\x00"):
        check_text("prompt", text)


def test_a_list_of_texts() -> None:
    assert list(text_list("stop", ("a", "b"))) == ["a", "b"]
    assert list(text_list("stop", [])) == []
    for wrong in ("ab", b"ab", None, 5, {"a": 1}, {"a"}, iter("ab")):
        with pytest.raises(
            InvalidRequestError, match=r"^stop: got .*, expected a list of strings$"
        ):
            text_list("stop", wrong)


def test_a_field_may_have_a_text_in_place_of_ids() -> None:
    with pytest.raises(InvalidRequestError, match="got 5, expected a text, or a list or array of"):
        id_row("prompt", 5, PROMPT)

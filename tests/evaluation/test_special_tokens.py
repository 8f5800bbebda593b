"""Special tokens around a text are found by asking, with tokenizers written by hand."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from twotower import TwoTower
from twotower.evaluation.special_tokens import Ends, ends_of


class Letters:
    """An id for each character; those below 3 are special."""

    def __init__(self, before: list[int], behind: list[int]) -> None:
        self._before = before
        self._behind = behind

    def encode(self, text: str) -> list[int]:
        return [*self._before, *map(ord, text), *self._behind]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token) for token in token_ids if token >= 3)


@pytest.mark.parametrize(
    ("before", "behind"), [([], []), ([1], []), ([], [2]), ([1, 1], [2]), ([0, 1], [2, 2])]
)
def test_ends_are_found(before: list[int], behind: list[int]) -> None:
    assert ends_of(Letters(before, behind)) == Ends(tuple(before), tuple(behind))


def test_what_has_a_text_is_the_texts_own() -> None:
    # A tokenizer that puts a space before every text, as sentencepiece does.
    assert ends_of(Letters([32], [])) == Ends()


def test_the_shipped_tokenizer_has_none(shipped: TwoTower) -> None:
    assert ends_of(shipped) == Ends()


def test_cutting() -> None:
    ends = Ends((1,), (2,))
    assert ends.cut([1, 65, 2], keep_before=True) == [1, 65]
    assert ends.cut([1, 65, 2], keep_before=False) == [65]
    # The text spells the first token itself.
    assert ends.cut([1, 1, 65, 2], keep_before=True) == [1, 65]
    assert Ends().cut([65], keep_before=False) == [65]

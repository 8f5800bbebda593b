"""The index of lookup drafts against a search of all positions, and what it costs."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from itertools import cycle, islice

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from twotower.towers.decoding.lookup import LONGEST_MATCH, LookupIndex, Match
from twotower.towers.errors import InvalidRequestError

LARGEST_ID = 2**31 - 1
# Texts in pieces, as a row's tokens come, of so few ids that long suffixes come again.
PIECES = st.integers(1, 4).flatmap(
    lambda ids: st.lists(st.lists(st.integers(0, ids - 1), max_size=24), min_size=1, max_size=12)
)


def searched(tokens: Sequence[int], max_tokens: int) -> Match | None:
    """The match by trying all lengths and positions of the tokens that are kept."""
    half = max_tokens // 2
    first = next(k * half for k in range(len(tokens) + 1) if len(tokens) - k * half <= 2 * half)
    for length in range(LONGEST_MATCH, 0, -1):
        suffix = tokens[len(tokens) - length :]
        for start in range(len(tokens) - 1, first + length - 1, -1):
            if tokens[start - length : start] == suffix:
                return Match(length, start)
    return None


def continued(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """A draft by copying token after token."""
    text = list(tokens)
    for i in range(count):
        text.append(text[start + i])
    return text[len(tokens) :]


def test_a_row_without_tokens_has_no_match() -> None:
    index = LookupIndex([])
    assert len(index) == 0
    assert index.match() is None
    index.extend([])
    assert index.match() is None


def test_a_new_token_has_no_match() -> None:
    index = LookupIndex([1, 2, 1, 2, 3])
    assert index.match() is None
    index.extend([1, 2])
    assert index.match() == Match(2, 4)


def test_the_longest_suffix_is_found() -> None:
    #                    0  1  2  3  4  5  6  7  8  9
    index = LookupIndex([5, 6, 7, 8, 9, 7, 1, 5, 6, 7])
    assert index.match() == Match(3, 3)
    assert index.draft(Match(3, 3), 4) == [8, 9, 7, 1]


def test_of_equals_the_most_recent_is_found() -> None:
    index = LookupIndex([4, 5, 1, 4, 5, 2, 9, 5, 3, 4, 5])
    assert index.match() == Match(2, 5)
    assert index.draft(Match(2, 5), 2) == [2, 9]


def test_no_more_than_eight_tokens_count() -> None:
    once = list(range(10, 20))
    # The first occurrence is longer, the second more recent; both are matches of 8.
    index = LookupIndex([*once, 1, *once[2:], 2, *once])
    assert index.match() == Match(8, 19)
    assert index.draft(Match(8, 19), 1) == [2]


def test_a_draft_goes_on_with_itself() -> None:
    index = LookupIndex([9, 1, 2, 3, 1, 2, 3])
    assert index.match() == Match(3, 4)
    assert index.draft(Match(3, 4), 8) == [1, 2, 3, 1, 2, 3, 1, 2]
    assert LookupIndex([7, 7]).draft(Match(1, 1), 3) == [7, 7, 7]


def test_a_draft_of_none() -> None:
    assert LookupIndex([7, 7]).draft(Match(1, 1), 0) == []


def test_the_smallest_and_the_largest_id() -> None:
    text = [0, LARGEST_ID, 5, 0, LARGEST_ID]
    index = LookupIndex(text)
    assert index.match() == Match(2, 2)
    assert index.draft(Match(2, 2), 3) == [5, 0, LARGEST_ID]
    index.extend([5])
    assert index.match() == Match(3, 3)


@given(PIECES, st.sampled_from([2, 3, 10, 16, 50, 131072]), st.integers(0, 20))
@example([[0] * 24] * 8, 50, 15)
@settings(deadline=None, max_examples=150)
def test_matches_and_drafts_are_those_of_a_search(
    pieces: list[list[int]], max_tokens: int, count: int
) -> None:
    index, text = LookupIndex([], max_tokens), list[int]()
    for piece in pieces:
        index.extend(piece)
        text += piece
        match = index.match()
        assert match == searched(text, max_tokens)
        assert len(index) == len(text)
        if match:
            assert index.draft(match, count) == continued(text, match.start, count)


@given(PIECES, st.sampled_from([2, 3, 10, 16, 50, 131072]), st.integers(0, 11))
@settings(deadline=None, max_examples=150)
def test_a_resumed_row_has_the_matches_of_one_that_went_on(
    pieces: list[list[int]], max_tokens: int, resumed_at: int
) -> None:
    here = LookupIndex(pieces[0], max_tokens)
    resumed = here
    text = list(pieces[0])
    for at, piece in enumerate(pieces[1:], 1):
        text += piece
        for token in piece:
            here.extend([token])
        if at == resumed_at:
            resumed = LookupIndex(text, max_tokens)
        elif resumed is not here:
            resumed.extend(piece)
        match = here.match()
        assert match == resumed.match()
        if match:
            assert here.draft(match, 15) == resumed.draft(match, 15)


@pytest.mark.parametrize("ids", [2, 30, 5000])
def test_long_rows(ids: int) -> None:
    """Through several sizes of the index and several times that the older half is dropped."""
    draw = random.Random(ids)
    phrases = [[draw.randrange(ids) for _ in range(12)] for _ in range(40)]
    text = [token for _ in range(300) for token in draw.choice(phrases)]
    index = LookupIndex(text[:100], 1500)
    for start in range(100, len(text), 4):
        index.extend(text[start : start + 4])
        if start % 80 == 20:
            assert index.match() == searched(text[: start + 4], 1500)


def test_a_dropped_occurrence_is_not_found() -> None:
    index = LookupIndex([1, 2, 3, 4, 5, 6, 7, 1], 8)
    assert index.match() == Match(1, 1)
    index.extend([8])
    assert index.match() is None
    index.extend([5])
    assert index.match() == Match(1, 5)
    assert index.draft(Match(1, 5), 9) == [6, 7, 1, 8, 5, 6, 7, 1, 8]
    assert len(index) == 10


@pytest.mark.parametrize("max_tokens", [1, 0, -4, 2**20 + 1])
def test_bad_sizes(max_tokens: int) -> None:
    with pytest.raises(InvalidRequestError, match=rf"^max_tokens: got {max_tokens}, expected 2 to"):
        LookupIndex([1], max_tokens)


def test_the_largest_size() -> None:
    draw = random.Random(0)
    text = [draw.randrange(LARGEST_ID) for _ in range(3000)]
    assert LookupIndex([*text, *text], 2**20).match() == Match(8, 3000)


@pytest.mark.parametrize("ids", [1, 131072])
def test_bytes_a_token(ids: int) -> None:
    draw = random.Random(0)
    index = LookupIndex([draw.randrange(ids) for _ in range(100)])
    for _ in range(5000):
        index.extend([draw.randrange(ids)])
        assert index.num_bytes <= 64 * len(index)
        # Token, scrambled token and two branches; arrays cannot be smaller.
        assert index.num_bytes >= 16 * len(index)


def test_num_bytes_counts_all_that_is_kept() -> None:
    index = LookupIndex(list(range(1000)))
    values = [value for value in vars(index).values() if not isinstance(value, (int, tuple))]
    assert index.num_bytes >= sum(map(sys.getsizeof, values))


def test_memory_is_bounded() -> None:
    index = LookupIndex([], 1000)
    for start in range(0, 20_000, 100):
        index.extend(range(start, start + 100))
    assert len(index) == 20_000
    assert index.num_bytes <= 64 * 1000


def seconds(text: Sequence[int]) -> float:
    """Time of the CPU to go on with a text token by token from its first half."""
    index = LookupIndex(text[: len(text) // 2])
    begin = time.process_time()
    for token in text[len(text) // 2 :]:
        index.extend([token])
    return time.process_time() - begin


def test_no_order_of_ids_makes_ways_long() -> None:
    """Ascending ids after the same token, twice: a tree sorted by ids would be a single path."""
    count = 4000
    ascending = [token for i in islice(cycle(range(1, count + 1)), 2 * count) for token in (i, 0)]
    draw = random.Random(0)
    mixed = [token for _ in range(2 * count) for token in (draw.randrange(1, count), 0)]
    assert seconds(ascending) < 20 * seconds(mixed)

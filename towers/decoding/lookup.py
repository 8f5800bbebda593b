"""Drafts without a model: what followed the last tokens where they stood before.

Text repeats itself, and code more than prose. Where the last tokens of prompt and output stood
before, what followed them there is a draft that costs no pass: prompt lookup decoding (Saxena,
"Prompt Lookup Decoding", 2023), which vLLM and transformers serve as n-gram speculation. The
occurrence is that of the longest suffix of at most 8 tokens, of equals the most recent one.

The index finds it exactly, in time that grows with the logarithm of the text. The context of a
position is its token and the 7 before it, read backwards; two contexts share n tokens where the
same n tokens end. Contexts are kept in binary search trees, one per bucket of the last token, in
which newer ones stand above older ones (the match finder of Pavlov's LZMA, turned to look
backwards). All contexts that share n tokens with a new one are neighbours in the tree's order, so
the newest of them lies on the way from the root to the new one's place. That way is walked once,
and splits the tree for the new root. A context of 8 tokens that comes again replaces the older one.

What a match is does not depend on the trees' shape. So their order is of token ids scrambled by
random numbers: the way is short whatever the text is, even one that was made to have long ways.
"""

from __future__ import annotations

import random
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from twotower.towers.errors import InvalidRequestError

__all__ = ["LONGEST_MATCH", "LookupIndex", "Match"]

LONGEST_MATCH = 8
# Sorting puts two ranks and a position, 20 bits each, into 63 bits.
MOST_TOKENS = 1 << 20
_LEAST_BUCKETS = 64
# Trees are made anew, in more buckets, when there are so many contexts to a bucket.
_BUCKET_FILL = 4
_SCRAMBLED_BITS = 31
_SCRAMBLED = (1 << _SCRAMBLED_BITS) - 1
# Before the first token stands what equals no token, so that contexts there need no check.
_NO_TOKEN = -1
_NO_NINTH = -2


@dataclass(frozen=True)
class Match:
    """The last `length` tokens, 1 to 8, stood before too: right before index `start` of the row."""

    length: int
    start: int


class LookupIndex:
    """The tokens of a row, prompt and output, and where their last ones stood before.

    At most `max_tokens` are kept. A row that has more is looked up in its newest tokens only, from
    a multiple of half of `max_tokens` on, so that at least half are kept. What `match` and `draft`
    give depends on the row's tokens alone: not on how they came, in one go or one by one. Indices
    are those of the row, whatever was dropped. Token ids are 0 to 2**31 - 1. `max_tokens` is 2 to
    2**20, else InvalidRequestError.
    """

    def __init__(self, tokens: Sequence[int], max_tokens: int = 131072) -> None:
        if not 2 <= max_tokens <= MOST_TOKENS:
            raise InvalidRequestError("max_tokens", max_tokens, f"2 to {MOST_TOKENS}")
        self._half = max_tokens // 2
        self._factors = (random.getrandbits(30) * 2 + 1, random.getrandbits(30) * 2 + 1)
        # Index of the first token that is kept, less the room of _NO_TOKEN before it.
        self._offset = -LONGEST_MATCH
        self._rebuild(np.asarray(tokens, dtype=np.int32))

    def __len__(self) -> int:
        """How many tokens the row has, dropped ones too."""
        return self._offset + len(self._tokens)

    @property
    def num_bytes(self) -> int:
        """Bytes of all that the index keeps, spare room of its arrays too."""
        kept = (self, self.__dict__, self._tokens, self._scrambled, self._below, self._newest)
        return sum(sys.getsizeof(part) for part in kept)

    def extend(self, tokens: Sequence[int]) -> None:
        """Appends tokens of the row: some microseconds each, more where trees are made anew."""
        if len(self._tokens) + len(tokens) > self._room:
            kept = np.array(self._tokens[LONGEST_MATCH:], dtype=np.int32)
            self._rebuild(np.concatenate([kept, np.asarray(tokens, dtype=np.int32)]))
            return
        first, second = self._factors
        for token in tokens:
            mixed = token * first & _SCRAMBLED
            self._append(token, (mixed ^ mixed >> 15) * second & _SCRAMBLED)

    def match(self) -> Match | None:
        """Where the longest suffix of at most 8 tokens stood before, of equals the most recent
        occurrence; None if the last token did not. Occurrences may overlap the suffix."""
        if not self._length:
            return None
        return Match(self._length, self._found + 1 + self._offset)

    def draft(self, match: Match, count: int) -> list[int]:
        """The `count` tokens that followed a match of the row as it is now.

        Where what followed reaches the row's end, the draft goes on with itself, as a loop does.
        """
        start = match.start - self._offset
        followed = self._tokens[start : start + count].tolist()
        period = len(followed)
        if 0 < period < count:
            followed *= -(-count // period)
        return followed[:count]

    def _append(self, token: int, scrambled: int) -> None:
        """Makes a position the root of its bucket and keeps the best match on the way."""
        text, below = self._scrambled, self._below
        here = len(text)
        self._tokens.append(token)
        text.append(scrambled)
        below.append(0)
        below.append(0)
        bucket = scrambled >> self._shift
        there = self._newest[bucket]
        self._newest[bucket] = here
        # A ninth that equals no token ends the comparison, so that it has no limit to look at.
        context: list[int] = text[here : here - LONGEST_MATCH : -1].tolist()
        context.append(_NO_NINTH)
        # Where the next smaller and the next larger context go: slot 2 i has what is smaller
        # than context i, slot 2 i + 1 what is larger. All that follow share as many tokens with
        # the new context as the less alike of its two neighbours so far.
        smaller, larger = 2 * here, 2 * here + 1
        alike_smaller = alike_larger = longest = found = 0
        while there:
            alike = alike_smaller if alike_smaller < alike_larger else alike_larger
            while (other := text[there - alike]) == context[alike]:
                alike += 1
            if alike > longest:
                longest, found = alike, there
            if alike == LONGEST_MATCH:
                below[smaller], below[larger] = below[2 * there], below[2 * there + 1]
                break
            if other < context[alike]:
                below[smaller] = there
                smaller, alike_smaller = 2 * there + 1, alike
                there = below[smaller]
            else:
                below[larger] = there
                larger, alike_larger = 2 * there, alike
                there = below[larger]
        else:
            below[smaller] = below[larger] = 0
        self._length, self._found = longest, found

    def _rebuild(self, tokens: npt.NDArray[np.int32]) -> None:
        """Makes all anew from tokens of which the first is the first that is kept so far."""
        first = self._offset + LONGEST_MATCH
        halves = -(-(first + len(tokens)) // self._half)
        dropped = max((halves - 2) * self._half - first, 0)
        self._offset += dropped
        self._length = self._found = 0
        self._fill(tokens[dropped:])

    def _fill(self, tokens: npt.NDArray[np.int32]) -> None:
        """Sets tokens and trees. The last token is appended, which finds its match."""
        bits = max(_LEAST_BUCKETS, len(tokens)).bit_length() - 1
        self._shift = _SCRAMBLED_BITS - bits
        self._room = min(_BUCKET_FILL << bits, 2 * self._half) + LONGEST_MATCH
        scrambled = self._scramble(tokens)
        before = np.full(LONGEST_MATCH, _NO_TOKEN, dtype=np.int32)
        self._tokens = _as_array(np.concatenate([before, tokens[:-1]]))
        self._scrambled = _as_array(np.concatenate([before, scrambled[:-1]]))
        positions = _sorted_contexts(scrambled[:-1]) + LONGEST_MATCH
        buckets = (scrambled[positions - LONGEST_MATCH] >> self._shift).tolist()
        self._newest = array("i", bytes(4 << bits))
        self._below = array("i", bytes(8 * len(self._tokens)))
        _grow_trees(positions.tolist(), buckets, self._newest, self._below)
        if len(tokens):
            self._append(int(tokens[-1]), int(scrambled[-1]))

    def _scramble(self, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Other numbers below 2**31 for token ids, different ones for different ids."""
        first, second = self._factors
        mixed = tokens.astype(np.int64) * first & _SCRAMBLED
        return ((mixed ^ mixed >> 15) * second & _SCRAMBLED).astype(np.int32)


def _as_array(values: npt.NDArray[np.int32]) -> array[int]:
    return array("i", values.tobytes())


def _sorted_contexts(scrambled: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """The last position of each context, in the order of contexts.

    Ranks of contexts of n tokens give those of 2 n: by the rank of the last n, then by that of the
    n before these (Karp, Miller and Rosenberg 1972).
    """
    count = len(scrambled)
    if not count:
        return np.empty(0, dtype=np.int64)
    bits = count.bit_length()
    position = np.arange(count)
    order, rank = _ranked(scrambled.astype(np.int64), position, bits)
    alike = 1
    while alike < LONGEST_MATCH:
        before = np.zeros(count, dtype=np.int64)
        before[alike:] = rank[:-alike]
        order, rank = _ranked(rank << bits | before, position, bits)
        alike *= 2
    ranks = rank[order]
    last: npt.NDArray[np.bool_] = np.append(ranks[1:] != ranks[:-1], True)
    return order[last]


def _ranked(
    keys: npt.NDArray[np.int64], position: npt.NDArray[np.int64], bits: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Positions in the order of their keys, then of themselves; and from 1 on, each key's rank."""
    both = np.sort(keys << bits | position)
    order = both & (1 << bits) - 1
    ordered = both >> bits
    rank = np.empty_like(keys)
    rank[order] = np.cumsum(np.append(True, ordered[1:] != ordered[:-1]))
    return order, rank


def _grow_trees(
    positions: Sequence[int], buckets: Sequence[int], newest: array[int], below: array[int]
) -> None:
    """Puts sorted contexts into their buckets' trees, larger positions above smaller ones.

    `way` is the way down the larger sides from the root, which all later contexts go.
    """
    current = -1
    way: list[int] = []
    for here, bucket in zip(positions, buckets, strict=True):
        if bucket != current:
            if way:
                newest[current] = way[0]
            current, way = bucket, []
        under = 0
        while way and way[-1] < here:
            under = way.pop()
        below[2 * here] = under
        if way:
            below[2 * way[-1] + 1] = here
        way.append(here)
    if way:
        newest[current] = way[0]

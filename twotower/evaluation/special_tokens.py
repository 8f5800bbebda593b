"""The special tokens that a tokenizer puts around a text, found by asking it.

A service has no call for a text without them, and both backends have to cut texts alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Protocol

# Texts that begin and end differently: what their ids share at an end is not of the text.
_PROBES = ("a", "7", "(", "Zebra")


class Coder(Protocol):
    """Encodes and decodes texts."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""


@dataclass(frozen=True)
class Ends:
    """Ids that stand before and behind every text."""

    before: tuple[int, ...] = ()
    behind: tuple[int, ...] = ()

    def cut(self, token_ids: list[int], *, keep_before: bool) -> list[int]:
        """The ids without those behind the text, and those before it once or not at all: a text
        may spell them itself."""
        ids, before = token_ids, len(self.before)
        if self.behind and tuple(ids[-len(self.behind) :]) == self.behind:
            ids = ids[: -len(self.behind)]
        if before and tuple(ids[before : 2 * before]) == self.before:
            ids = ids[before:]
        return ids if keep_before else ids[before:]


def ends_of(coder: Coder) -> Ends:
    """The ends of a tokenizer. Ids that have a text are the texts' own."""
    rows = [coder.encode(probe) for probe in _PROBES]
    before = _shared(rows)
    behind = tuple(reversed(_shared([row[::-1] for row in rows])))
    return Ends(_silent(coder, before), _silent(coder, behind))


def _shared(rows: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The beginning that all rows have."""
    columns = takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False))
    return tuple(column[0] for column in columns)


def _silent(coder: Coder, token_ids: tuple[int, ...]) -> tuple[int, ...]:
    return token_ids if token_ids and not coder.decode(token_ids) else ()

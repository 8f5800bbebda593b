"""Snapshots of rows, kept for rows that begin with the same tokens.

A hybrid's state cannot be cut: a row goes on from a token only where a snapshot of the Mamba
layers was kept. An entry is such a snapshot with a hold on the K/V pages of the tokens before it.
Its key fixes tokens and the borders of the passes that read them, so that a row that starts from
an entry has the bits that it would have had alone. Snapshots have a budget in bytes; pages are
the pool's, and entries give them up when a row needs them.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pages import pages_for
from twotower.towers.state.pool import StatePool

_KEY_BYTES = 32


def next_key(key: bytes, piece: Sequence[int]) -> bytes:
    """The key of the tokens read under `key` (empty: none) and then `piece` in one pass."""
    digest = hashlib.blake2b(key, digest_size=_KEY_BYTES)
    digest.update(len(piece).to_bytes(8, "little"))
    digest.update(array("q", piece).tobytes())
    return digest.digest()


def chain_keys(pieces: Sequence[Sequence[int]]) -> list[bytes]:
    """For each piece the key of all tokens up to its end."""
    return list(accumulate(pieces, next_key, initial=b""))[1:]


@dataclass(frozen=True, eq=False)
class _Entry:
    """Copies of the snapshot at `position` and of the last hidden state [H], and held pages."""

    position: int
    pages: list[int]
    conv: Tensor
    ssm: Tensor
    hidden: Tensor

    @property
    def num_bytes(self) -> int:
        return snapshot_bytes(self.conv, self.ssm, self.hidden)


def snapshot_bytes(conv: Tensor, ssm: Tensor, hidden: Tensor) -> int:
    """Bytes that an entry takes from the budget."""
    return conv.nbytes + ssm.nbytes + hidden.nbytes


class PrefixCache:
    """Entries for the rows of one pool, at most `max_bytes` of snapshots; those not used for the
    longest time leave first. Not for several threads.

    Entries have `num_bytes` of snapshots now. Since the start there were `hits` and `misses`, and
    hits saved `cached_tokens` tokens.
    """

    def __init__(self, pool: StatePool, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._pool = pool
        # Least recently used first.
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self.cached_tokens = 0

    def longest(self, keys: Sequence[bytes]) -> int:
        """Index of the last key that has an entry; -1, which counts as a miss, if none has."""
        for index in range(len(keys) - 1, -1, -1):
            if keys[index] in self._entries:
                return index
        self.misses += 1
        return -1

    def restore(self, key: bytes, state: ContextState) -> Tensor:
        """Fills an empty state from an entry; returns the last hidden state [H] of the entry.

        Pages of the state that the entry's replace go back to the pool. Raises ValueError for a
        key without an entry and for a state that is not empty or too small.
        """
        entry = self._entries.get(key)
        if entry is None:
            raise ValueError(f"key: got {key.hex()}, expected one that has an entry")
        state.restore(entry.conv, entry.ssm, entry.pages, entry.position)
        self._entries.move_to_end(key)
        self.hits += 1
        self.cached_tokens += entry.position
        return entry.hidden

    def insert(self, key: bytes, state: ContextState, hidden: Tensor) -> None:
        """Keeps a state as it stands at its position; a key that has an entry is marked as used.

        Nothing is kept if the snapshot is above the budget, or if the last page is partly filled
        and no page is free to copy it to: the row goes on writing into that page.
        """
        if key in self._entries:
            self._entries.move_to_end(key)
            return
        size = snapshot_bytes(state.conv, state.ssm, hidden)
        rest = state.position % self._pool.page_tokens
        if size > self.max_bytes or (rest and not self._pool.pages.num_free):
            return
        while self.num_bytes + size > self.max_bytes:
            self._evict()
        pages = self._hold_pages(state)
        copies = state.conv.clone(), state.ssm.clone(), hidden.clone()
        entry = _Entry(state.position, pages, *copies)
        self._entries[key] = entry
        self.num_bytes += size

    def reclaim(self, pages: int) -> bool:
        """Evicts entries until `pages` more pages are free; nothing if all would not be enough."""
        allocator = self._pool.pages
        wanted = allocator.num_free + pages
        holds = Counter(page for entry in self._entries.values() for page in entry.pages)
        releasable = sum(allocator.holders(page) == count for page, count in holds.items())
        if releasable < pages:
            return False
        while allocator.num_free < wanted:
            self._evict()
        return True

    def clear(self) -> None:
        """Drops every entry."""
        while self._entries:
            self._evict()

    @property
    def num_entries(self) -> int:
        """Number of entries."""
        return len(self._entries)

    def _hold_pages(self, state: ContextState) -> list[int]:
        """Pages of the state's tokens: full pages are shared, a partly filled page is copied."""
        pages = state.pages[: pages_for(state.position)]
        full, rest = divmod(state.position, self._pool.page_tokens)
        self._pool.pages.share(pages[:full])
        if not rest:
            return pages
        copied = self._pool.pages.allocate(1)
        self._pool.copy_page(pages[full], copied[0], rest)
        return pages[:full] + copied

    def _evict(self) -> None:
        _, entry = self._entries.popitem(last=False)
        self.num_bytes -= entry.num_bytes
        self._pool.pages.free(entry.pages)

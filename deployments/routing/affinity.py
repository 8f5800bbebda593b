"""The pair that a prompt belongs to: where others that begin like it are read.

Prompts that begin alike go to one pair, whose prefix cache then has their beginning. The pair is
found by rendezvous hashing (Thaler and Ravishankar 1998, "Using name-based mappings to increase hit
rates"): every router finds the same one without asking, and a pair that comes or goes moves only
the prompts that belong to it.

A chat has a beginning of its own, and often one that many chats share, a system prompt. The router
learns what is shared from the prompts that it sees: two prompts of which neither goes on where the
other ends share what they have in common. Shared beginnings belong to a group of pairs, the more of
them the more of the prompts begin so; within the group what is a chat's own decides, so that its
next turn finds the whole chat.

A pair whose rows are more than SLACK_SHARE above the mean is passed over for the next in the order
(consistent hashing with bounded loads, Mirrokni et al. 2018): waiting costs more than reading.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

# Beginnings are compared in steps of so many tokens; shorter prompts belong nowhere.
STEP_TOKENS = 64
# Of longer prompts only the first steps are looked at.
MOST_STEPS = 64
# Rows that a pair may have beyond the mean, and in proportion to it.
SLACK_ROWS = 4
SLACK_SHARE = 0.125
# Prompts over which a beginning's share is counted, and pairs of its group over those that its
# share of the prompts would fill.
WINDOW = 4096
SPREAD = 2.0
# Beginnings that are remembered.
MOST_ROOTS = 4096
MOST_SHARED = 65536

Keys = NDArray[np.uint64]
V = TypeVar("V")


class Place(NamedTuple):
    """Keys of a prompt's shared beginning and of what is its own, and the share of the prompts that
    have the former."""

    group: int
    own: int
    share: float


def chain_of(prompt: Sequence[int]) -> list[int]:
    """Keys of 64 bits of the prompt's beginnings of 1, 2, ... whole steps."""
    steps = min(MOST_STEPS, len(prompt) // STEP_TOKENS)
    data = array("q", prompt[: steps * STEP_TOKENS]).tobytes()
    size = 8 * STEP_TOKENS
    key, chain = b"", []
    for step in range(steps):
        key = hashlib.blake2b(
            data[step * size : (step + 1) * size], digest_size=8, key=key
        ).digest()
        chain.append(int.from_bytes(key, "little"))
    return chain


class Remembered(Generic[V]):
    """A dict that keeps at least the `most` entries that were asked for or put in last, and at most
    twice as many."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._new: dict[int, V] = {}
        self._old: dict[int, V] = {}

    def get(self, key: int) -> V | None:
        """The value of a key, None if there is none."""
        found = self._new.get(key)
        if found is None and (found := self._old.get(key)) is not None:
            self.put(key, found)
        return found

    def put(self, key: int, value: V) -> None:
        """Sets the value of a key."""
        if len(self._new) >= self._most and key not in self._new:
            self._old, self._new = self._new, {}
        self._new[key] = value


class Beginnings:
    """What a router has learned of the beginnings of prompts; for one thread at a time."""

    def __init__(self) -> None:
        # The last prompt's chain by its first key.
        self._last: Remembered[list[int]] = Remembered(MOST_ROOTS)
        self._shared: Remembered[bool] = Remembered(MOST_SHARED)
        self._recent: deque[int] = deque()
        self._counts: Counter[int] = Counter()

    def place(self, chain: list[int]) -> Place:
        """Where a prompt of at least one step belongs; it counts as seen."""
        self._compare(chain)
        # Whoever shares a beginning shares all that are shorter.
        depth = bisect_left(chain, True, key=lambda key: not self._shared.get(key))
        group = chain[max(0, depth - 1)]
        share = self._counts[group] / max(1, len(self._recent))
        self._count(group)
        return Place(group, chain[min(depth, len(chain) - 1)], share)

    def _compare(self, chain: list[int]) -> None:
        """Notes what a prompt shares with the last one that began like it."""
        last = self._last.get(chain[0])
        self._last.put(chain[0], chain)
        if last is None:
            return
        both = range(min(len(chain), len(last)))
        # A key stands for all tokens before it as well.
        alike = bisect_left(both, True, key=lambda step: chain[step] != last[step])
        if alike < len(both) and not self._shared.get(chain[alike - 1]):
            for key in chain[:alike]:
                self._shared.put(key, True)

    def _count(self, group: int) -> None:
        self._recent.append(group)
        self._counts[group] += 1
        if len(self._recent) > WINDOW:
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]


def pair_keys(pairs: Sequence[str]) -> Keys:
    """A key of 64 bits for each name."""
    keys = [hashlib.blake2b(pair.encode(), digest_size=8).digest() for pair in pairs]
    return np.frombuffer(b"".join(keys), dtype="<u8").astype(np.uint64)


def preferred(place: Place, keys: Keys, fits: NDArray[np.bool_]) -> int | None:
    """Index of the pair that a prompt belongs to, of those that it `fits`; None without any."""
    if not fits.any():
        return None
    order = np.where(fits, _weights(keys, place.group), 0)
    size = min(len(keys), max(1, math.ceil(SPREAD * place.share * len(keys))))
    if size == 1:
        return int(order.argmax())
    group = np.argpartition(order, len(keys) - size)[len(keys) - size :]
    group = group[fits[group]]
    return int(group[_weights(keys[group], place.own).argmax()])


def _weights(keys: Keys, key: int) -> Keys:
    """The weight of each pair for a key: the finalizer of SplitMix64 (Steele et al. 2014)."""
    mixed = keys ^ np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))

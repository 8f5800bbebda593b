"""An interpolated 3-gram with absolute discounting, the yardstick of the model card's losses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]
DISCOUNT = 0.75


@dataclass(frozen=True)
class _Counts:
    """Sorted n-gram keys with their counts, and per context the total and distinct followers."""

    keys: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    distinct: Ids


class TrigramModel:
    """Next-token probabilities from counts of a training stream."""

    def __init__(self, stream: npt.NDArray[np.uint16], vocab_size: int) -> None:
        ids = stream.astype(np.int64)
        self._vocab_size = vocab_size
        once = np.bincount(ids, minlength=vocab_size) + 1.0
        self._unigram = once / once.sum()
        pairs = ids[:-1] * vocab_size + ids[1:]
        self._pairs = _count(pairs, vocab_size)
        self._triples = _count(pairs[:-1] * vocab_size + ids[2:], vocab_size)

    def loss(self, sequences: Ids) -> float:
        """Mean loss in nats of tokens 2, 3, ... of each row of `sequences` [R, T]."""
        first, second, third = sequences[:, :-2], sequences[:, 1:-1], sequences[:, 2:]
        size = self._vocab_size
        pair = _interpolate(self._pairs, second, third, self._unigram[third], size)
        triple = _interpolate(self._triples, first * size + second, third, pair, size)
        return float(-np.log(triple).mean())


def _count(keys: Ids, vocab_size: int) -> _Counts:
    grams, counts = np.unique(keys, return_counts=True)
    contexts, starts = np.unique(grams // vocab_size, return_index=True)
    ends = np.append(starts[1:], len(grams))
    return _Counts(grams, counts, contexts, np.add.reduceat(counts, starts), ends - starts)


def _interpolate(
    table: _Counts, context: Ids, token: Ids, lower: Probabilities, vocab_size: int
) -> Probabilities:
    """max(count - d, 0) / total + d * distinct / total * lower; `lower` for unseen contexts."""
    count = _look_up(table.keys, table.counts, context * vocab_size + token)
    total = _look_up(table.contexts, table.totals, context)
    distinct = _look_up(table.contexts, table.distinct, context)
    safe = np.maximum(total, 1)
    seen = np.maximum(count - DISCOUNT, 0.0) / safe + DISCOUNT * distinct / safe * lower
    return np.where(total > 0, seen, lower)


def _look_up(keys: Ids, values: Ids, wanted: Ids) -> Ids:
    place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)

"""Loss of an interpolated 3-gram with absolute discounting, for comparison in the model card."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Probabilities = npt.NDArray[np.float64]
DISCOUNT = 0.75


@dataclass(frozen=True)
class _Counts:
    """Sorted n-gram keys with their counts, and per context the numbers of followers and of
    distinct followers."""

    keys: Ids
    counts: Ids
    contexts: Ids
    totals: Ids
    distinct: Ids


def trigram_loss(train: npt.NDArray[np.uint16], vocab_size: int, sequences: Ids) -> float:
    """Mean loss in nats of tokens 2, 3, ... of each row of `sequences` [R, T], with probabilities
    from the counts of the token stream `train`."""
    ids = train.astype(np.int64)
    counts = np.bincount(ids, minlength=vocab_size) + 1.0
    unigram = counts / counts.sum()
    pairs = ids[:-1] * vocab_size + ids[1:]
    triples = pairs[:-1] * vocab_size + ids[2:]
    first, second, third = sequences[:, :-2], sequences[:, 1:-1], sequences[:, 2:]
    by_pair = _interpolate(_count(pairs, vocab_size), second, third, unigram[third], vocab_size)
    by_triple = _interpolate(
        _count(triples, vocab_size), first * vocab_size + second, third, by_pair, vocab_size
    )
    return float(-np.log(by_triple).mean())


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

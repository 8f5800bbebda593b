"""Rows that begin alike go to one pair, whose prefix cache then has their beginning.

The pair is found by rendezvous hashing: every router finds the same one without asking anybody,
and a pair that comes or goes moves only the prompts that are its own. A pair that has many more
rows of this router than the least loaded one is passed over: waiting costs more than reading.
Source: Thaler and Ravishankar 1998, "Using name-based mappings to increase hit rates".
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

# What two prompts must have in common, in tokens, to be kept together.
PREFIX_TOKENS = 64
# Rows that a pair may have beyond the least loaded one, and in proportion to it.
SLACK_ROWS = 4
SLACK_SHARE = 0.25


def preferred_pair(
    prompt: Sequence[int], pairs: Sequence[str], rows: Mapping[str, int]
) -> str | None:
    """The pair that a prompt belongs to; None if it is too short or has too many `rows` there."""
    if len(prompt) < PREFIX_TOKENS or not pairs:
        return None
    prefix = ",".join(map(str, prompt[:PREFIX_TOKENS])).encode()
    best = max(pairs, key=lambda pair: (_weight(prefix, pair), pair))
    least = min(rows.get(pair, 0) for pair in pairs)
    limit = least * (1.0 + SLACK_SHARE) + SLACK_ROWS
    return best if rows.get(best, 0) <= limit else None


def _weight(prefix: bytes, pair: str) -> bytes:
    return hashlib.blake2b(prefix, digest_size=8, key=pair.encode()[:64]).digest()

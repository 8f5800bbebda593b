"""Where a row goes that waits for a place: to a pair that has one.

A pair does not say who waits in it, but it lets rows in as they come. With `room` places, a row
that has `room` others of this router before it has none. The oldest of those that wait move, as
many as find room elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

from twotower.deployments.assignments import PairRows


def target_of(row_id: str, here: PairRows, rows: Mapping[str, int], room: int) -> str | None:
    """The pair that an attempt `here` should move to; None if it stays.

    `rows` are the attempts on each pair that works, `room` those that a pair works on at once.
    """
    free = {pair: room - count for pair, count in rows.items() if count < room}
    if not free:
        return None
    # Those before have a place, or may have one; those behind wait for the next look.
    first = max(0, room - len(here.begun))
    if row_id not in islice(here.waiting, first, first + sum(free.values())):
        return None
    return max(free, key=lambda pair: free[pair])

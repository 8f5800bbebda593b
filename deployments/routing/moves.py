"""Where a row goes that waits for a place: to a pair that has one.

A pair does not say who waits in it, but it lets rows in as they come: a row that has as many
others of this router before it as the pair has places has none. The oldest of those that wait move,
as many as find room elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from twotower.deployments.routing.assignments import PairRows


@dataclass(frozen=True)
class Room:
    """`places` rows that a pair works on at once, and the `share` of them that is this router's."""

    places: int
    share: int

    @classmethod
    def of(cls, places: int, num_routers: int) -> Room:
        """Each of the routers has an equal share, at least one place."""
        return cls(places, max(1, places // num_routers))


def target_of(row_id: str, here: PairRows, rows: Mapping[str, int], room: Room) -> str | None:
    """The pair that an attempt `here` should move to; None if it stays.

    `rows` are this router's attempts on each pair that works.
    """
    free = {pair: room.share - count for pair, count in rows.items() if count < room.share}
    if not free:
        return None
    # Those before have a place, or may have one; those behind wait for the next look.
    first = max(0, room.places - len(here.begun))
    if row_id not in islice(here.waiting, first, first + sum(free.values())):
        return None
    return max(free, key=lambda pair: free[pair])

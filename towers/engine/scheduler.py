"""Which waiting pieces of work make the next pass: bookkeeping without tensors or clocks.

Three kinds of work wait, each in order of arrival: pieces of a block that has begun, other pieces
(block extensions, decode steps, first steps of a block), and prefill pieces. The first two kinds
share one budget, begun blocks first: a block that has begun is done within its steps, so nothing
waits for ever, and rows that run block by block drift apart less than rows that share every pass.
"""

from __future__ import annotations

from collections.abc import Iterable

from twotower.towers.engine.options import PassLimits


class PassScheduler:
    """Tickets of waiting work, handed out pass by pass.

    Other work is delayed by at most one share of prefill: after a pass with prefill, prefill rests
    for one pass if anything else waits. So prefill has its share of every second pass, or all
    passes when it is alone. A piece beyond a limit runs as the only one of its kind in its pass.
    """

    def __init__(self, limits: PassLimits) -> None:
        self._limits = limits
        self._begun: dict[int, int] = {}
        self._other: dict[int, int] = {}
        self._prefill: dict[int, int] = {}
        self._prefill_rests = False

    def __len__(self) -> int:
        return len(self._begun) + len(self._other) + len(self._prefill)

    def add(self, ticket: int, tokens: int, prefill: bool = False, begun: bool = False) -> None:
        """Puts work of `tokens` behind all of its kind; a block's later steps are `begun`.

        Raises ValueError for a ticket that waits already and for fewer than 1 token.
        """
        if any(ticket in kind for kind in self._kinds()):
            raise ValueError(f"ticket: {ticket} waits already")
        if tokens < 1:
            raise ValueError(f"tokens: got {tokens}, expected at least 1")
        if prefill and begun:
            raise ValueError("begun: a prefill piece belongs to no block")
        (self._prefill if prefill else self._begun if begun else self._other)[ticket] = tokens

    def withdraw(self, ticket: int) -> None:
        """Forgets a ticket; one that does not wait is ignored."""
        for kind in self._kinds():
            kind.pop(ticket, None)

    def take(self) -> list[int]:
        """The tickets of the next pass; none if nothing waits."""
        limits, max_rows = self._limits, self._limits.max_rows_per_pass
        work = [*self._begun.items(), *self._other.items()]
        taken = _fitting(work, limits.max_num_batched_tokens, max_rows)
        if taken and self._prefill_rests:
            pieces = []
        elif taken:
            pieces = _fitting(self._prefill.items(), limits.max_prefill_tokens, max_rows)
        else:
            pieces = _fitting(self._prefill.items(), limits.max_num_batched_tokens, max_rows)
        self._prefill_rests = bool(pieces)
        taken += pieces
        for ticket in taken:
            self.withdraw(ticket)
        return taken

    def _kinds(self) -> tuple[dict[int, int], ...]:
        return (self._begun, self._other, self._prefill)


def _fitting(work: Iterable[tuple[int, int]], tokens: int, rows: int | None) -> list[int]:
    """The first tickets of (ticket, tokens) within the limits, the very first in any case.

    Stops at the first that does not fit: a smaller one behind it must not overtake it for ever.
    """
    taken: list[int] = []
    left = tokens
    for ticket, cost in work:
        if taken and (cost > left or len(taken) == rows):
            break
        taken.append(ticket)
        left -= cost
    return taken

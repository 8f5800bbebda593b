"""Which waiting pieces of work make the next pass: bookkeeping without tensors or clocks.

Three kinds of work wait, each in order of arrival: pieces of a block that has begun, other pieces
(block extensions, decode steps, first steps of a block), and prefill pieces. The first two kinds
share one budget, begun blocks first: a block that has begun is done within its steps, so nothing
waits for ever, and rows that run block by block drift apart less than rows that share every pass.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class PassLimits:
    """Limits of one pass. Raises ValueError on construction.

    `max_tokens` and `max_rows` (None: no limit) hold for a pass without prefill, and for one of
    nothing else; prefill that shares a pass with other work has `prefill_tokens` on top of them.
    """

    max_tokens: int = 512
    max_rows: int | None = None
    prefill_tokens: int = 64

    @classmethod
    def for_device(cls, device_type: str) -> PassLimits:
        """What suits a kind of device: on `cuda` a pass is bound by its weights up to thousands of
        tokens, on `cpu` by its tokens."""
        if device_type == "cuda":
            return cls(max_tokens=4096, prefill_tokens=1024)
        return cls()

    def __post_init__(self) -> None:
        for field in ("max_tokens", "max_rows", "prefill_tokens"):
            value = getattr(self, field)
            if value is not None and value < 1:
                raise ValueError(f"{field}: got {value}, expected at least 1")


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
        limits = self._limits
        work = [*self._begun.items(), *self._other.items()]
        taken = _fitting(work, limits.max_tokens, limits.max_rows)
        if taken and self._prefill_rests:
            pieces = []
        elif taken:
            pieces = _fitting(self._prefill.items(), limits.prefill_tokens, limits.max_rows)
        else:
            pieces = _fitting(self._prefill.items(), limits.max_tokens, limits.max_rows)
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

"""Which pair has which attempt of this router, and which attempts have begun."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class PairRows:
    """A pair's attempts: `begun` have brought a block, `waiting` have not and are in the order in
    which the pair got them, `coming` are sent to it and not there yet."""

    begun: set[str] = field(default_factory=set)
    waiting: dict[str, None] = field(default_factory=dict)
    coming: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.begun) + len(self.waiting) + len(self.coming)

    def drop(self, row_id: str) -> None:
        """Takes an attempt off, if it is here."""
        self.begun.discard(row_id)
        self.waiting.pop(row_id, None)
        self.coming.discard(row_id)


@dataclass
class _Attempt:
    # None until a pair has it; `suspect`: whether that pair was one to avoid.
    pair: str | None = None
    suspect: bool = False
    target: str | None = None


class Assignments:
    """The attempts that are under way, by name and by pair; for one thread at a time."""

    def __init__(self) -> None:
        self._attempts: dict[str, _Attempt] = {}
        self._rows: dict[str, PairRows] = {}

    def opened(self, row_id: str) -> None:
        """An attempt begins; what is not opened, or has ended, is not followed."""
        self._attempts.setdefault(row_id, _Attempt())

    def sent(self, row_id: str, pair: str) -> None:
        """An attempt will begin that belongs on this very pair, and counts there from now on."""
        self._attempts[row_id] = _Attempt(target=pair)
        self._on(pair).coming.add(row_id)

    def routed(self, row_id: str, pair: str, *, suspect: bool) -> None:
        """A pair has got an attempt, the last of those that wait there."""
        if row_id not in self._attempts:
            # Serve routes in its own thread and may not have heard yet that the attempt is over.
            return
        self.ended(row_id)
        self._attempts[row_id] = _Attempt(pair, suspect)
        self._on(pair).waiting[row_id] = None

    def began(self, row_id: str) -> None:
        """An attempt has brought a block."""
        pair = self.pair_of(row_id)
        if pair is not None:
            rows = self._on(pair)
            rows.drop(row_id)
            rows.begun.add(row_id)

    def ended(self, row_id: str) -> None:
        """An attempt is over, however it ended; an unknown one is fine."""
        attempt = self._attempts.pop(row_id, _Attempt())
        for pair in (attempt.pair, attempt.target):
            if pair is not None:
                self._on(pair).drop(row_id)
                if not self._rows[pair]:
                    del self._rows[pair]

    def pair_of(self, row_id: str) -> str | None:
        """The pair that has an attempt; None before it is routed and after its end."""
        return self._attempts.get(row_id, _Attempt()).pair

    def target_of(self, row_id: str) -> str | None:
        """The pair that an attempt is sent to; None for one that may go anywhere."""
        return self._attempts.get(row_id, _Attempt()).target

    def is_suspect(self, row_id: str) -> bool:
        """Whether the attempt's pair was one to avoid when it got the attempt."""
        return self._attempts.get(row_id, _Attempt()).suspect

    def on(self, pair: str) -> PairRows:
        """A pair's attempts, to be read only."""
        return self._rows.get(pair, PairRows())

    def counts(self) -> dict[str, int]:
        """Attempts of each pair that has any, those that are coming included."""
        return {pair: len(rows) for pair, rows in self._rows.items()}

    def _on(self, pair: str) -> PairRows:
        return self._rows.setdefault(pair, PairRows())

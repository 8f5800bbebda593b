"""What drafts of a pair's denoiser cost its rows now."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median

from twotower.towers.decoding.services import DraftCosts, NextDraft, PassTime

_KEPT = 15


class DraftTimes:
    """Running medians of the seconds that a draft of each kind costs a row.

    A row's cost is its share of the passes of its draft and of what the calls took beside them:
    while it waits, other rows work. Of the latter at most as much counts as of the former, as most
    of a long wait is that for passes of other rows. `fixed`: what is noted changes nothing.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self._costs: dict[NextDraft, deque[float]] = {}

    def note(self, asked: NextDraft, passes: Sequence[PassTime], elapsed_s: float) -> None:
        """Takes a draft, its passes and the seconds from asking for it to having it."""
        if self.fixed or not passes:
            return
        in_passes = sum(passed.seconds for passed in passes)
        shares = sum(passed.seconds / passed.rows for passed in passes)
        beside = min(in_passes, max(0.0, elapsed_s - in_passes))
        beside /= max(passed.rows for passed in passes)
        self._costs.setdefault(asked, deque(maxlen=_KEPT)).append(shares + beside)

    def costs(self) -> DraftCosts:
        """The present costs."""
        known = {asked: median(costs) for asked, costs in self._costs.items()}
        return DraftCosts(known.get("checked"), known.get("whole"))

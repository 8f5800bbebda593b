"""What a tower's passes cost now: running medians of their seconds, by rows and tokens.

A pass is bound by the weights up to some number of tokens and by its tokens beyond, and other
programs share the processor: so times are measured while requests run, and never assumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from statistics import median

from twotower.towers.decoding.services import PassTime

# Passes that a median is of; and how fast the number of rows in a pass follows the load.
_KEPT = 15
_FOLLOW = 0.1


class PassTimes:
    """Times of a tower's passes without prefill, in buckets of powers of two of their rows and of
    their tokens. `rows` is the running mean of the rows that share a pass.

    `fixed`: what is noted changes nothing, so that costs stay as they are; those of times that
    were fixed before the first pass are all equal.
    """

    def __init__(self, *, fixed: bool = False) -> None:
        self.fixed = fixed
        self.rows = 1.0
        self._curves: dict[int, _Curve] = {}

    def note(self, passed: PassTime) -> None:
        """Takes the time of a pass; that of one with prefill says nothing."""
        if self.fixed or passed.prefill_tokens:
            return
        self._curves.setdefault(passed.rows.bit_length(), _Curve()).note(passed)
        self.rows += _FOLLOW * (passed.rows - self.rows)

    @property
    def known(self) -> bool:
        """True once a pass has been noted."""
        return bool(self._curves)

    def cost(self, tokens: int) -> float:
        """A row's share, in seconds, of a pass over `tokens` tokens of each row that is in a pass
        now; as if a pass took a second while nothing is known."""
        rows = max(1.0, self.rows)
        if not self._curves:
            return 1.0 / rows
        wanted = round(rows).bit_length()
        bucket = min(self._curves, key=lambda known: abs(known - wanted))
        return self._curves[bucket].seconds(tokens * rows) / rows


class _Curve:
    """Seconds of passes of about as many rows, over their tokens."""

    def __init__(self) -> None:
        self._buckets: dict[int, deque[tuple[int, float]]] = {}
        # The medians of the buckets, in order of tokens; None once a pass has been noted since.
        self._points: tuple[list[float], list[float]] | None = None

    def note(self, passed: PassTime) -> None:
        bucket = self._buckets.setdefault(passed.tokens.bit_length(), deque(maxlen=_KEPT))
        bucket.append((passed.tokens, passed.seconds))
        self._points = None

    def seconds(self, tokens: float) -> float:
        """Between the buckets' medians on a line; beyond them as at the last."""
        if self._points is None:
            self._points = self._medians()
        sizes, times = self._points
        at = bisect_left(sizes, tokens)
        if at == 0 or at == len(sizes):
            return times[min(at, len(sizes) - 1)]
        share = (tokens - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])

    def _medians(self) -> tuple[list[float], list[float]]:
        sizes: list[float] = []
        times: list[float] = []
        for _, passes in sorted(self._buckets.items()):
            sizes.append(median(tokens for tokens, _ in passes))
            # A larger pass does not cost less: what looks so is noise.
            least = times[-1] if times else 0.0
            times.append(max(least, median(seconds for _, seconds in passes)))
        return sizes, times

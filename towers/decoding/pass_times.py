"""What a tower's passes cost now: running medians of their seconds, by rows and tokens.

A pass is bound by the weights up to some number of tokens and by its tokens beyond, and other
programs share the processor: so times are measured while requests run, and never assumed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque

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
        curve = self._curves.get(wanted)
        if curve is None:
            curve = self._curves[min(self._curves, key=lambda known: abs(known - wanted))]
        return curve.seconds(tokens * rows) / rows


class _Curve:
    """Seconds of passes of about as many rows, over their tokens."""

    def __init__(self) -> None:
        self._buckets: dict[int, deque[tuple[int, float]]] = {}
        # The median of each bucket's tokens and of its seconds.
        self._medians: dict[int, tuple[float, float]] = {}
        # The medians in order of tokens; None once a pass has been noted since.
        self._points: tuple[list[float], list[float]] | None = None

    def note(self, passed: PassTime) -> None:
        place = passed.tokens.bit_length()
        bucket = self._buckets.setdefault(place, deque(maxlen=_KEPT))
        bucket.append((passed.tokens, passed.seconds))
        tokens, seconds = zip(*bucket, strict=True)
        middle = len(bucket) // 2
        self._medians[place] = sorted(tokens)[middle], sorted(seconds)[middle]
        self._points = None

    def seconds(self, tokens: float) -> float:
        """Between the buckets' medians on a line; beyond them as at the last."""
        if self._points is None:
            self._points = self._line()
        sizes, times = self._points
        at = bisect_left(sizes, tokens)
        if at == 0 or at == len(sizes):
            return times[min(at, len(sizes) - 1)]
        share = (tokens - sizes[at - 1]) / (sizes[at] - sizes[at - 1])
        return times[at - 1] + share * (times[at] - times[at - 1])

    def _line(self) -> tuple[list[float], list[float]]:
        sizes, times = [], []
        least = 0.0
        for place in sorted(self._medians):
            size, seconds = self._medians[place]
            # A larger pass does not cost less: what looks so is noise.
            least = max(least, seconds)
            sizes.append(size)
            times.append(least)
        return sizes, times

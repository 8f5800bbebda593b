"""Chooses, round by round, who drafts the next tokens of a row and how many.

A round is one pass of the context tower: over the last committed token alone (a step), or over it
and a draft. It gives 1 + accepted tokens. With V tokens a second as the row's running rate, the
round that is worth most is the one with the largest

    E[tokens] - V * cost,

cost in seconds of the passes, the denoiser's included: what a dearer round takes longer, cheaper
rounds would have used at the running rate (Dinkelbach's rule for the best ratio of two sums). So a
draft of the denoiser is asked for only where it pays beside lookups, and a draft is as long as its
last tokens are worth. Expectations are learned from the row's own drafts, and start from those of
all rows before it.

A policy never changes tokens where drafts are checked strictly. Where they are not (`mix`), the
tokens depend on who drafts, and `StaticPolicy` chooses by the tokens alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from twotower.towers.decoding.pass_times import PassTimes
from twotower.towers.decoding.services import DraftCosts, NextDraft
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.results import DraftedBy

# Lengths of a pass with a draft, its first token included: few, as a GPU has a graph for each.
PASS_LENGTHS = (2, 4, 8, 16)
# Lookups by how many tokens matched: 1, 2, 3 and 4, 5 to 7, 8.
_CLASS_OF = (0, 0, 1, 2, 2, 3, 3, 3, 4)
# What is expected of a token of a lookup before anything is known, and of a draft of the denoiser.
_FIRST_RATES = (0.45, 0.6, 0.7, 0.8, 0.9)
_FIRST_ACCEPTED = 1.5
# Weights: of what all rows have shown in a row's expectation, and how fast old drafts fade.
_SHARED_WEIGHT = 2.0
_FADE_ROW, _FADE_ALL = 0.9, 0.995
# The share of the time of all rows in which the denoiser is tried, whatever is expected of it.
_TRY_SHARE = 0.01
# By tokens alone: a shorter match is left to the denoiser, a longer draft gives hardly more.
_STATIC_MATCH, _STATIC_LENGTH = 3, 8


@dataclass(frozen=True)
class Round:
    """What to do next: a step (`drafted_by` empty, `count` 0), a draft of `count` tokens from a
    lookup, or a draft of the denoiser of the kind `asks`."""

    drafted_by: DraftedBy = ""
    count: int = 0
    asks: NextDraft = ""


STEP = Round()


@dataclass
class _Mean:
    """A fading mean: `amount` over `weight`."""

    amount: float
    weight: float

    def note(self, amount: float, weight: float, fade: float) -> None:
        self.amount = self.amount * fade + amount
        self.weight = self.weight * fade + weight

    @property
    def value(self) -> float:
        return self.amount / self.weight


@dataclass
class _Learned:
    """Of one way of drawing (greedy or not), what drafts have given: accepted of each token of a
    lookup that was reached, by class of match; accepted of each draft of the denoiser, by kind;
    tokens a second."""

    rates: list[_Mean]
    accepted: dict[NextDraft, _Mean]
    speed: _Mean

    @classmethod
    def first(cls) -> _Learned:
        """What is expected before anything was seen."""
        return cls(
            [_Mean(4 * rate, 4.0) for rate in _FIRST_RATES],
            {"checked": _Mean(4 * _FIRST_ACCEPTED, 4.0), "whole": _Mean(4 * 15.0, 4.0)},
            _Mean(0.0, 0.0),
        )

    @classmethod
    def none(cls) -> _Learned:
        """Nothing, to be added to what others have seen."""
        kinds: tuple[NextDraft, ...] = ("checked", "whole")
        return cls(
            [_Mean(0.0, 0.0) for _ in _FIRST_RATES],
            {kind: _Mean(0.0, 0.0) for kind in kinds},
            _Mean(0.0, 0.0),
        )


@dataclass
class DraftExperience:
    """What the rows of an engine have shown so far; a row that begins starts from it. `to_try` are
    the seconds that may be spent on trying the denoiser."""

    _learned: dict[bool, _Learned] = field(default_factory=dict)
    to_try: float = 0.0

    def of(self, greedy: bool) -> _Learned:
        """What rows that draw alike have shown."""
        return self._learned.setdefault(greedy, _Learned.first())


class DraftPolicy(Protocol):
    """Chooses the rounds of one row."""

    def choose(self, match: int, room: int, costs: DraftCosts) -> Round:
        """The next round, where the last `match` tokens (0 to 8) stood before and a draft may have
        `room` tokens; `costs` are those of the denoiser's drafts."""

    def learn(self, match: int, count: int, accepted: int) -> None:
        """Takes the result of a round: a lookup of `count` tokens, or a step (`count` 0)."""

    def learn_draft(self, asked: NextDraft, accepted: int, costs: DraftCosts) -> None:
        """Takes the result of a draft of the denoiser."""


class StaticPolicy:
    """Lookups where enough tokens match, otherwise the denoiser if there is one: by tokens alone,
    so that a row that is drafted anew has the same rounds."""

    def __init__(self, params: GenerationParams, with_denoiser: bool) -> None:
        self._otherwise = Round("denoiser", asks="checked") if with_denoiser else STEP
        self._length = min(_STATIC_LENGTH, params.block_size)

    def choose(self, match: int, room: int, costs: DraftCosts) -> Round:  # noqa: ARG002
        if match < _STATIC_MATCH or room < 1 or self._length < 2:
            return self._otherwise
        return Round("lookup", min(self._length - 1, room))

    def learn(self, match: int, count: int, accepted: int) -> None:
        """Nothing is learned."""

    def learn_draft(self, asked: NextDraft, accepted: int, costs: DraftCosts) -> None:
        """Nothing is learned."""


class LearningPolicy:
    """The round that is worth most, by measured pass times and what drafts have given.

    `asks` are the kinds of drafts that the denoiser may be asked for.
    """

    def __init__(
        self,
        params: GenerationParams,
        times: PassTimes,
        experience: DraftExperience,
        asks: tuple[NextDraft, ...],
    ) -> None:
        self._times = times
        self._experience = experience
        self._all = experience.of(params.temperature == 0)
        self._own = _Learned.none()
        self._asks = asks
        self._block = params.block_size

    def choose(self, match: int, room: int, costs: DraftCosts) -> Round:
        speed, cost = self._speed(), self._times.cost
        best, most = STEP, 1.0 - speed * cost(1)
        if match and room:
            rate = self._rate(_CLASS_OF[match])
            for length in PASS_LENGTHS:
                count = min(length - 1, room)
                worth = 1.0 + _run(rate, count) - speed * cost(1 + count)
                if worth > most:
                    best, most = Round("lookup", count), worth
                if count == room:
                    break
        for asks in self._asks:
            dear = self._draft_cost(asks, costs)
            worth = self._drafted(asks) - speed * dear
            if worth > most or self._tries(asks, dear):
                best, most = Round("denoiser", asks=asks), max(worth, most)
        return best

    def learn(self, match: int, count: int, accepted: int) -> None:
        if count:
            reached = accepted + (accepted < count)
            place = _CLASS_OF[match]
            self._own.rates[place].note(accepted, reached, _FADE_ROW)
            self._all.rates[place].note(accepted, reached, _FADE_ALL)
        self._note_speed(1 + accepted, self._times.cost(1 + count))

    def learn_draft(self, asked: NextDraft, accepted: int, costs: DraftCosts) -> None:
        for learned, fade in ((self._own, _FADE_ROW), (self._all, _FADE_ALL)):
            learned.accepted[asked].note(accepted, 1.0, fade)
        self._note_speed(1 + accepted, self._draft_cost(asked, costs))

    def _note_speed(self, tokens: int, seconds: float) -> None:
        self._experience.to_try += _TRY_SHARE * seconds
        self._own.speed.note(tokens, seconds, _FADE_ROW)
        self._all.speed.note(tokens, seconds, _FADE_ALL)

    def _speed(self) -> float:
        """Tokens a second of the row, at first of all rows; a step's before there are any."""
        own, every = self._own.speed, self._all.speed
        if not every.weight:
            return 1.0 / self._times.cost(1)
        # As much of the others' time as that of a few steps.
        shared = _SHARED_WEIGHT * self._times.cost(1)
        return (own.amount + shared * every.value) / (own.weight + shared)

    def _rate(self, place: int) -> float:
        return _joined(self._own.rates[place], self._all.rates[place])

    def _drafted(self, asks: NextDraft) -> float:
        """Tokens that a draft of the denoiser is expected to give; rows with longer blocks may have
        shown more than one of this row has."""
        accepted = _joined(self._own.accepted[asks], self._all.accepted[asks])
        return 1.0 + min(accepted, self._block - 1.0)

    def _draft_cost(self, asks: NextDraft, costs: DraftCosts) -> float:
        """Seconds of a draft and its check. Where no draft of the kind has been timed, a pass of
        the denoiser is taken for as long as that of a checked draft, or else as the check, and a
        whole block for as many as it has tokens."""
        check = self._times.cost(self._block)
        draft = costs.of(asks)
        if draft is None:
            one = check if costs.checked is None else costs.checked
            draft = one * (self._block if asks == "whole" else 1)
        return draft + check

    def _tries(self, asks: NextDraft, seconds: float) -> bool:
        """True once in a while, so that a denoiser that would pay is noticed: the more seldom, the
        more seconds a draft costs."""
        if asks != "checked" or self._experience.to_try < seconds:
            return False
        self._experience.to_try = 0.0
        return True


def policy_of(
    params: GenerationParams,
    times: PassTimes,
    experience: DraftExperience,
    *,
    with_denoiser: bool,
) -> DraftPolicy:
    """The policy of a row. `with_denoiser`: a denoiser tower follows the context tower."""
    drafts = with_denoiser and params.uses_denoiser
    if params.mix and not params.traits.chooses:
        return StaticPolicy(params, drafts)
    asks: tuple[NextDraft, ...] = ()
    if drafts:
        asks = ("checked", "whole") if params.may_commit_whole else ("checked",)
    return LearningPolicy(params, times, experience, asks)


def _run(rate: float, count: int) -> float:
    """Expected length of a run of at most `count` tokens, each accepted with `rate`."""
    if rate >= 1.0:
        return float(count)
    return float(rate * (1.0 - rate**count) / (1.0 - rate))


def _joined(own: _Mean, every: _Mean) -> float:
    """The row's own mean, with what all rows have shown for a few of its drafts."""
    weight = own.weight + _SHARED_WEIGHT
    return (own.amount + _SHARED_WEIGHT * every.value) / weight

"""A map of placements: tokens/s per GPU over rows and tokens per pass, and where they are equal.

The rows are those of a denoiser, or of a GPU of AR. What "tokens per pass" means depends on the
mode:

- `ar`: nothing; its context tower always makes one token a pass and row.
- `lookup`: nothing either; a round of lookups yields the question's `lookup_tokens`.
- diffusion (`1:1`, `1:N`, `colocated`): tokens that a denoiser pass commits in the mean, so a block
  takes 16 over that many denoiser passes, and one extension besides, which does not count.
- `verified`: tokens that a cycle yields in the mean. A cycle is one denoiser pass, which drafts a
  block, and one pass of the context tower, which checks it and draws the last token itself.

Diffusion's speed is that under continuous batching, when no row waits for another's block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Literal

from twotower.planner import commits
from twotower.planner.axes import BATCHES, TOKENS
from twotower.planner.devices import device_named
from twotower.planner.drafts import KNOWN
from twotower.planner.estimates import Decoding, Estimate, Estimator
from twotower.planner.floors import PassKind
from twotower.planner.measured import MeasuredPasses, by_format
from twotower.planner.passes import PassBasis, Reached
from twotower.planner.plan import Input, inputs_of, planned_formats, reached_on
from twotower.planner.question import Experts, Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import LARGE
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

Mode = Literal["ar", "lookup", "verified", "colocated", "1:1", "1:N"]
MODES: tuple[Mode, ...] = ("ar", "lookup", "verified", "colocated", "1:1", "1:N")
_KINDS: tuple[PassKind, ...] = ("ar", "denoise", "extend", "verify")
_DIFFUSION: tuple[Mode, ...] = ("colocated", "1:1", "1:N")
# Who is compared with whom; of several modes the fastest counts.
LINES: dict[str, tuple[tuple[Mode, ...], Mode]] = {
    "diffusion = ar": (_DIFFUSION, "ar"),
    "colocated = ar": (("colocated",), "ar"),
    "1:1 = ar": (("1:1",), "ar"),
    "1:N = ar": (("1:N",), "ar"),
    "verified = ar": (("verified",), "ar"),
    "diffusion = lookups": (_DIFFUSION, "lookup"),
    "verified = lookups": (("verified",), "lookup"),
    "colocated = 1:1": (("colocated",), "1:1"),
    "1:N = colocated": (("1:N",), "colocated"),
}
# Published speed-up of the released model, and what it says of tokens per pass if every pass costs
# as much as an AR step: 16 / (n + 1) = 2.42 for n denoiser passes a block.
_PUBLISHED = 2.42


@dataclass(frozen=True)
class Point:
    """A known number of tokens per pass, where it comes from, and which way of decoding it is of:
    as of Estimate.decoding."""

    name: str
    tokens: float
    source: str
    decoding: Decoding = "mask_diffusion"


@dataclass(frozen=True)
class Cell:
    """The fastest placement of each mode at a number of rows and of tokens per pass; modes that fit
    nowhere are left out."""

    fastest: dict[Mode, Estimate]

    def per_gpu(self, mode: Mode) -> float:
        """Tokens/s per GPU; 0 if the mode does not fit."""
        return self.fastest[mode].per_gpu if mode in self.fastest else 0.0

    @property
    def best(self) -> Mode | None:
        """The mode with most tokens/s per GPU; None if nothing fits."""
        return max(self.fastest, key=self.per_gpu, default=None)


@dataclass(frozen=True)
class Crossing:
    """`tokens` per pass from which on a mode is at least as fast as another, or None and why:
    `always`, `never` (within the map), or `does not fit`, where one of both has no speed."""

    tokens: float | None
    says: str = ""


@dataclass(frozen=True)
class Panel:
    """The map for one format of the experts: cells[tokens][batch], and for each kind of pass where
    its time at each batch comes from."""

    experts: Experts
    batches: tuple[int, ...]
    tokens: tuple[float, ...]
    cells: tuple[tuple[Cell, ...], ...]
    basis: dict[PassKind, tuple[PassBasis, ...]]

    def speed(self, mode: Mode, column: int, tokens: float) -> float:
        """Tokens/s per GPU at a batch and any number of tokens per pass within the map; 0 if the
        mode does not fit.

        Between two cells the seconds a token are taken to be linear in the passes a block (of
        `verified` in the cycles), as they are by definition without waiting.
        """
        above = next((i for i, at in enumerate(self.tokens) if at >= tokens), len(self.tokens) - 1)
        below = max(0, above - 1)
        slow, fast = (self.cells[row][column].per_gpu(mode) for row in (below, above))
        if not slow or not fast or below == above:
            return fast
        few, many = 1 / self.tokens[above], 1 / self.tokens[below]
        share = (1 / tokens - few) / (many - few)
        return 1 / (1 / fast + (1 / slow - 1 / fast) * share)

    def fastest(self, modes: Sequence[Mode], column: int, tokens: float) -> Mode | None:
        """The mode with most tokens/s per GPU; None if none of them fits."""
        speeds = {mode: self.speed(mode, column, tokens) for mode in modes}
        fitting = [mode for mode in modes if speeds[mode]]
        return max(fitting, key=lambda mode: speeds[mode], default=None)

    def speed_of(self, modes: Sequence[Mode], column: int, tokens: float) -> float:
        """Tokens/s per GPU of the fastest of several modes; 0 if none fits."""
        return max(self.speed(mode, column, tokens) for mode in modes)

    def lookups(self, column: int) -> Crossing:
        """Tokens that a round of lookups has to yield, at a batch, to be as fast as `ar`."""
        fastest = self.cells[0][column].fastest
        if "lookup" not in fastest:
            return Crossing(None, "does not fit")
        even = fastest["lookup"].break_even
        return Crossing(even, "" if even is not None else "never")

    def crossing(self, line: str, column: int) -> Crossing:
        """Where, at a batch, the first side of a line of LINES gets ahead of the second."""
        modes, other = LINES[line]
        return _crossing(
            self.tokens,
            lambda tokens: self.speed_of(modes, column, tokens),
            lambda tokens: self.speed(other, column, tokens),
        )


@dataclass(frozen=True)
class PlacementMap:
    """Panels by format of the experts, the inputs they rest on, and known tokens per pass."""

    question: Question
    panels: tuple[Panel, ...]
    inputs: tuple[Input, ...]
    points: tuple[Point, ...]

    def crossing(self, column: int) -> Crossing:
        """Where, at a batch, diffusion gets ahead of `ar`, each in its faster format."""
        panels = self.panels
        return _crossing(
            panels[0].tokens,
            lambda tokens: max(own.speed_of(_DIFFUSION, column, tokens) for own in panels),
            lambda tokens: max(own.speed("ar", column, tokens) for own in panels),
        )


def make_map(
    question: Question,
    batches: Sequence[int] = BATCHES,
    tokens: Sequence[float] = TOKENS,
    config: TwoTowerConfig = LARGE,
    measured: Sequence[MeasuredPasses] = (),
    reached: Reached | None = None,
    say: Callable[[int, int], None] | None = None,
) -> PlacementMap:
    """The map of a question, whose own batch and tokens per pass do not count. `say` hears how many
    cells of how many are done. Raises ConfigError for axes that do not ascend or are out of range,
    and for measured passes that cannot be merged."""
    _check_axis("batches", batches, 1, None)
    _check_axis("tokens_per_pass", tokens, 1, BLOCK)
    reached = reached or reached_on(device_named(question.gpu))
    known = by_format(measured)
    formats = planned_formats(question, config, known)
    question = replace(question, experts=formats, tokens_per_nfe=tokens[0], batch=batches[0])
    config = replace(config, quantized_experts=False)
    size = len(batches) * len(tokens)
    panels: list[Panel] = []
    for experts in formats:
        estimator = Estimator(question, config, experts, known.get(experts), reached)
        started = partial(_said, say, len(panels) * size, len(formats) * size)
        panels.append(_panel(estimator, experts, batches, tokens, started))
    on_axis = ("commits", "checked drafts")
    inputs = [each for each in inputs_of(question, known, reached) if each.name not in on_axis]
    axis = f"{tokens[0]:g} to {tokens[-1]:g}, the map's axis"
    inputs.append(Input("tokens per pass", axis, "given", "see the known points for texts"))
    return PlacementMap(question, tuple(panels), tuple(inputs), tuple(known_points()))


def known_points() -> Iterator[Point]:
    """Tokens per pass of the released model at threshold 0.8, and at its published speed-up; and
    what lookups and checked drafts have yielded."""
    for text, by_threshold in commits.TOKENS_PER_NFE.items():
        source = f"threshold 0.8, {commits.TEXTS[text]}; public reproduction"
        yield Point(text, by_threshold[0.8], source)
    yield Point(
        f"published {_PUBLISHED:g}x",
        BLOCK / (BLOCK / _PUBLISHED - 1),
        "derived: 98.7 % of the quality at 2.42 times AR, threshold 0.8; its tokens per pass are "
        "not published, so these are those that give 2.42 if every pass costs an AR step",
    )
    for known in KNOWN:
        decoding: Decoding = "lookup" if known.drafter == "lookup" else "verified"
        yield Point(known.name, known.tokens, known.source, decoding)


def _panel(
    estimator: Estimator,
    experts: Experts,
    batches: Sequence[int],
    tokens: Sequence[float],
    say: Callable[[int], None],
) -> Panel:
    cells: list[tuple[Cell, ...]] = []
    for each in tokens:
        row = []
        for batch in batches:
            row.append(_cell(estimator.at(batch, each), each))
            say(len(cells) * len(batches) + len(row))
        cells.append(tuple(row))
    basis = {
        kind: tuple(estimator.passes.basis(kind, batch) for batch in batches) for kind in _KINDS
    }
    return Panel(experts, tuple(batches), tuple(tokens), tuple(cells), basis)


def _cell(estimator: Estimator, tokens: float) -> Cell:
    pairs, ar = list(estimator.pairs()), estimator.ar()
    tried: dict[Mode, list[Estimate]] = {
        "ar": [ar],
        "lookup": [estimator.lookups(ar)],
        "verified": list(estimator.verified(tokens)),
        "colocated": [estimator.colocated()],
        "1:1": pairs[:1],
        "1:N": pairs[1:],
    }
    fitting = {mode: [own for own in found if own.fits] for mode, found in tried.items()}
    return Cell(
        {mode: max(own, key=lambda each: each.per_gpu) for mode, own in fitting.items() if own}
    )


def _said(say: Callable[[int, int], None] | None, before: int, count: int, done: int) -> None:
    if say is not None:
        say(before + done, count)


def _check_axis(name: str, values: Sequence[float], least: int, most: int | None) -> None:
    shown = ",".join(f"{value:g}" for value in values)
    if not values or any(not low < high for low, high in pairwise(values)):
        raise ConfigError(f"{name}: got {shown or 'nothing'}, expected ascending numbers")
    if not values[0] >= least or (most is not None and values[-1] > most):
        limits = f"{least} to {most}" if most is not None else f"at least {least}"
        raise ConfigError(f"{name}: got {shown}, expected {limits}")


def _crossing(
    tokens: Sequence[float], own: Callable[[float], float], other: Callable[[float], float]
) -> Crossing:
    """Where `own`, a speed by tokens per pass, gets ahead of `other`, for good within `tokens`."""

    def ahead(at: float) -> float:
        speed, against = own(at), other(at)
        return 1 / against - 1 / speed if speed and against else math.nan

    found = [ahead(at) for at in tokens]
    if any(math.isnan(each) for each in found):
        return Crossing(None, "does not fit")
    behind = [place for place, each in enumerate(found) if each < 0]
    if not behind:
        return Crossing(None, "always")
    if behind[-1] == len(found) - 1:
        return Crossing(None, "never")
    return Crossing(_root(ahead, tokens[behind[-1]], tokens[behind[-1] + 1]))


def _root(ahead: Callable[[float], float], low: float, high: float) -> float:
    """Where `ahead`, negative at `low` and not at `high`, becomes 0."""
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if ahead(middle) < 0 else (low, middle)
    return high

"""Seconds of every kind of pass: modelled from its floor, and corrected by measured passes."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from twotower.planner.floors import (
    MASKED,
    Ceilings,
    PassKind,
    PassShape,
    Work,
    expected_unique,
    floor_seconds,
    pass_works,
    shape_of,
)
from twotower.planner.measured import MeasuredPasses
from twotower.planner.schedules import BLOCK
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.state.tensors import slot_bytes

# Independent draws that give as many unique experts as one block of real text: 34, as measured. The
# 16 tokens of a block count as fewer draws because they resemble each other.
TEXT_DRAWS = 6.5
# Tokens of a prefill pass, in which a scan walks over chunks of 64.
_PREFILL_CHUNKS, _CHUNK = 16, 64


@dataclass(frozen=True)
class Reached:
    """Shares of a device's ceilings that kernels reach, and seconds that each launch adds.

    Products of experts in 8 bits reach `fp8` of these shares.
    """

    bandwidth: float = 0.85
    flops: float = 0.75
    launch_s: float = 3e-6
    fp8: float = 1.0

    def of(self, ceilings: Ceilings) -> Ceilings:
        """The rates that are reached."""
        return Ceilings(
            self.bandwidth * ceilings.bytes_per_s,
            self.flops * ceilings.matmul_flops,
            self.flops * ceilings.wide_flops,
            self.flops * ceilings.narrow_flops,
        )


FLOOR = Reached(1.0, 1.0, 0.0)
_EXPERTS = ("experts_up", "experts_down")
# Where the time of a pass comes from: it was measured with so many rows, is a verification where an
# extension was, lies between such numbers of rows, beyond them all, or was not measured at all.
PassBasis = Literal["measured", "extension", "between", "beyond", "modelled"]


@dataclass(frozen=True)
class Passes:
    """Seconds of all passes of a model on a device, for rows of `context` tokens.

    Kinds of pass that were measured: the modelled seconds times the ratio of measured to modelled
    ones, interpolated over the logarithm of the rows between the numbers of rows that were
    measured; beyond them the ratio of the nearest. A verification is an extension with a head:
    where only extensions were measured it has their ratio.
    """

    config: TwoTowerConfig
    ceilings: Ceilings
    context: int
    fp8: bool
    reached: Reached = Reached()
    measured: MeasuredPasses | None = None

    def denoise(self, rows: int) -> float:
        """A denoiser pass over the blocks of so many rows."""
        return self._seconds("denoise", rows)

    def extend(self, rows: int) -> float:
        """The context tower's pass over the committed blocks of so many rows."""
        return self._seconds("extend", rows)

    def ar(self, rows: int) -> float:
        """The context tower's pass for one token of so many rows."""
        return self._seconds("ar", rows)

    def verify(self, rows: int) -> float:
        """The context tower's pass over the drafts of so many rows, heads included."""
        return self._seconds("verify", rows)

    def check(self, rows: int, tokens: int) -> float:
        """The context tower's pass over `tokens` tokens (1 to BLOCK) of so many rows, heads
        included: the last of the row and drafted ones.

        Of one token it is an AR pass, of a block a verification. Between them the ratio of measured
        to modelled seconds is interpolated over the logarithm of the tokens.
        """
        first, last = (self._ratio(kind, rows) for kind in ("ar", "verify"))
        share = math.log(tokens) / math.log(BLOCK)
        modelled = self.modelled("verify", rows, self.context, tokens)
        return modelled * (first + (last - first) * share)

    def cycle(self, rows: int) -> float:
        """A draft of one denoiser pass and its verification: both passes, times the measured ratio
        of whole cycles to their passes, if there is one."""
        passes = self.denoise(rows) + self.verify(rows)
        if self.measured is None or not self.measured.cycles:
            return passes
        return passes * _between(self.measured.cycles, rows)

    def basis(self, kind: PassKind, rows: int) -> PassBasis:
        """Where the time of a pass of so many rows comes from."""
        ratios = [at for at, _ in self._ratios(kind)]
        if self.measured is None or not ratios:
            return "modelled"
        if rows in [at for at, _ in self.measured.seconds.get(kind, ())]:
            return "measured"
        if rows in ratios:
            return "extension"
        return "between" if ratios[0] < rows < ratios[-1] else "beyond"

    def land(self, rows: int) -> float:
        """Replay of so many rows' blocks into the denoiser's mirrors of their states."""
        moved = 2 * rows * slot_bytes(self.config, torch.bfloat16)
        return moved / self.reached.of(self.ceilings).bytes_per_s

    def prefill(self, prompt: int) -> float:
        """All passes over a prompt of so many tokens."""
        tokens = _PREFILL_CHUNKS * _CHUNK
        unique = expected_unique(self.config, tokens)
        size = 1 if self.fp8 else 2
        shape = PassShape(
            _PREFILL_CHUNKS, _CHUNK, prompt // 2, unique, 0.0, True, expert_bytes=size
        )
        return prompt / tokens * self._of(pass_works(self.config, shape))

    def modelled(self, kind: PassKind, rows: float, context: int, block: int = BLOCK) -> float:
        """Seconds of a pass without regard to measured ones; `block` tokens of a row, unless it is
        an AR pass."""
        whole = max(1, round(rows))
        shape = shape_of(
            kind,
            self.config,
            whole,
            context,
            block,
            unique=expected_unique(self.config, TEXT_DRAWS * whole) if kind == "denoise" else None,
            masked=MASKED,
            expert_bytes=1 if self.fp8 else 2,
        )
        return self._of(pass_works(self.config, shape))

    def _seconds(self, kind: PassKind, rows: float) -> float:
        return self.modelled(kind, rows, self.context) * self._ratio(kind, rows)

    def _ratio(self, kind: PassKind, rows: float) -> float:
        """Measured to modelled seconds; 1 if none of the kind were measured."""
        ratios = self._ratios(kind)
        return _between(ratios, rows) if ratios else 1.0

    def _ratios(self, kind: PassKind) -> list[tuple[float, float]]:
        """Measured rows, ascending, and the ratio of measured to modelled seconds at each."""
        if self.measured is None:
            return []
        similar: tuple[PassKind, ...] = ("extend", "verify") if kind == "verify" else (kind,)
        ratios = {
            at: seconds / self.modelled(own, at, self.measured.context)
            for own in similar
            for at, seconds in self.measured.seconds.get(own, ())
        }
        return sorted(ratios.items())

    def _of(self, works: Sequence[Work]) -> float:
        launches = sum(work.launches for work in works)
        rates = self.reached.of(self.ceilings)
        seconds = floor_seconds(works, rates) + launches * self.reached.launch_s
        if self.fp8:
            experts = floor_seconds([work for work in works if work.name in _EXPERTS], rates)
            seconds += experts * (1 / self.reached.fp8 - 1)
        return seconds


def _between(points: Sequence[tuple[float, float]], rows: float) -> float:
    """Interpolates linearly over the logarithm of the rows; beyond the points, the value of the
    nearest."""
    place = bisect_left([at for at, _ in points], rows)
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (low, before), (high, after) = points[place - 1], points[place]
    share = math.log(rows / low) / math.log(high / low)
    return before + (after - before) * share

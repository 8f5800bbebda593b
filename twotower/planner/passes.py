"""Seconds of every kind of pass: its floor, what is usually reached of it, or what was measured."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
from twotower.planner.schedules import BLOCK
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.state.tensors import slot_bytes

# Independent draws that give 34 unique experts for one block of real text, as measured; without
# likeness between a block's tokens they were 16.
TEXT_DRAWS = 6.5
# Tokens of a prefill pass, in which a scan walks over chunks of 64.
_PREFILL_CHUNKS, _CHUNK = 16, 64


@dataclass(frozen=True)
class Reached:
    """What kernels reach of a device's ceilings, and seconds that each launch takes beside."""

    bandwidth: float = 0.85
    flops: float = 0.75
    launch_s: float = 3e-6

    def of(self, ceilings: Ceilings) -> Ceilings:
        """The rates that are reached."""
        return Ceilings(
            self.bandwidth * ceilings.bytes_per_s,
            self.flops * ceilings.matmul_flops,
            self.flops * ceilings.wide_flops,
        )


FLOOR = Reached(1.0, 1.0, 0.0)


@dataclass(frozen=True)
class Measured:
    """Seconds of passes of one kind by rows, at a context of so many tokens; rows ascend."""

    context: int
    seconds: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Passes:
    """All passes of a model on a device, for rows of `context` tokens.

    Where passes were measured, the model's seconds are multiplied by how far it was off at the
    nearest numbers of rows.
    """

    config: TwoTowerConfig
    ceilings: Ceilings
    context: int
    fp8: bool
    reached: Reached = Reached()
    measured: Mapping[PassKind, Measured] = field(default_factory=dict)

    def denoise(self, rows: int) -> float:
        """One denoiser pass over the blocks of so many rows."""
        return self._seconds("denoise", rows)

    def extend(self, rows: int) -> float:
        """The context tower's pass over the committed blocks of so many rows."""
        return self._seconds("extend", rows)

    def ar(self, rows: int) -> float:
        """The context tower's pass for one token of so many rows."""
        return self._seconds("ar", rows)

    def land(self, rows: int) -> float:
        """Replay of so many rows' blocks into a denoiser's own copy of the states."""
        moved = 2 * rows * slot_bytes(self.config, torch.bfloat16)
        return moved / self.reached.of(self.ceilings).bytes_per_s

    def prefill(self, prompt: int) -> float:
        """All passes over one prompt."""
        tokens = _PREFILL_CHUNKS * _CHUNK
        unique = expected_unique(self.config, tokens)
        size = 1 if self.fp8 else 2
        shape = PassShape(
            _PREFILL_CHUNKS, _CHUNK, prompt // 2, unique, 0.0, True, expert_bytes=size
        )
        return prompt / tokens * self._of(pass_works(self.config, shape))

    def modelled(self, kind: PassKind, rows: float, context: int) -> float:
        """A pass's seconds without regard to measurements."""
        whole = max(1, round(rows))
        shape = shape_of(
            kind,
            self.config,
            whole,
            context,
            BLOCK,
            unique=expected_unique(self.config, TEXT_DRAWS * whole) if kind == "denoise" else None,
            masked=MASKED,
            expert_bytes=1 if self.fp8 else 2,
        )
        return self._of(pass_works(self.config, shape))

    def _seconds(self, kind: PassKind, rows: int) -> float:
        own = self.modelled(kind, rows, self.context)
        known = self.measured.get(kind)
        if known is None:
            return own
        ratios = [
            (at, seconds / self.modelled(kind, at, known.context)) for at, seconds in known.seconds
        ]
        return own * _between(ratios, rows)

    def _of(self, works: Sequence[Work]) -> float:
        launches = sum(work.launches for work in works)
        rates = self.reached.of(self.ceilings)
        return floor_seconds(works, rates) + launches * self.reached.launch_s


def _between(points: Sequence[tuple[float, float]], rows: float) -> float:
    """On a line over the logarithm of the rows; beyond the points, the nearest one's value."""
    place = bisect_left([at for at, _ in points], rows)
    if place in (0, len(points)):
        return points[min(place, len(points) - 1)][1]
    (low, before), (high, after) = points[place - 1], points[place]
    share = math.log(rows / low) / math.log(high / low)
    return before + (after - before) * share

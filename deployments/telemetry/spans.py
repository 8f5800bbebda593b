"""When a completion and its phases began and ended, as spans of a trace: plain values.

The pair says how long each phase of a block took (BlockTiming); spans are made from that when the
completion has ended, so nothing of tracing is in the towers or on a stream's path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower.towers.decoding.services import BlockTiming
from twotower.towers.request.modes import MODES, TRAITS

# Modes whose commit is a pass over the denoiser's draft of the block, after it (what the context
# tower has drafted has none); in the others the context tower reads the block before while this one
# is denoised.
COMMIT_AFTER_DRAFT = tuple(mode for mode in MODES if TRAITS[mode].unit == "draft")
BLOCK = "twotower.block"


@dataclass(frozen=True)
class Phase:
    """A part of a completion; times are seconds of the wall clock."""

    name: str
    begin: float
    end: float
    attributes: dict[str, Any]


@dataclass
class Trace:
    """A completion for its trace. `traceparent` is the W3C context that it belongs to."""

    traceparent: str | None
    begin: float
    mode: str
    end: float = 0.0
    attributes: dict[str, Any] = field(default_factory=dict)
    error: str | None = None
    blocks: Sequence[tuple[BlockTiming, Mapping[str, Any]]] = field(default_factory=list)

    def phases(self) -> Iterator[Phase]:
        """The phases of all blocks, in order of the blocks."""
        last = 0.0
        for index, (timing, costs) in enumerate(self.blocks):
            number = {BLOCK: index}
            if timing.commit_s and self.mode not in COMMIT_AFTER_DRAFT:
                # That of the block before, from its end on.
                yield Phase("commit", last, last + timing.commit_s, {BLOCK: index - 1})
            yield from _begin(timing, number)
            last = _drafted(timing)
            yield Phase("denoise", last - timing.denoise_s, last, {**number, **costs})
            if timing.commit_s and self.mode in COMMIT_AFTER_DRAFT:
                yield Phase("commit", last, last + timing.commit_s, number)


def _begin(timing: BlockTiming, number: dict[str, Any]) -> Iterator[Phase]:
    """What comes before a block is denoised."""
    at = timing.begin
    named = (("queue", timing.queue_s), ("prefill", timing.prefill_s))
    for name, seconds in (*named, ("transfer", timing.transfer_s)):
        if seconds:
            yield Phase(name, at, at + seconds, number)
            at += seconds


def _drafted(timing: BlockTiming) -> float:
    """When the tokens of a block, or its draft, were there."""
    waited = timing.queue_s + timing.prefill_s + timing.transfer_s
    return timing.begin + waited + timing.denoise_s

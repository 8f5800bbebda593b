"""When a completion and its phases began and ended, as spans of a trace: plain values.

The pair says how long each phase of a block took (BlockTiming); spans are made from that when the
completion has ended, so nothing of tracing is in the towers or on a stream's path.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twotower.towers.decoding.services import BlockTiming

# Modes whose commit is a pass over the block's own draft, after it; in the others the context
# tower reads the block before while this one is denoised.
COMMIT_AFTER_DRAFT = ("verified",)


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
        """The phases of all blocks, those of a block in the order in which they began."""
        for index, (timing, attributes) in enumerate(self.blocks):
            yield from _phases(timing, {"twotower.block": index, **attributes}, self.mode)


def _phases(timing: BlockTiming, attributes: dict[str, Any], mode: str) -> Iterator[Phase]:
    at = timing.begin
    head = {"twotower.block": attributes["twotower.block"]}
    if timing.queue_s or timing.prefill_s:
        yield Phase("queue", at, at + timing.queue_s, head)
        at += timing.queue_s
        yield Phase("prefill", at, at + timing.prefill_s, head)
        at += timing.prefill_s
    after = mode in COMMIT_AFTER_DRAFT
    if timing.commit_s and not after:
        yield Phase("commit", at, at + timing.commit_s, head)
    if timing.transfer_s:
        yield Phase("transfer", at, at + timing.transfer_s, head)
        at += timing.transfer_s
    yield Phase("denoise", at, at + timing.denoise_s, attributes)
    at += timing.denoise_s
    if timing.commit_s and after:
        yield Phase("commit", at, at + timing.commit_s, head)

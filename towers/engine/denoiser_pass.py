"""One pass of the denoiser tower over blocks of many rows, and what is drawn from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from twotower.towers.decoding.sampling import Draw, Drawn, draw_tokens
from twotower.towers.engine.denoiser_steps import DenoiserSteps, DeviceDraft, StepResult
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState


@dataclass(frozen=True)
class DrawWork:
    """A pass over a block, of which `wanted` positions are drawn; what comes of them is the
    submitter's business."""

    state: ContextState
    tokens: Sequence[int]
    timestep: float | None
    wanted: Sequence[int]
    draw: Draw


@dataclass(frozen=True)
class StepWork:
    """A step of a block that is kept, drawn and committed on the device."""

    state: ContextState
    draft: DeviceDraft

    @property
    def tokens(self) -> Sequence[int]:
        """As many as the block has; the ids are on the device."""
        return range(self.draft.length)


DenoiserWork = DrawWork | StepWork
DenoiserResult = Drawn | StepResult


class DenoiserPass:
    """Runs works of several rows: draws as one packed pass, steps by their block's length."""

    def __init__(self, tower: DenoiserTower, steps: DenoiserSteps | None) -> None:
        self._tower = tower
        self._steps = steps

    def run(self, works: Sequence[DenoiserWork]) -> list[DenoiserResult | BaseException]:
        """One result per work; an error there concerns its row alone."""
        drawing = [work for work in works if isinstance(work, DrawWork)]
        stepping = [work for work in works if isinstance(work, StepWork)]
        drawn = iter(self._draw(drawing) if drawing else ())
        stepped = iter(self._step(stepping))
        return [next(drawn if isinstance(work, DrawWork) else stepped) for work in works]

    def _draw(self, works: Sequence[DrawWork]) -> list[DenoiserResult | BaseException]:
        hidden = self._tower.forward(
            [work.tokens for work in works],
            [work.timestep for work in works],
            [work.state for work in works],
        )
        ends = accumulate(len(work.tokens) for work in works)
        wanted = [
            end - len(work.tokens) + offset
            for end, work in zip(ends, works, strict=True)
            for offset in work.wanted
        ]
        return list(draw_tokens(self._tower.logits(hidden[wanted]), [work.draw for work in works]))

    def _step(self, works: Sequence[StepWork]) -> list[DenoiserResult | BaseException]:
        if not works:
            return []
        assert self._steps is not None
        results = self._steps.run([(work.state, work.draft) for work in works])
        return list(results)

"""The autoregressive step of many rows over fixed buffers: read a token, draw the next, advance.

Everything that a step needs is sent in one transfer and one graph is replayed; the host waits once,
for the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from twotower.kernels import dispatch
from twotower.towers.engine.buckets import bucket_for, buckets_up_to, run_in_parts
from twotower.towers.engine.context_work import ContextResult, ContextWork, result_of
from twotower.towers.engine.cuda_graph import GraphMemory, Program, Programs, Results
from twotower.towers.engine.staged_draws import (
    DRAW_INPUTS,
    DRAW_PADDING,
    draw_inputs,
    drawn_of,
    staged_sampling,
)
from twotower.towers.errors import NumericalError
from twotower.towers.model.backbone import MixerInputs
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.tensors import StateTensors


class ContextSteps:
    """Steps of rows whose states live in one pool, which is that of the first step."""

    def __init__(self, tower: ContextTower, memory: GraphMemory) -> None:
        self._tower = tower
        self._memory = memory
        self._programs: Programs[int, _Program] = Programs(self._new_program)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """Each row's state takes its token; the token drawn after it, and the row's last hidden
        state. Only for works that are steps, see `ContextWork.is_step`."""
        return run_in_parts(works, lambda _: (1,), self._run_part)

    def warm_up(self, pool: StateTensors, rows: int) -> None:
        """Captures the graphs of all steps of up to `rows` rows."""
        for bucket in buckets_up_to(rows):
            self._programs.of(pool, bucket).capture()

    def _run_part(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        return self._programs.of(works[0].state.pool, bucket_for(len(works))).run(works)

    def _new_program(self, pool: StateTensors, rows: int) -> _Program:
        return _Program(self._tower, pool, rows, self._memory)


class _Program(Program):
    """The step of up to B rows over fixed buffers."""

    def __init__(
        self, tower: ContextTower, pool: StateTensors, rows: int, memory: GraphMemory
    ) -> None:
        inputs = ("token", *DRAW_INPUTS)
        super().__init__(pool, rows, 1, memory, inputs, padding=DRAW_PADDING)
        self._tower = tower
        self._log = tower.new_log(rows, whole=True)
        shape = (rows, tower.config.hidden_size)
        self._hidden = torch.zeros(shape, dtype=tower.dtype, device=tower.device)
        self._results = Results((4, rows), tower.device)
        self._ones = torch.ones_like(self._slots)
        self._work = self._add(self._forward)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """See `ContextSteps.run`; at most B rows."""
        draws = [work.draw for work in works if work.draw is not None]
        self._begin(
            token=[work.tokens[0] for work in works],
            slot=[work.state.slot for work in works],
            context_lens=[work.state.length for work in works],
            **draw_inputs(draws),
        )
        self._work()
        lines = self._results.receive().tolist()
        hidden = self._hidden[: len(works)].clone()
        results: list[ContextResult | NumericalError] = []
        for row, (work, draw) in enumerate(zip(works, draws, strict=True)):
            state, log = work.state, self._log
            kept = log.part(row, row + 1) if log is not None and state.keeps_log else None
            state.stepped(log=kept)
            drawn = drawn_of(lines, slice(row, row + 1), draw)
            results.append(result_of(hidden[row], drawn))
        return results

    def _forward(self) -> None:
        tower, pool, staging = self._tower, self._pool, self._staging
        rows = self._read_rows()
        hidden = tower.run(staging["token"], MixerInputs(rows, pool, causal=True), self._log)
        self._hidden.copy_(hidden)
        drawn = dispatch.predict(tower.logits(hidden), staged_sampling(staging))
        if self._log is not None and tower.replay_weights is not None:
            self._log.replay(pool, tower.replay_weights, rows, self._ones)
        self._results.fill(partial(dispatch.pack_drawn, drawn))

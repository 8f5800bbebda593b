"""The autoregressive step of many rows over fixed buffers: read a token, draw the next, advance.

Everything that a step needs is sent in one transfer and one graph is replayed; the host waits once,
for the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.towers.decoding.sampling import Draw, Drawn
from twotower.towers.engine.cuda_graph import (
    ROW_BUCKETS,
    GraphMemory,
    Program,
    Programs,
    Results,
    bucket_for,
    buckets_up_to,
)
from twotower.towers.engine.staged_draws import (
    DRAW_INPUTS,
    DRAW_PADDING,
    draw_inputs,
    staged_sampling,
)
from twotower.towers.errors import NumericalError
from twotower.towers.model.backbone import MixerInputs
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.tensors import StateTensors

Step = tuple[ContextState, int, Draw]


class ContextSteps:
    """Steps of rows whose states live in one pool, which is that of the first step."""

    def __init__(self, tower: ContextTower, memory: GraphMemory) -> None:
        self._tower = tower
        self._memory = memory
        self._pool: StateTensors | None = None
        self._programs: Programs[int, _Program] = Programs(self._new_program)

    def run(self, steps: Sequence[Step]) -> list[tuple[Tensor, Drawn | NumericalError]]:
        """Each row's state takes its token; what it drew after it, and its last hidden state [H].

        Only for draws without filters.
        """
        results: list[tuple[Tensor, Drawn | NumericalError]] = []
        for first in range(0, len(steps), ROW_BUCKETS[-1]):
            own = steps[first : first + ROW_BUCKETS[-1]]
            program = self._program(own[0][0].pool, bucket_for(len(own)))
            results += program.step(own)
        return results

    def warm_up(self, pool: StateTensors, rows: int) -> None:
        """Captures the graphs of all steps of up to `rows` rows."""
        for bucket in buckets_up_to(rows):
            self._program(pool, bucket).capture()

    def _program(self, pool: StateTensors, rows: int) -> _Program:
        if self._pool is not pool:
            self._pool = pool
            self._programs.clear()
        return self._programs[rows]

    def _new_program(self, rows: int) -> _Program:
        assert self._pool is not None
        return _Program(self._tower, self._pool, rows, self._memory)


class _Program(Program):
    """The step of up to B rows, over buffers of its own."""

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
        self._work = self._add(self._forward)

    def step(self, steps: Sequence[Step]) -> list[tuple[Tensor, Drawn | NumericalError]]:
        """See `ContextSteps.run`; at most B rows."""
        draws = [draw for _, _, draw in steps]
        self._begin(
            token=[token for _, token, _ in steps],
            slot=[state.slot for state, _, _ in steps],
            context_lens=[state.length for state, _, _ in steps],
            **draw_inputs(draws),
        )
        self._work()
        tokens, confidences, log_probs, finite = self._results.receive().tolist()
        hidden = self._hidden[: len(steps)].clone()
        results: list[tuple[Tensor, Drawn | NumericalError]] = []
        for row, (state, _, draw) in enumerate(steps):
            state.stepped()
            drawn: Drawn | NumericalError
            if finite[row]:
                drawn = Drawn([int(tokens[row])], [confidences[row]], [log_probs[row]])
            else:
                drawn = NumericalError(f"non-finite logits at position {draw.positions[0]}")
            results.append((hidden[row], drawn))
        return results

    def _forward(self) -> None:
        tower, pool, staging = self._tower, self._pool, self._staging
        rows = self._read_rows()
        hidden = tower.run(staging["token"], MixerInputs(rows, pool, causal=True), self._log)
        self._hidden.copy_(hidden)
        drawn = dispatch.predict(tower.logits(hidden), staged_sampling(staging))
        if self._log is not None and tower.replay_weights is not None:
            counts = torch.ones_like(self._slots)
            self._log.replay(pool, tower.replay_weights, rows, counts)
        self._results.put(torch.stack([part.double() for part in drawn]))

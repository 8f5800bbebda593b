"""The denoiser's step with its decisions on the device: forward, predict, commit.

A block's draft is kept in tables by slot. A step sends the slots that take part, replays two graphs
(the pass itself, then the head for as many lines as are masked) and waits once, for the drafts
after the step. Bits and decisions are those of the host's loop (`unmasking.BlockDraft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from twotower.kernels import dispatch
from twotower.towers.engine.buckets import bucket_for, buckets_up_to, run_in_parts
from twotower.towers.engine.cuda_graph import GraphMemory, Program, Programs, Results
from twotower.towers.engine.device_drafts import DeviceDraft, DraftTables, StepResult
from twotower.towers.errors import NumericalError
from twotower.towers.model.backbone import MixerInputs
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.tensors import StateTensors

# Lines through the head, as shares of the pass's tokens: a quarter, a half, all.
_HEAD_SHARES = (4, 2, 1)
# A row's state and the draft of its block.
StepWork = tuple[ContextState, DeviceDraft]


class DenoiserSteps:
    """Steps of blocks whose states live in one pool, which is that of the first step."""

    def __init__(self, tower: DenoiserTower) -> None:
        self._tower = tower
        self._memory = GraphMemory(tower.device)
        self._tables: DraftTables | None = None
        self._programs: Programs[tuple[int, int], _Program] = Programs(self._new_program)

    def run(self, works: Sequence[StepWork]) -> list[StepResult | NumericalError]:
        """A step of each row's draft, drafts of one length together."""
        return run_in_parts(works, lambda work: (work[1].length,), self._run_part)

    def warm_up(self, pool: StateTensors, length: int, rows: int) -> None:
        """Captures the graphs of all passes of up to `rows` blocks of `length` tokens."""
        for bucket in buckets_up_to(rows, length):
            self._program(pool, bucket, length).capture()

    def _run_part(self, works: Sequence[StepWork]) -> list[StepResult | NumericalError]:
        state, draft = works[0]
        program = self._program(state.pool, bucket_for(len(works)), draft.length)
        assert self._tables is not None
        fresh = [(state.slot, draft) for state, draft in works if not draft.begun]
        if fresh:
            self._tables.begin(fresh)
        masked = sum(draft.masked for _, draft in works)
        results = program.step([state for state, _ in works], masked)
        for (_, draft), result in zip(works, results, strict=True):
            if isinstance(result, StepResult):
                draft.step += 1
                draft.remaining = result.remaining
        return results

    def _program(self, pool: StateTensors, rows: int, length: int) -> _Program:
        if self._tables is None or self._tables.pool is not pool:
            self._tables = DraftTables(pool, self._tower)
        return self._programs.of(pool, (rows, length))

    def _new_program(self, _pool: StateTensors, shape: tuple[int, int]) -> _Program:
        assert self._tables is not None
        return _Program(self._tower, self._tables, *shape, self._memory)


class _Program(Program):
    """The step of up to B rows with blocks of L tokens, over fixed buffers."""

    def __init__(
        self,
        tower: DenoiserTower,
        tables: DraftTables,
        rows: int,
        length: int,
        memory: GraphMemory,
    ) -> None:
        super().__init__(tables.pool, rows, length, memory)
        self._tower = tower
        self._tables = tables
        device, total = tower.device, rows * length
        self._modulations = tables.modulations(length)
        shape = (total, tower.config.hidden_size)
        self._hidden = torch.zeros(shape, dtype=tower.dtype, device=device)
        self._lines = torch.full((total,), -1, dtype=torch.int32, device=device)
        self._results = Results((rows, 1 + 4 * length), device)
        self._body = self._add(self._forward)
        sizes = dict.fromkeys(-(-total // share) for share in _HEAD_SHARES)
        self._heads = {size: self._add(partial(self._predict_and_commit, size)) for size in sizes}

    def step(
        self, states: Sequence[ContextState], masked: int
    ) -> list[StepResult | NumericalError]:
        """A step of the drafts in these states' slots, with `masked` masked positions in all."""
        context_lens = [state.position for state in states]
        self._begin(slot=[state.slot for state in states], context_lens=context_lens)
        self._body()
        self._heads[min(size for size in self._heads if size >= masked)]()
        results = self._results.receive()[: len(states)].tolist()
        return [self._result(row) for row in results]

    def _result(self, row: list[float]) -> StepResult | NumericalError:
        remaining, length = int(row[0]), self._length
        if remaining < 0:
            return NumericalError("non-finite logits of the denoiser tower")
        tokens, steps, confidences, log_probs = (
            row[1 + part * length : 1 + (part + 1) * length] for part in range(4)
        )
        whole = [int(token) for token in tokens], [int(step) for step in steps]
        return StepResult(remaining, *whole, confidences, log_probs)

    def _forward(self) -> None:
        drafts, length = self._tables.drafts, self._length
        reads = MixerInputs(self._read_rows(), self._pool, causal=False)
        tokens, index = dispatch.read_blocks(drafts, self._slots, length)
        self._hidden.copy_(self._tower.run(tokens, self._modulations, index, reads))
        self._lines.copy_(dispatch.select_masked(drafts, self._slots, length))

    def _predict_and_commit(self, count: int) -> None:
        """Draws the first `count` lines, which hold all masked positions, and commits."""
        tables, slots, length = self._tables, self._slots, self._length
        drafts, lines = tables.drafts, self._lines[:count]
        picked, batch = dispatch.read_lines(
            self._hidden, lines, drafts, slots, tables.sampling, length
        )
        drawn = dispatch.predict(self._tower.logits(picked), batch)
        dispatch.commit(drafts, slots, *dispatch.spread_lines(drawn, lines, len(slots), length))
        self._results.fill(lambda out: dispatch.pack_drafts(drafts, slots, out))

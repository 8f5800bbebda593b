"""Extension of many rows by committed blocks over fixed buffers, as graphs.

An extension reads a block into K/V and snapshot, and draws the token after it where a row asks for
that: hundreds of launches of a few microseconds, which took longer than the device's own work for
any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.towers.decoding.sampling import Draw, Sampler
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import (
    bucket_for,
    buckets_up_to,
    rows_at_once,
    run_in_parts,
)
from twotower.towers.engine.context_work import ContextResult, ContextWork, result_of
from twotower.towers.engine.cuda_graph import GraphMemory, Program, Programs, Results, Staging
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
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.tensors import StateTensors

# Stands in for the draw of a row that asks for none, beside rows that do.
_NO_DRAW = Draw(Sampler(0.0, None, None, None, 0), [0])


class ContextBlocks:
    """Blocks of rows whose states live in one pool, which is that of the first block."""

    def __init__(self, tower: ContextTower, memory: GraphMemory, log: BlockLog) -> None:
        self._tower = tower
        self._memory = memory
        self._log = log
        self._programs: Programs[tuple[int, int], _Program] = Programs(self._new_program)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """Each row's last hidden state, and the token that it draws after it. Only for works that
        are blocks, see `ContextWork.is_block`."""
        return run_in_parts(works, lambda work: (len(work.tokens),), self._run_part)

    def warm_up(self, pool: StateTensors, length: int, rows: int) -> None:
        """Captures the extensions of up to `rows` blocks of `length` tokens."""
        for bucket in buckets_up_to(rows, length):
            self._programs.of(pool, (bucket, length)).capture()

    def _run_part(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        pool, length = works[0].state.pool, len(works[0].tokens)
        return self._programs.of(pool, (bucket_for(len(works)), length)).run(works)

    def _new_program(self, pool: StateTensors, shape: tuple[int, int]) -> _Program:
        rows, length = shape
        most = bucket_for(min(pool.slots.num_slots, rows_at_once(length)))
        log = self._log.part(rows * length, most * length)
        return _Program(self._tower, pool, log, *shape, self._memory)


class _Program(Program):
    """The blocks of up to B rows, L tokens each, over fixed buffers."""

    def __init__(
        self,
        tower: ContextTower,
        pool: StateTensors,
        log: PassLog | None,
        rows: int,
        length: int,
        memory: GraphMemory,
    ) -> None:
        total = rows * length
        super().__init__(pool, rows, length, memory, ("token",), total)
        self._tower = tower
        self._log = log
        shape = (rows, tower.config.hidden_size)
        self._ends = torch.zeros(shape, dtype=tower.dtype, device=tower.device)
        self._lengths = torch.full_like(self._slots, length)
        self._results = Results((4, rows), tower.device)
        # An extension draws one token a row: its draws are sent apart from the tokens that it
        # reads, and only where there are any.
        self._draws = Staging(DRAW_INPUTS, rows, tower.device)
        self._work = self._add(self._extend)
        # Extensions that draw nothing need no head: its weights may be a good part of the pass's.
        self._head = self._add(self._draw_next)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """See `ContextBlocks.run`; at most B rows of one shape."""
        draws = [work.draw for work in works]
        inputs = {}
        if any(draw is not None for draw in draws):
            inputs = draw_inputs([draw or _NO_DRAW for draw in draws])
        self._begin(
            token=[token for work in works for token in work.tokens],
            slot=[work.state.slot for work in works],
            context_lens=[work.state.length for work in works],
        )
        self._work()
        if inputs:
            self._draws.send(DRAW_PADDING, **inputs)
            self._head()
        lines = self._results.receive().tolist()
        hidden = self._ends[: len(works)].clone()
        self._hand_out(works)
        return [
            ContextResult(hidden[row])
            if draw is None
            else result_of(hidden[row], drawn_of(lines, slice(row, row + 1), draw))
            for row, draw in enumerate(draws)
        ]

    def _log_of(self, row: int) -> PassLog | None:
        """A copy of a row's part of the log, which the next pass overwrites."""
        if self._log is None:
            return None
        return self._log.part(row * self._length, (row + 1) * self._length).copy()

    def _hand_out(self, works: Sequence[ContextWork]) -> None:
        """Moves the rows' states on, and gives the sinks their shares."""
        for row, work in enumerate(works):
            exported = work.sink is not None
            log = self._log_of(row) if work.state.keeps_log and not exported else None
            work.state.stepped(self._length, log, exported=exported)
            if work.sink is None or not work.sink.takes_shares:
                continue
            for name, layer, share in self._shares(work.state, row):
                work.sink.put(name, layer, share)

    def _shares(self, state: ContextState, row: int) -> Iterator[tuple[str, int, Tensor]]:
        """Shares of all updates that a mirror may get of the row's last block, layer by layer."""
        log = self._log_of(row)
        if log is not None:
            for layer in range(len(log.xbc)):
                yield "xbc", layer, log.xbc[layer]
                yield "dt", layer, log.dt[layer]
                yield "conv", layer, state.conv[layer]
                yield "ssm", layer, state.ssm[layer]
        k, v = state.kv_layers(state.position - self._length, state.position)
        for layer in range(len(k)):
            yield "k", layer, k[layer]
            yield "v", layer, v[layer]

    def _extend(self) -> None:
        rows, log = self._read_rows(), self._log
        reads = MixerInputs(rows, self._pool, causal=True)
        hidden = self._tower.run(self._staging["token"], reads, log)
        self._ends.copy_(hidden[self._length - 1 :: self._length])
        weights = self._tower.replay_weights
        if log is not None and weights is not None:
            log.replay(self._pool, weights, rows, self._lengths)

    def _draw_next(self) -> None:
        sampling = staged_sampling(self._draws)
        drawn = dispatch.predict(self._tower.logits(self._ends), sampling)
        self._results.fill(partial(dispatch.pack_drawn, drawn))

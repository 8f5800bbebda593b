"""Extension and verification of many rows' blocks over fixed buffers, as graphs.

An extension reads a committed block into K/V and snapshot; a verification reads a draft into K/V
and log, and draws the tower's own token after each of its tokens. Both are hundreds of launches of
a few microseconds, which took longer than the device's own work for any number of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.rows import Rows
from twotower.towers.decoding.sampling import Draw, Drawn
from twotower.towers.engine.cuda_graph import (
    GraphMemory,
    Program,
    Programs,
    Results,
    bucket_for,
    buckets_up_to,
    rows_at_once,
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
from twotower.towers.state.link import LayerSink
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.tensors import StateTensors

MAX_LENGTH = 64


@dataclass(frozen=True)
class BlockWork:
    """A row's block: without a draw an extension, whose shares go to `sink` if it takes any;
    with one, of as many positions, a verification."""

    state: ContextState
    tokens: Sequence[int]
    draw: Draw | None
    sink: LayerSink | None


BlockResult = tuple[Tensor, Drawn | NumericalError | None]


class ContextBlocks:
    """Blocks of rows whose states live in one pool, which is that of the first block."""

    def __init__(self, tower: ContextTower, memory: GraphMemory) -> None:
        self._tower = tower
        self._memory = memory
        self._pool: StateTensors | None = None
        # The log of all programs, as large as the largest: one for each would be gigabytes. It
        # grows in powers of two: those that older programs keep are together less than the last.
        self._log: PassLog | None = None
        self._log_tokens = 0
        self._programs: Programs[tuple[int, int, bool], _Program] = Programs(self._new_program)

    def run(self, works: Sequence[BlockWork]) -> list[BlockResult]:
        """Each row's last hidden state [H], and what was drawn of it; blocks of one length and
        kind together. Draws without filters only."""
        results: dict[int, BlockResult] = {}
        for length, draws in {(len(work.tokens), work.draw is not None) for work in works}:
            same = [
                index
                for index, work in enumerate(works)
                if (len(work.tokens), work.draw is not None) == (length, draws)
            ]
            for first in range(0, len(same), rows_at_once(length)):
                own = same[first : first + rows_at_once(length)]
                program = self._program(
                    works[own[0]].state.pool, bucket_for(len(own)), length, draws
                )
                results |= zip(own, program.run([works[index] for index in own]), strict=True)
        return [results[index] for index in range(len(works))]

    def warm_up(self, pool: StateTensors, length: int, rows: int) -> None:
        """Captures the extensions of up to `rows` blocks of `length` tokens; blocks of more than
        MAX_LENGTH have no graphs."""
        for bucket in buckets_up_to(rows, length) if length <= MAX_LENGTH else ():
            self._program(pool, bucket, length, False).capture()

    def _program(self, pool: StateTensors, rows: int, length: int, draws: bool) -> _Program:
        if self._pool is not pool:
            self._pool = pool
            self._programs.clear()
        if rows * length > self._log_tokens:
            most = bucket_for(min(pool.slots.num_slots, rows_at_once(length)))
            self._log_tokens = 1 << (max(rows, most) * length - 1).bit_length()
            self._log = self._tower.new_log(self._log_tokens, whole=True)
        return self._programs[rows, length, draws]

    def _new_program(self, shape: tuple[int, int, bool]) -> _Program:
        assert self._pool is not None
        rows, length, _ = shape
        log = None if self._log is None else self._log.part(0, rows * length)
        return _Program(self._tower, self._pool, log, *shape, self._memory)


class _Program(Program):
    """The blocks of up to B rows, L tokens each, over buffers of its own."""

    def __init__(
        self,
        tower: ContextTower,
        pool: StateTensors,
        log: PassLog | None,
        rows: int,
        length: int,
        draws: bool,
        memory: GraphMemory,
    ) -> None:
        total, inputs = rows * length, ("token", *(DRAW_INPUTS if draws else ()))
        super().__init__(pool, rows, length, memory, inputs, total, DRAW_PADDING)
        self._tower = tower
        self._log = log
        shape = (rows, tower.config.hidden_size)
        self._ends = torch.zeros(shape, dtype=tower.dtype, device=tower.device)
        self._results = Results((4, total if draws else 1), tower.device)
        self._work = self._add(self._verify if draws else self._extend)

    def run(self, works: Sequence[BlockWork]) -> list[BlockResult]:
        """See `ContextBlocks.run`; at most B rows of one kind."""
        draws = [work.draw for work in works if work.draw is not None]
        self._begin(
            token=[token for work in works for token in work.tokens],
            slot=[work.state.slot for work in works],
            context_lens=[work.state.length for work in works],
            **(draw_inputs(draws) if draws else {}),
        )
        self._work()
        drawn = self._results.receive().tolist()
        ends = self._ends[: len(works)].clone()
        if draws:
            return [(ends[row], self._drawn(work, row, drawn)) for row, work in enumerate(works)]
        self._hand_out(works)
        return [(ends[row], None) for row in range(len(works))]

    def _drawn(self, work: BlockWork, row: int, drawn: list[list[float]]) -> Drawn | NumericalError:
        """Takes the draft into a row's log; what was drawn after each of its tokens."""
        span = slice(row * self._length, (row + 1) * self._length)
        log = self._log
        own = None if log is None else log.part(span.start, span.stop).copy()
        work.state.append(own, self._length)
        tokens, confidences, log_probs, finite = (line[span] for line in drawn)
        if all(finite):
            return Drawn([int(token) for token in tokens], confidences, log_probs)
        assert work.draw is not None
        return NumericalError(f"non-finite logits at position {work.draw.positions[0]}")

    def _hand_out(self, works: Sequence[BlockWork]) -> None:
        """Moves the rows' states on, and gives sinks their shares; the log's as a copy, since the
        next block overwrites it while they may still be on their way."""
        for row, work in enumerate(works):
            work.state.stepped(self._length)
            if work.sink is None or not work.sink.takes_shares:
                continue
            for name, layer, share in self._shares(work.state, row):
                work.sink.put(name, layer, share)

    def _shares(self, state: ContextState, row: int) -> Iterator[tuple[str, int, Tensor]]:
        """What a mirror may need of the row's last block, layer by layer."""
        if self._log is not None:
            first = row * self._length
            own = self._log.part(first, first + self._length).copy()
            for layer in range(len(own.xbc)):
                yield "xbc", layer, own.xbc[layer]
                yield "dt", layer, own.dt[layer]
                yield "conv", layer, state.conv[layer]
                yield "ssm", layer, state.ssm[layer]
        k, v = state.kv_layers(state.position - self._length, state.position)
        for layer in range(len(k)):
            yield "k", layer, k[layer]
            yield "v", layer, v[layer]

    def _extend(self) -> None:
        rows, _ = self._forward()
        weights, log = self._tower.replay_weights, self._log
        if log is not None and weights is not None:
            counts = torch.full_like(self._slots, self._length)
            log.replay(self._pool, weights, rows, counts)

    def _verify(self) -> None:
        _, hidden = self._forward()
        drawn = dispatch.predict(self._tower.logits(hidden), staged_sampling(self._staging))
        self._results.put(torch.stack([part.double() for part in drawn]))

    def _forward(self) -> tuple[Rows, Tensor]:
        rows = self._read_rows()
        reads = MixerInputs(rows, self._pool, causal=True)
        hidden = self._tower.run(self._staging["token"], reads, self._log)
        self._ends.copy_(hidden[self._length - 1 :: self._length])
        return rows, hidden

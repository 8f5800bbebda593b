"""Packed passes of the context tower over fixed buffers, as graphs: prompts, and all that is read
beside them.

Whatever rows ask of a pass, its way through the layers is the same; what differs comes after it
and takes few launches. So the layers are a graph for mixtures of works up to GRAPH_TOKENS, of up to
32 rows where one has more than 16 tokens: attention keeps partial results for 64 tokens of every
row. A pass of fewer tokens than a program has costs about what a full one costs, as it waits for
weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from twotower.kernels.rows import Rows
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import (
    GRAPH_TOKENS,
    MAX_LENGTH,
    ROW_BUCKETS,
    bucket_for,
    packed_bucket_for,
)
from twotower.towers.engine.cuda_graph import GraphMemory, Programs
from twotower.towers.engine.ragged_program import RaggedProgram
from twotower.towers.model.backbone import MixerInputs
from twotower.towers.model.context_tower import ContextOutput, ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.tensors import StateTensors

# Tokens of a pass that have programs. Empty ones cost little up to a thousand.
TOKEN_BUCKETS = (16, 32, 64, 128, 256, 512, 768, 1024, 1536, GRAPH_TOKENS)
# Bounds of a row's tokens up to which kernels have tiles of their own.
_SHORT = (16, MAX_LENGTH)
# Rows of prompts that are warmed up beside a single one.
_USUAL_ROWS = 4

# Rows, tokens in all, and tokens of a row.
Shape = tuple[int, int, int]


class ContextPacked:
    """Reads as `ContextTower.read` does, from rows whose states live in one pool, which is that of
    the first pass."""

    def __init__(self, tower: ContextTower, memory: GraphMemory, log: BlockLog) -> None:
        self._tower = tower
        self._memory = memory
        self._log = log
        self._hidden: Tensor | None = None
        self._programs: Programs[Shape, _Program] = Programs(self._new_program)

    def read(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[ContextState],
        sinks: Sequence[UpdateWriter | None],
    ) -> ContextOutput:
        """As `ContextTower.read`, but sinks take their shares when all layers are computed, and
        output and logs last until the next pass."""
        shape = shape_for([len(row) for row in tokens])
        if shape is None:
            return self._tower.read(tokens, states, sinks)
        return self._programs.of(states[0].pool, shape).run(tokens, states, sinks)

    def warm_up(self, pool: StateTensors, chunk: int, most: int) -> None:
        """Captures the passes over a piece of up to `chunk` tokens of one prompt, and over pieces
        of a few, of up to `most` tokens together."""
        shapes = _shapes_of(chunk, 1)
        if pool.slots.num_slots > 1:
            shapes += _shapes_of(most, _USUAL_ROWS)
        # The largest first: the others' graphs then fit into the memory that it takes.
        for shape in sorted(shapes, key=lambda shape: (-shape[1], -shape[0])):
            self._programs.of(pool, shape).capture()

    def _new_program(self, pool: StateTensors, shape: Shape) -> _Program:
        tower, tokens = self._tower, shape[1]
        if self._hidden is None:
            size = (GRAPH_TOKENS, tower.config.hidden_size)
            self._hidden = torch.zeros(size, dtype=tower.dtype, device=tower.device)
        log = self._log.part(tokens, tokens)
        return _Program(tower, pool, log, self._hidden[:tokens], shape, self._memory)


def _shapes_of(most: int, rows: int) -> list[Shape]:
    """The programs that passes of up to `most` tokens of so many rows need, if one is long."""
    least = MAX_LENGTH if rows > 1 else 0
    sizes = [min(most, bucket) for bucket in TOKEN_BUCKETS if bucket > least]
    shapes = (shape_for([size - rows + 1, *[1] * (rows - 1)]) for size in sizes if size > least)
    return [shape for shape in dict.fromkeys(shapes) if shape is not None]


def shape_for(lengths: Sequence[int]) -> Shape | None:
    """The program for rows of such lengths; None for a pass that is too large for a graph."""
    rows, longest = len(lengths), max(lengths)
    if rows > ROW_BUCKETS[-1] or sum(lengths) > GRAPH_TOKENS:
        return None
    if longest == 1:
        return bucket_for(rows), bucket_for(rows), 1
    tokens = next(bucket for bucket in TOKEN_BUCKETS if bucket >= sum(lengths))
    bound = next((most for most in _SHORT if longest <= most), tokens)
    bucket = packed_bucket_for(rows)
    # Attention has partial results for so many tokens of each row.
    if bucket * min(bound, MAX_LENGTH) > GRAPH_TOKENS:
        return None
    return bucket, tokens, bound


class _Program(RaggedProgram):
    """Passes of one shape over fixed buffers; hidden states go to `hidden` [T, H]."""

    def __init__(
        self,
        tower: ContextTower,
        pool: StateTensors,
        log: PassLog | None,
        hidden: Tensor,
        shape: Shape,
        memory: GraphMemory,
    ) -> None:
        super().__init__(pool, *shape, memory, ("token",))
        self._tower = tower
        self._log = log
        self._hidden = hidden
        self._sent: torch.cuda.Event | None = None
        self._work = self._add(self._forward)

    @torch.inference_mode()
    def run(
        self,
        tokens: Sequence[Sequence[int]],
        states: Sequence[ContextState],
        sinks: Sequence[UpdateWriter | None],
    ) -> ContextOutput:
        """See `ContextPacked.read`; rows that fit."""
        lengths = [len(row) for row in tokens]
        self._begin(
            token=[token for row in tokens for token in row],
            length=lengths,
            slot=[state.slot for state in states],
            context_lens=[state.length for state in states],
        )
        self._work()
        spans = [slice(end - n, end) for end, n in zip(accumulate(lengths), lengths, strict=True)]
        for state, span, sink in zip(states, spans, sinks, strict=True):
            log = None if self._log is None else self._log.part(span.start, span.stop)
            state.append(log, span.stop - span.start)
            if sink is not None and sink.takes_shares:
                for name, layer, share in _shares(state, log):
                    sink.put(name, layer, share)
        rows = Rows(
            self._starts,
            self._slots,
            self._context_lens,
            self._pool.page_table,
            self._pool.page_tokens,
            self._length,
        )
        return ContextOutput(self._hidden, rows, self._log)

    def _begin(self, **values: Sequence[int]) -> None:
        # No result is waited for, so the device may not have read what the last call has sent.
        if self._sent is not None:
            self._sent.synchronize()
        super()._begin(**values)
        if self._hidden.is_cuda:
            self._sent = torch.cuda.current_stream(self._hidden.device).record_event()

    def _forward(self) -> None:
        reads = MixerInputs(self._read_rows(), self._pool, causal=True)
        tokens = self._staging["token"][: len(self._hidden)]
        self._hidden.copy_(self._tower.run(tokens, reads, self._log))


def _shares(state: ContextState, log: PassLog | None) -> Iterator[tuple[str, int, Tensor]]:
    """A row's shares of the pass that it has just taken, as `ContextTower.read` gives them."""
    if log is not None:
        # The next pass overwrites the log.
        own = log.copy()
        for layer in range(len(own.xbc)):
            yield "xbc", layer, own.xbc[layer]
            yield "dt", layer, own.dt[layer]
    k, v = state.kv_layers(state.position, state.length)
    for layer in range(len(k)):
        yield "k", layer, k[layer]
        yield "v", layer, v[layer]

"""Drafts of many rows, of any lengths, checked in one pass over fixed buffers, as graphs.

A pass reads the last token of each row and the draft behind it, draws the tower's own token after
each, and moves the row's snapshot over those of the draft that are right: one transfer, one graph,
one wait, whatever the rows have drafted. Rows lie packed, one behind the other, and what is left of
the buffer is one row of padding: it writes no K/V, so that no row needs room behind its draft, and
has no experts.

A program for each length that drafts have would be launched, and read the weights, once for each:
16 rows with drafts of 2, 4, 8 and 16 tokens and single steps took five runs, and up to some hundred
tokens the weights are what takes the time. Steps that share a pass with drafts join their program
for the same reason, as drafts of one token: of their own they would read mixers, head and most of
the experts once more. A pass of steps alone stays one of `ContextSteps`, whose kernels are those of
single tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import (
    GRAPH_TOKENS,
    MAX_LENGTH,
    ROW_BUCKETS,
    bucket_for,
    buckets_up_to,
)
from twotower.towers.engine.context_work import (
    ContextResult,
    ContextWork,
    accepted_of,
    result_of,
)
from twotower.towers.engine.cuda_graph import GraphMemory, Programs, Results
from twotower.towers.engine.ragged_program import RaggedProgram
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
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.tensors import StateTensors

# Tokens of a pass for each of its rows, on the mean; the steps between are of use only where a pass
# has more tokens than the weights hide.
_MEAN_LENGTHS = (4, 8, 16, 32, MAX_LENGTH)
_BETWEEN = (8, 32)
_HIDDEN_TOKENS = 256
# Bounds of a row's tokens. Kernels are the same for all up to 16.
_USUAL_LENGTH = 16


class ContextDrafts:
    """Drafts of rows whose states live in one pool, which is that of the first draft."""

    def __init__(self, tower: ContextTower, memory: GraphMemory, log: BlockLog) -> None:
        self._tower = tower
        self._memory = memory
        self._log = log
        self._programs: Programs[tuple[int, int, int], _Program] = Programs(self._new_program)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """The tokens drawn after each of a row's, how many of its draft are right, and its last
        hidden state; its snapshot has moved over those. Only for works that are drafts or steps,
        see `ContextWork.is_draft`."""
        return [result for part in _parts(works) for result in self._run_part(part)]

    def warm_up(self, pool: StateTensors, rows: int) -> None:
        """Captures what passes of up to `rows` rows with drafts of up to 16 tokens need: two or
        three programs for each bucket of rows, 24 for 64 rows. Longer ones come too seldom."""
        shapes = [
            (bucket, length)
            for bucket in buckets_up_to(rows, _USUAL_LENGTH)
            for length in _mean_lengths(bucket)
            if length <= _USUAL_LENGTH
        ]
        # The largest first: the others' graphs then fit into the memory that it takes.
        for bucket, length in sorted(shapes, key=lambda shape: -shape[0] * shape[1]):
            self._program(pool, bucket, length, _USUAL_LENGTH).capture()

    def _run_part(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        lengths = [len(work.tokens) for work in works]
        bucket, mean = _shape_for(len(works), sum(lengths))
        longest = _USUAL_LENGTH if max(lengths) <= _USUAL_LENGTH else MAX_LENGTH
        return self._program(works[0].state.pool, bucket, mean, longest).run(works)

    def _program(self, pool: StateTensors, rows: int, mean: int, longest: int) -> _Program:
        return self._programs.of(pool, (rows, rows * mean, longest))

    def _new_program(self, pool: StateTensors, shape: tuple[int, int, int]) -> _Program:
        rows, tokens, longest = shape
        most = bucket_for(min(pool.slots.num_slots, ROW_BUCKETS[-1])) * _USUAL_LENGTH
        log = self._log.part(tokens, most)
        return _Program(self._tower, pool, log, rows, tokens, longest, self._memory)


def _mean_lengths(rows: int) -> list[int]:
    """Tokens a row of the passes that a bucket of rows has programs for."""
    return [
        length
        for length in _MEAN_LENGTHS
        if length not in _BETWEEN or 2 * length * rows > _HIDDEN_TOKENS
    ]


def _shape_for(rows: int, tokens: int) -> tuple[int, int]:
    """The smallest bucket of rows, and tokens for each of them, that hold so many."""
    bucket = bucket_for(rows)
    return bucket, next(length for length in _mean_lengths(bucket) if bucket * length >= tokens)


def _parts(works: Sequence[ContextWork]) -> Iterator[Sequence[ContextWork]]:
    """The works in their order, as many at a time as a program takes."""
    part: list[ContextWork] = []
    tokens = 0
    for work in works:
        tokens += len(work.tokens)
        if part and not _fits(len(part) + 1, tokens):
            yield part
            part, tokens = [], len(work.tokens)
        part.append(work)
    yield part


def _fits(rows: int, tokens: int) -> bool:
    if rows > ROW_BUCKETS[-1]:
        return False
    bucket, mean = _shape_for(rows, tokens)
    return bucket * mean <= GRAPH_TOKENS


class _Program(RaggedProgram):
    """The drafts of up to B rows, T tokens in all and at most `longest` each, over fixed
    buffers."""

    def __init__(
        self,
        tower: ContextTower,
        pool: StateTensors,
        log: PassLog | None,
        rows: int,
        tokens: int,
        longest: int,
        memory: GraphMemory,
    ) -> None:
        inputs = ("token", *DRAW_INPUTS)
        super().__init__(pool, rows, tokens, longest, memory, inputs, DRAW_PADDING)
        self._tower = tower
        self._log = log
        shape = (rows, tower.config.hidden_size)
        self._ends = torch.zeros(shape, dtype=tower.dtype, device=tower.device)
        self._results = Results((4, tokens), tower.device)
        self._work = self._add(self._check)

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | NumericalError]:
        """See `ContextDrafts.run`; works that fit."""
        draws = [work.draw for work in works if work.draw is not None]
        self._begin(
            token=[token for work in works for token in work.tokens],
            length=[len(work.tokens) for work in works],
            slot=[work.state.slot for work in works],
            context_lens=[work.state.length for work in works],
            **draw_inputs(draws),
        )
        self._work()
        lines = self._results.receive().tolist()
        hidden = self._ends[: len(works)].clone()
        results: list[ContextResult | NumericalError] = []
        stop = 0
        for row, (work, draw) in enumerate(zip(works, draws, strict=True)):
            span = slice(stop, stop + len(work.tokens))
            stop = span.stop
            accepted = accepted_of(work.tokens, [int(token) for token in lines[0][span]])
            self._move(work, span.start, 1 + accepted)
            drawn = drawn_of(lines, span, draw)
            results.append(result_of(hidden[row], drawn, accepted))
        return results

    def _move(self, work: ContextWork, start: int, count: int) -> None:
        """Moves a row's state on as the device has moved its snapshot."""
        log, state = self._log, work.state
        kept = log is not None and state.keeps_log
        state.stepped(count, log.part(start, start + count) if log is not None and kept else None)

    def _check(self) -> None:
        tower, staging, log = self._tower, self._staging, self._log
        rows = self._read_rows()
        reads = MixerInputs(rows, self._pool, causal=True)
        hidden = tower.run(staging["token"], reads, log)
        self._ends.copy_(hidden[self._last_places()])
        drawn = dispatch.predict(tower.logits(hidden), staged_sampling(staging))
        if log is not None and tower.replay_weights is not None:
            given = (staging["token"], self._starts, self._slots)
            counts = dispatch.right_counts(drawn[0], *given)
            log.replay(self._pool, tower.replay_weights, rows, counts)
        self._results.fill(partial(dispatch.pack_drawn, drawn))

    def _last_places(self) -> Tensor:
        """The place of each row's last token among those of the pass, [B] int64; of rows without
        tokens that of any other's last."""
        return (self._starts[1:-1].long() - 1).clamp_min(0)

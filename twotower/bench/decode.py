"""Whole rows through the real engines, from contexts that nobody had to read.

Rows open at their context's end, read one token, wait for one another and then decode block by
block. They go on until the slowest has done its blocks, so that the load stays what it was; a row's
speed counts from the end of its warm-up to the end of its last counted block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from twotower.bench.filled import FilledPool
from twotower.planner.schedules import Replay, Schedule
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block, Prefilled
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.scheduler import PassLimits
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams

# Where rows end blocks at different times, the fastest must not run dry before the slowest is done.
SPARE = 2
_COUNTERS = ("passes", "pass_rows", "pass_seconds")
# What the denoiser's and the context tower's engine have done so far.
Counters = tuple[dict[str, float], dict[str, float]]


@dataclass(frozen=True)
class Run:
    """What to decode: `rows` rows of `context` tokens, `warm` blocks that do not count and then
    `blocks` that do. `schedules` are each row's own; the modes without a draft need none."""

    mode: Mode
    rows: int
    context: int
    blocks: int
    warm: int = 1
    block_size: int = 16
    schedules: Sequence[Sequence[Schedule]] = ()

    @property
    def room(self) -> int:
        """Tokens that a row may write."""
        return SPARE * (self.warm + self.blocks) * self.block_size


@dataclass(frozen=True)
class Passes:
    """What one tower did in a run: its passes, their mean rows, seconds of each."""

    passes: int
    rows_a_pass: float
    seconds_a_pass: float


@dataclass(frozen=True)
class Decoded:
    """A run's tokens/s of all rows, and means over counted blocks: their tokens, denoiser passes
    (NFE) and seconds."""

    tokens_per_s: float
    tokens_a_block: float
    nfe_a_block: float
    seconds_a_block: float
    denoiser: Passes
    context: Passes


class EnginePair:
    """Both engines of one process on one device, over one pool. Close it at the end.

    `max_tokens` are the most of a pass; `device_steps` is the engines' own.
    """

    def __init__(
        self,
        context: ContextTower,
        denoiser: DenoiserTower,
        pool: FilledPool,
        max_tokens: int,
        *,
        device_steps: bool | None = None,
    ) -> None:
        self.pool = pool
        self._replay = Replay()
        limits = PassLimits(max_tokens=max_tokens, prefill_tokens=max_tokens)
        self.denoiser = DenoiserEngine(
            denoiser,
            limits=limits,
            rule=self._replay,
            threaded=False,
            device_steps=device_steps,
        )
        link = LocalLink(context, self.denoiser, shared=True)
        self.context = ContextEngine(
            context, link, pool=pool, limits=limits, threaded=False, device_steps=device_steps
        )
        # Engines belong to one event loop, runs come one after the other.
        self._runner = asyncio.Runner()

    def __enter__(self) -> EnginePair:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engines' event loop."""
        self._runner.close()

    def warm_up(self, block: int, rows: int) -> None:
        """Captures the graphs of passes of up to `rows` rows, as a service does before it takes
        any: a run would otherwise pay for them, or go without."""
        self.context.warm_up(block, rows)
        self.denoiser.warm_up(block, self.pool, rows)

    def decode(self, run: Run) -> Decoded:
        """Runs all rows at once. Raises CapacityError if the pool is too small for them."""
        draft_all = [[(run.block_size,)]] * run.rows
        self._replay.load(run.schedules if run.mode == "mask_diffusion" else draft_all)
        # One token is read by an ordinary pass, which draws what the mode begins with.
        self.pool.context = run.context - 1
        return self._runner.run(self._decode(run))

    async def _decode(self, run: Run) -> Decoded:
        race = _Race(run, self._counters)
        start = _Start(self.context, asyncio.Barrier(run.rows))
        try:
            async with asyncio.TaskGroup() as rows:
                for row in range(run.rows):
                    rows.create_task(self._row(run, race, start, row))
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None
        return race.decoded()

    async def _row(self, run: Run, race: _Race, start: _Start, row: int) -> None:
        params = GenerationParams(
            mode=run.mode, max_tokens=run.room, block_size=run.block_size, seed=row
        )
        prompt = [0] * run.context
        async with aclosing(
            generate_blocks(start, self.denoiser, f"bench-{row}", prompt, params)
        ) as blocks:
            async for block in blocks:
                race.note(row, block)
                if race.over:
                    return

    def _counters(self) -> Counters:
        return self.denoiser.stats(), self.context.stats()


class _Start:
    """The context engine, except that a row's prompt counts as read up to its last token, and that
    all rows begin to decode at the same moment."""

    def __init__(self, engine: ContextEngine, barrier: asyncio.Barrier) -> None:
        self.barrier = barrier
        self.open = engine.open
        self.extend = engine.extend
        self.decode = engine.decode
        self.verify = engine.verify
        self.score = engine.score
        self.release = engine.release
        self._prefill = engine.prefill

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """Reads the prompt's last token; see `ContextService`."""
        prefilled = await self._prefill(row_id, prompt[-1:], generated, params)
        await self.barrier.wait()
        return prefilled


class _Race:
    """When each row committed each of its blocks, and what the engines had done at the end of the
    warm-up and of the last block that counts."""

    def __init__(self, run: Run, counters: Callable[[], Counters]) -> None:
        self._run = run
        self._counters = counters
        self._blocks: list[list[tuple[float, Block]]] = [[] for _ in range(run.rows)]
        self._begin: Counters | None = None
        self._end: Counters | None = None

    @property
    def over(self) -> bool:
        """Whether every row has done what it had to."""
        return self._end is not None

    def note(self, row: int, block: Block) -> None:
        """A row has committed a block just now."""
        self._blocks[row].append((time.perf_counter(), block))
        slowest = min(map(len, self._blocks))
        if self._begin is None and slowest >= self._run.warm:
            self._begin = self._counters()
        if self._end is None and slowest >= self._run.warm + self._run.blocks:
            self._end = self._counters()

    def decoded(self) -> Decoded:
        """Means over the blocks that count."""
        assert self._begin is not None
        assert self._end is not None
        first, last = self._run.warm - 1, self._run.warm + self._run.blocks - 1
        seconds = [row[last][0] - row[first][0] for row in self._blocks]
        rows = [[block for _, block in row[first + 1 : last + 1]] for row in self._blocks]
        tokens = [sum(len(block.token_ids) for block in row) for row in rows]
        counted = self._run.rows * self._run.blocks
        return Decoded(
            tokens_per_s=sum(own / spent for own, spent in zip(tokens, seconds, strict=True)),
            tokens_a_block=sum(tokens) / counted,
            nfe_a_block=sum(block.nfe for row in rows for block in row) / counted,
            seconds_a_block=sum(seconds) / counted,
            denoiser=_passes(self._begin[0], self._end[0]),
            context=_passes(self._begin[1], self._end[1]),
        )


def _passes(before: dict[str, float], after: dict[str, float]) -> Passes:
    passes, rows, seconds = (after[name] - before[name] for name in _COUNTERS)
    return Passes(int(passes), rows / max(1.0, passes), seconds / max(1.0, passes))

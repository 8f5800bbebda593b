"""Decodes rows with the real engines, from contexts of random state that no prefill had to read.

Rows open at the end of their context, read one token, wait until all have, and then decode block by
block. They go on until the slowest has done its blocks, so that the load stays constant; a row's
speed counts from the end of its warm-up to the end of its last counted block.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from twotower.bench.filled import FilledPool
from twotower.planner.schedules import Replay, Schedule
from twotower.towers.decoding.generation import committed, generate_blocks
from twotower.towers.decoding.services import Block, Prefilled
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.stats import EngineStats
from twotower.towers.engine.turns import Turns
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams

# Times the counted blocks that a row may write: where rows end blocks at different times, the
# fastest must not end before the slowest has done its blocks.
SPARE = 2
# Counters of the denoiser's and of the context tower's engine.
Counters = tuple[EngineStats, EngineStats]


@dataclass(frozen=True)
class Run:
    """Rows to decode: `rows` rows of `context` tokens, each with `warm` blocks that do not count,
    then `blocks` that do. mask_diffusion replays schedules[row]; other modes need none."""

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
class TowerPasses:
    """Passes of one tower in a run: their number, mean rows and mean seconds."""

    passes: int
    rows_a_pass: float
    seconds_a_pass: float


@dataclass(frozen=True)
class Decoded:
    """Figures of a run: tokens/s of all rows, and means over the counted blocks of their tokens,
    denoiser passes (NFE) and seconds."""

    tokens_per_s: float
    tokens_a_block: float
    nfe_a_block: float
    seconds_a_block: float
    denoiser: TowerPasses
    context: TowerPasses


class EnginePair:
    """Both engines in this process, on one device, over one pool; to be closed.

    `max_tokens` is the most tokens of a pass; `device_steps` as in the engines.
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
        options = EngineOptions(
            max_num_batched_tokens=max_tokens, max_prefill_tokens=max_tokens, prefix_cache_mib=0
        )
        turns = Turns()
        self.denoiser = DenoiserEngine(
            denoiser,
            options,
            rule=self._replay,
            threaded=False,
            device_steps=device_steps,
            turn=turns.denoiser,
        )
        link = LocalLink(context, self.denoiser, shared=True)
        self.context = ContextEngine(
            context,
            link,
            options,
            pool=pool,
            threaded=False,
            device_steps=device_steps,
            turn=turns.context,
        )
        # An engine belongs to one event loop, also over several runs.
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
        requests: otherwise the capture would count as a run's time."""
        self.context.warm_up(block, rows)
        self.denoiser.warm_up(block, self.pool, rows)

    def decode(self, run: Run) -> Decoded:
        """Runs all rows at once. Raises CapacityError if the pool is too small for them."""
        draft_all = [[(run.block_size,)]] * run.rows
        self._replay.load(run.schedules if run.mode == "mask_diffusion" else draft_all)
        # The last token is read by an ordinary pass, which draws the mode's first token.
        self.pool.context = run.context - 1
        return self._runner.run(self._decode(run))

    def generate(self, run: Run, prompts: Mapping[int, Sequence[int]]) -> dict[int, list[Block]]:
        """Reads the prompts of some of the run's rows into empty states, all at once, and writes
        `run.blocks` blocks behind each."""
        self._replay.load(run.schedules)
        self.pool.context = 0
        return self._runner.run(self._generate(run, prompts))

    async def _generate(
        self, run: Run, prompts: Mapping[int, Sequence[int]]
    ) -> dict[int, list[Block]]:
        async def row(number: int) -> list[Block]:
            params = _params(run, number, run.blocks * run.block_size)
            name = f"bench-{number}"
            blocks = generate_blocks(self.context, self.denoiser, name, prompts[number], params)
            return [block async for block in committed(blocks)]

        written = await asyncio.gather(*map(row, prompts))
        return dict(zip(prompts, written, strict=True))

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
        params = _params(run, row, run.room)
        prompt = [0] * run.context
        async with aclosing(
            committed(generate_blocks(start, self.denoiser, f"bench-{row}", prompt, params))
        ) as blocks:
            async for block in blocks:
                race.note(row, block)
                if race.over:
                    return

    def _counters(self) -> Counters:
        return self.denoiser.stats(), self.context.stats()


def _params(run: Run, row: int, max_tokens: int) -> GenerationParams:
    return GenerationParams(
        mode=run.mode,
        max_tokens=max_tokens,
        block_size=run.block_size,
        seed=row,
        draft_source="denoiser",
        commit_rule="released",
    )


class _Start:
    """The context engine, but prefill reads the last token of a prompt only, and returns when the
    prefill of every row has ended."""

    def __init__(self, engine: ContextEngine, barrier: asyncio.Barrier) -> None:
        self.barrier = barrier
        self.open = engine.open
        self.extend = engine.extend
        self.decode = engine.decode
        self.update_mirror = engine.update_mirror
        self.verify = engine.verify
        self.score = engine.score
        self.release = engine.release
        self._prefill = engine.prefill

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        """As `ContextService.prefill`, for the last token of the prompt."""
        prefilled = await self._prefill(row_id, prompt[-1:], generated, params)
        await self.barrier.wait()
        return prefilled


class _Race:
    """Times of each row's blocks, and the engines' counters at the end of the warm-up and of the
    last counted block of the slowest row."""

    def __init__(self, run: Run, counters: Callable[[], Counters]) -> None:
        self._run = run
        self._counters = counters
        self._blocks: list[list[tuple[float, Block]]] = [[] for _ in range(run.rows)]
        self._begin: Counters | None = None
        self._end: Counters | None = None

    @property
    def over(self) -> bool:
        """True if every row has committed all of its counted blocks."""
        return self._end is not None

    def note(self, row: int, block: Block) -> None:
        """Notes that a row has committed a block now."""
        self._blocks[row].append((time.perf_counter(), block))
        slowest = min(map(len, self._blocks))
        if self._begin is None and slowest >= self._run.warm:
            self._begin = self._counters()
        if self._end is None and slowest >= self._run.warm + self._run.blocks:
            self._end = self._counters()

    def decoded(self) -> Decoded:
        """Figures over the counted blocks."""
        assert self._begin is not None
        assert self._end is not None
        first, last = self._run.warm - 1, self._run.warm + self._run.blocks - 1
        seconds = [row[last][0] - row[first][0] for row in self._blocks]
        rows = [[block for _, block in row[first + 1 : last + 1]] for row in self._blocks]
        tokens = [sum(len(block.token_ids) for block in row) for row in rows]
        counted = self._run.rows * self._run.blocks
        return Decoded(
            tokens_per_s=sum(count / spent for count, spent in zip(tokens, seconds, strict=True)),
            tokens_a_block=sum(tokens) / counted,
            nfe_a_block=sum(block.nfe for row in rows for block in row) / counted,
            seconds_a_block=sum(seconds) / counted,
            denoiser=_passes(self._begin[0], self._end[0]),
            context=_passes(self._begin[1], self._end[1]),
        )


def _passes(before: EngineStats, after: EngineStats) -> TowerPasses:
    passes = after.passes - before.passes
    rows = after.pass_rows - before.pass_rows
    seconds = after.pass_seconds - before.pass_seconds
    return TowerPasses(passes, rows / max(1, passes), seconds / max(1, passes))

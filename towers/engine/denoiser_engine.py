"""The denoiser tower's engine: blocks of many rows, each at its own step, in shared passes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from twotower.kernels.replay import ReplayWeights
from twotower.towers.decoding.acceptance import NUM_SCORES, ScoreLines
from twotower.towers.decoding.provisional import draft_on_host
from twotower.towers.decoding.sampling import (
    DOMAIN_AUTOREGRESSIVE,
    DOMAIN_DENOISE,
    Draw,
    Drawn,
    Sampler,
    draw_tokens,
)
from twotower.towers.decoding.services import Block, BlockTiming, PassTime, Watcher
from twotower.towers.decoding.unmasking import BlockDraft, CommitRule, ReplayRule, ThresholdRule
from twotower.towers.engine.admission import Admission
from twotower.towers.engine.denoiser_steps import DenoiserSteps, StepWork
from twotower.towers.engine.device_drafts import DeviceDraft, StepResult, on_device
from twotower.towers.engine.engine import Engine, EngineRow, state_of
from twotower.towers.engine.options import EngineOptions
from twotower.towers.engine.turns import Turn
from twotower.towers.errors import UnavailableError
from twotower.towers.model.context_tower import replay_shapes
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.pool import StatePool
from twotower.towers.state.update import StateUpdate

MIRROR_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class _DrawWork:
    """A pass over a block of a row at `timestep`, which draws its `wanted` positions with `draw`.
    Drafts kept on the device are `StepWork`."""

    state: ContextState
    tokens: Sequence[int]
    timestep: float | None
    wanted: Sequence[int]
    draw: Draw


@dataclass(frozen=True)
class _Asked:
    """A call of `denoise_block`."""

    position: int
    params: GenerationParams
    known: Sequence[int]
    output: Sequence[int]
    watch: Watcher | None

    @property
    def is_draft(self) -> bool:
        """True if the context tower checks the block."""
        return self.params.traits.unit == "draft"

    @property
    def domain(self) -> int:
        """The domain of the block's noise."""
        return DOMAIN_AUTOREGRESSIVE if self.is_draft else DOMAIN_DENOISE

    @property
    def num_scores(self) -> int:
        """How many scores of each position the check of the draft needs."""
        return NUM_SCORES if self.is_draft and 0 < self.params.mix < 1 else 0

    def counted(self, draft: BlockDraft) -> list[list[int]]:
        """Tokens of the block that penalties count at each masked position, beside the output: all
        that are committed; of a draft those before the position, as the check will count them."""
        places = [i for i in range(len(self.known), len(draft.token_ids)) if draft.is_committed(i)]
        return [
            [draft.token_ids[i] for i in places if i < position or not self.is_draft]
            for position in draft.masked
        ]


DenoiserWork = _DrawWork | StepWork
DenoiserResult = Drawn | StepResult


@dataclass(eq=False)
class _Row(EngineRow):
    """`arrived` is set whenever the row's mirror has moved."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class DenoiserEngine(Engine[_Row, DenoiserWork, DenoiserResult]):
    """Mirrors of rows in a denoiser tower; blocks at any step share its passes.

    Mirrors live in `pool`; without one the engine reads states that a context tower on the same
    device lets it `adopt`. `rule` replaces the requests' commit rules, for benchmarks that replay
    recorded schedules. `device_steps` (None: on CUDA) keeps blocks on the device while they are
    denoised, where their parameters allow it; drafts whose scores are needed (acceptance `mix`
    below 1) go by way of the host. `turn` is the denoiser's of `Turns`, where the context tower's
    passes run on the same device.
    """

    def __init__(
        self,
        tower: DenoiserTower,
        options: EngineOptions | None = None,
        *,
        pool: StatePool | None = None,
        rule: Callable[[GenerationParams], CommitRule] | None = None,
        threaded: bool = False,
        device_steps: bool | None = None,
        turn: Turn | None = None,
    ) -> None:
        admission = Admission(pool) if pool is not None else None
        wanted = tower.device.type == "cuda" if device_steps is None else device_steps
        self._steps = DenoiserSteps(tower) if wanted else None
        limits = (options or EngineOptions()).pass_limits(tower.device.type)
        super().__init__("denoiser", self._run, admission, limits, threaded, turn)
        self.tower = tower
        self.pool = pool
        self._rule = rule or commit_rule
        self._replay_weights: ReplayWeights | None = None

    async def open(self, row_id: str, capacity: int) -> None:
        """Waits for the slot and pages of the row's mirror."""
        await self._open(_Row(row_id), capacity)

    def warm_up(
        self, block_size: int = 16, pool: StatePool | None = None, rows: int | None = None
    ) -> None:
        """Captures the graphs of steps over blocks of a length before the first row would have to
        wait for it: for passes of up to `rows` rows (None: all). `pool` is that of states to be
        adopted."""
        pool = pool or self.pool
        if self._steps is not None and pool is not None:
            self._steps.warm_up(pool, block_size, rows or pool.slots.num_slots)

    def follow(self, replay_tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the context tower's replay weights, which deltas need.

        Raises ValueError if they are not those of this model.
        """
        config = self.tower.config
        expected = replay_shapes(config)
        got = {name: tuple(tensor.shape) for name, tensor in replay_tensors.items()}
        if got != expected:
            raise ValueError(f"replay weights: got {got}, expected {expected}")
        moved = {name: tensor.to(self.tower.device) for name, tensor in replay_tensors.items()}
        self._replay_weights = ReplayWeights.from_tensors(moved, config.n_groups) if moved else None

    def receive(self, row_id: str, update: StateUpdate) -> None:
        """Applies an update to a row's mirror; an update of a released row is ignored.

        Raises ValueError if the update does not start where the mirror stands.
        """
        row = self._rows.get(row_id)
        if row is not None and row.state is not None:
            with torch.inference_mode():
                row.state.apply(update, self._replay_weights)
            row.arrived.set()

    def adopt(self, row_id: str, state: ContextState) -> None:
        """Lets an open row read the context tower's state itself, for towers on one device."""
        row = self._rows.get(row_id)
        if row is not None:
            row.state = state
            row.arrived.set()

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        output: Sequence[int] = (),
        watch: Watcher | None = None,
    ) -> Block:
        """Runs all steps of the block at `position`; a draft that is to be accepted by a mix has
        the scores of its new tokens. Raises NumericalError, UnavailableError."""
        row, asked = self._row(row_id), _Asked(position, params, known, output, watch)
        return await self._owned(row, self._denoise(row, asked))

    async def next_token(
        self,
        row_id: str,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int] = (),
    ) -> Block:
        """Draws a token by a plain pass over `last_token` from the state before it."""
        row = self._row(row_id)
        return await self._owned(row, self._next_token(row, position, last_token, params, output))

    async def _denoise(self, row: _Row, asked: _Asked) -> Block:
        params, known, began = asked.params, asked.known, time.monotonic()
        state = await self._at(row, asked.position)
        waited = time.monotonic() - began
        sampler, rule, length = Sampler.from_params(params), self._rule(params), params.block_size
        kept_there = on_device(rule, sampler, length) and not asked.num_scores
        if self._steps is not None and length > len(known) and kept_there:
            assert isinstance(rule, ThresholdRule | ReplayRule)
            kept = DeviceDraft(
                length, asked.position, known, rule, sampler, asked.domain, asked.is_draft
            )
            block = await self._denoise_on_device(state, kept, asked.watch)
        else:
            draft = BlockDraft(length, self.tower.config.mask_token_id, rule, known)
            block = await self._denoise_on_host(state, draft, sampler, asked)
        return _waited(block, waited)

    async def _denoise_on_device(
        self, state: ContextState, draft: DeviceDraft, watch: Watcher | None
    ) -> Block:
        passes: list[PassTime] = []
        while True:
            served = await self._loop.serve((state, draft), draft.length, begun=draft.begun)
            result = served.result
            assert isinstance(result, StepResult)
            passes.append(served.passed)
            if not result.remaining:
                return _block(draft.start, draft.step, result, passes)
            if watch is not None:
                watch(result.draft(draft.start, draft.step))

    async def _denoise_on_host(
        self, state: ContextState, draft: BlockDraft, sampler: Sampler, asked: _Asked
    ) -> Block:
        mask, scores = self.tower.config.mask_token_id, ScoreLines()
        passes: list[PassTime] = []
        while not draft.done:
            masked = list(draft.masked)
            positions = [asked.position + offset for offset in masked]
            # A draft is drawn with the noise of the check: the closer the two towers'
            # distributions, the more often both then take the same token.
            step = 0 if asked.is_draft else draft.step
            drafted = asked.counted(draft) if sampler.penalizes else ()
            draw = Draw(
                sampler,
                positions,
                step,
                asked.domain,
                mask,
                asked.output,
                drafted,
                asked.num_scores,
            )
            work = _DrawWork(state, list(draft.token_ids), draft.timestep, masked, draw)
            begun = draft.step > 0
            served = await self._loop.serve(work, len(draft.token_ids), begun=begun)
            drawn = served.result
            assert isinstance(drawn, Drawn)
            passes.append(served.passed)
            committed = draft.commit(
                drawn.token_ids, drawn.confidences, drawn.log_probs, drawn.top_log_probs
            )
            if drawn.draft_scores is not None:
                scores.keep(masked, committed, drawn.draft_scores)
            if asked.watch is not None and not draft.done:
                predicted = drawn.token_ids, drawn.confidences
                asked.watch(draft_on_host(asked.position, draft, masked, *predicted))
        block = _block(asked.position, draft.step, draft, passes)
        return replace(block, draft_scores=scores.whole())

    async def _next_token(
        self,
        row: _Row,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int],
    ) -> Block:
        began = time.monotonic()
        state = await self._at(row, position - 1)
        waited = time.monotonic() - began
        draw = Draw(Sampler.from_params(params), [position], output=output)
        drawn = await self._loop.submit(_DrawWork(state, [last_token], None, [0], draw), 1)
        assert isinstance(drawn, Drawn)
        block = Block(
            position,
            tuple(drawn.token_ids),
            (0,),
            tuple(drawn.confidences),
            nfe=1,
            log_probs=tuple(drawn.log_probs),
            top_log_probs=tuple(drawn.top_log_probs),
        )
        return _waited(block, waited)

    async def _at(self, row: _Row, position: int) -> ContextState:
        """The row's state once it stands at `position`."""
        try:
            async with asyncio.timeout(MIRROR_TIMEOUT_S):
                while row.state is None or row.state.position != position:
                    row.arrived.clear()
                    await row.arrived.wait()
        except TimeoutError:
            raise UnavailableError(
                f"the context state did not reach token {position} in {MIRROR_TIMEOUT_S:g} s"
            ) from None
        return state_of(row.state)

    def _run(self, works: Sequence[DenoiserWork]) -> list[DenoiserResult | BaseException]:
        """A pass: draws as one packed batch, steps by their block's length. One result per work; an
        error there concerns its row alone."""
        drawn = iter(self._draw([work for work in works if isinstance(work, _DrawWork)]))
        stepped = iter(self._step([work for work in works if not isinstance(work, _DrawWork)]))
        return [next(drawn if isinstance(work, _DrawWork) else stepped) for work in works]

    def _draw(self, works: Sequence[_DrawWork]) -> Sequence[DenoiserResult | BaseException]:
        if not works:
            return ()
        hidden = self.tower.forward(
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
        return draw_tokens(self.tower.logits(hidden[wanted]), [work.draw for work in works])

    def _step(self, works: Sequence[StepWork]) -> Sequence[DenoiserResult | BaseException]:
        if not works:
            return ()
        assert self._steps is not None
        return self._steps.run(works)


def _block(
    start: int, nfe: int, draft: BlockDraft | StepResult, passes: Sequence[PassTime]
) -> Block:
    """The block of a draft that is done, after these passes."""
    return Block(
        start,
        tuple(draft.token_ids),
        tuple(draft.commit_steps),
        tuple(draft.confidences),
        nfe=nfe,
        log_probs=tuple(draft.log_probs),
        passes=tuple(passes),
        top_log_probs=() if isinstance(draft, StepResult) else tuple(draft.top_log_probs),
    )


def _waited(block: Block, seconds: float) -> Block:
    """The block with the time that it waited for its mirror."""
    return replace(block, timing=BlockTiming(time.time(), transfer_s=seconds))


def commit_rule(params: GenerationParams) -> CommitRule:
    """The commit rule of a request's parameters. Of a draft only the tokens before the first wrong
    one count, so that its steps commit the leading run; one that is accepted whole is a block."""
    threshold, drafts = params.confidence_threshold, params.traits.unit == "draft"
    if drafts and params.mix < 1.0:
        return ThresholdRule(threshold, params.draft_steps, "leading")
    steps = params.draft_steps if drafts else params.steps_per_block
    return ThresholdRule(threshold, steps, params.commit_rule)

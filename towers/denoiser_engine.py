"""The denoiser tower's engine: blocks of many rows, each at its own step, in shared passes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch

from twotower.kernels.replay import ReplayWeights, unstack_weights
from twotower.towers.admission import Admission
from twotower.towers.context import replay_shapes
from twotower.towers.denoiser import DenoiserTower
from twotower.towers.engine import Engine, EngineRow, state_of
from twotower.towers.errors import TwoTowerError, UnavailableError
from twotower.towers.memory import StatePool
from twotower.towers.params import GenerationParams
from twotower.towers.protocols import Block
from twotower.towers.sampling import DOMAIN_AUTOREGRESSIVE, DOMAIN_DENOISE, Drawn, Sampler
from twotower.towers.scheduler import PassLimits
from twotower.towers.state import ContextState
from twotower.towers.unmasking import BlockDraft, CommitRule, ThresholdRule
from twotower.towers.update import StateUpdate

MIRROR_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class _Work:
    state: ContextState
    tokens: Sequence[int]
    timestep: float | None
    wanted: Sequence[int]
    first_position: int
    step: int
    sampler: Sampler
    domain: int
    excluded_token: int | None


@dataclass(eq=False)
class _Row(EngineRow):
    """`arrived` is set whenever the mirror has moved."""

    arrived: asyncio.Event = field(default_factory=asyncio.Event)


class DenoiserEngine(Engine[_Row, _Work, Drawn]):
    """Mirrors of rows in a denoiser tower; blocks at any step share its passes.

    Mirrors live in `pool`; without one the engine reads states that a context tower on the same
    device lets it `adopt`. `rule` replaces the requests' commit rules, for benchmarks that replay
    recorded schedules.
    """

    def __init__(
        self,
        tower: DenoiserTower,
        *,
        pool: StatePool | None = None,
        limits: PassLimits | None = None,
        rule: Callable[[GenerationParams], CommitRule] | None = None,
        threaded: bool = False,
    ) -> None:
        admission = Admission(pool) if pool is not None else None
        super().__init__("denoiser", self._pass, admission, limits, threaded)
        self.tower = tower
        self.pool = pool
        self._rule = rule or commit_rule
        self._replay_weights: list[ReplayWeights] | None = None

    async def open(self, row_id: str, capacity: int) -> None:
        """Waits for the slot and pages of the row's mirror."""
        await self._open(_Row(row_id), capacity)

    def follow(self, replay_tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes the context tower's replay weights, without which deltas cannot be applied.

        Raises ValueError if they are not those of this model.
        """
        config = self.tower.config
        expected = replay_shapes(config)
        got = {name: tuple(tensor.shape) for name, tensor in replay_tensors.items()}
        if got != expected:
            raise ValueError(f"replay weights: got {got}, expected {expected}")
        moved = {name: tensor.to(self.tower.device) for name, tensor in replay_tensors.items()}
        self._replay_weights = unstack_weights(moved, config.n_groups) if moved else []

    def receive(self, row_id: str, update: StateUpdate) -> None:
        """Applies an update to a row's mirror; a released row's is ignored.

        Raises ValueError if the update does not start where the mirror stands.
        """
        row = self._rows.get(row_id)
        if row is not None and row.state is not None:
            with torch.inference_mode():
                row.state.apply(update, self._replay_weights)
            row.arrived.set()

    def adopt(self, row_id: str, state: ContextState) -> None:
        """Lets an open row read the context tower's own state, for towers on one device."""
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
    ) -> Block:
        """Runs all steps of the block at `position`. Raises NumericalError, UnavailableError."""
        row = self._row(row_id)
        return await self._owned(row, self._denoise(row, position, params, known))

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        """One plain pass over `last_token` from the state before it."""
        row = self._row(row_id)
        return await self._owned(row, self._next_token(row, position, last_token, params))

    async def _denoise(
        self, row: _Row, position: int, params: GenerationParams, known: Sequence[int]
    ) -> Block:
        state = await self._at(row, position)
        sampler = Sampler.from_params(params)
        mask = self.tower.config.mask_token_id
        draft = BlockDraft(params.block_size, mask, self._rule(params), known)
        verified = params.mode == "verified"
        while not draft.done:
            work = _Work(
                state,
                list(draft.token_ids),
                draft.timestep,
                list(draft.masked),
                position,
                # A draft is drawn with the noise of the check: the closer the two towers'
                # distributions, the more often both then take the same token.
                0 if verified else draft.step,
                sampler,
                DOMAIN_AUTOREGRESSIVE if verified else DOMAIN_DENOISE,
                mask,
            )
            begun = draft.step > 0
            drawn = await self._loop.submit(work, params.block_size, begun=begun)
            draft.commit(drawn.token_ids, drawn.confidences, drawn.log_probs)
        return Block(
            position,
            tuple(draft.token_ids),
            tuple(draft.commit_steps),
            tuple(draft.confidences),
            nfe=draft.step,
            log_probs=tuple(draft.log_probs),
        )

    async def _next_token(
        self, row: _Row, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        state = await self._at(row, position - 1)
        sampler = Sampler.from_params(params)
        work = _Work(
            state, [last_token], None, [0], position, 0, sampler, DOMAIN_AUTOREGRESSIVE, None
        )
        drawn = await self._loop.submit(work, 1)
        return Block(
            position,
            tuple(drawn.token_ids),
            (0,),
            tuple(drawn.confidences),
            nfe=1,
            log_probs=tuple(drawn.log_probs),
        )

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

    def _pass(self, works: Sequence[_Work]) -> list[Drawn | BaseException]:
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
        logits = self.tower.logits(hidden[wanted]).split([len(work.wanted) for work in works])
        return [_predict(work, part) for work, part in zip(works, logits, strict=True)]


def commit_rule(params: GenerationParams) -> CommitRule:
    """The rule that a request's own parameters ask for."""
    steps = params.draft_steps if params.mode == "verified" else params.steps_per_block
    return ThresholdRule(params.confidence_threshold, steps)


def _predict(work: _Work, logits: torch.Tensor) -> Drawn | BaseException:
    positions = [work.first_position + offset for offset in work.wanted]
    try:
        return work.sampler.draw(logits, positions, work.step, work.domain, work.excluded_token)
    except TwoTowerError as error:
        return error

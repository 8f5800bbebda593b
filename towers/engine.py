"""The two engines: rows of many requests in one tower, batched pass by pass.

An engine fulfils its side of `protocols.py`. All its coroutines belong to one event loop. Passes
run in that loop, or with `threaded=True` in one worker thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from twotower.kernels.replay import ReplayWeights, unstack_weights
from twotower.towers.batching import BatchLoop
from twotower.towers.context import ContextTower, replay_shapes
from twotower.towers.denoiser import DenoiserTower
from twotower.towers.errors import CapacityError, NumericalError, TwoTowerError, UnavailableError
from twotower.towers.params import GenerationParams
from twotower.towers.protocols import Block, StateLink
from twotower.towers.sampling import DOMAIN_AUTOREGRESSIVE, DOMAIN_DENOISE, Sampler
from twotower.towers.state import ContextState, StateUpdate
from twotower.towers.unmasking import BlockDraft, CommitRule, ThresholdRule

# Prompts are read on this grid whatever shares the pass, so that a prompt's state has the same
# bits after a restart or in another batch.
PREFILL_CHUNK = 64
MAX_PASS_TOKENS = 512
MIRROR_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class _Draw:
    """Sample the token after the pass."""

    sampler: Sampler
    position: int


@dataclass(frozen=True)
class _ContextWork:
    state: ContextState
    tokens: Sequence[int]
    advance: bool = True
    draw: _Draw | None = None
    targets: Sequence[int] | None = None


@dataclass(frozen=True)
class _Token:
    token_id: int
    confidence: float


@dataclass(frozen=True)
class _ContextResult:
    token: _Token | None = None
    logprobs: tuple[float, ...] = ()


class ContextEngine:
    """Rows in a context tower. `link` carries their states to a denoiser, if there is one."""

    def __init__(
        self, tower: ContextTower, link: StateLink | None = None, *, threaded: bool = False
    ) -> None:
        self.tower = tower
        self.link = link
        self._rows: dict[str, ContextState] = {}
        self._next: dict[str, _Token] = {}
        self._executor = ThreadPoolExecutor(1, "context") if threaded else None
        self._loop: BatchLoop[_ContextWork, _ContextResult] = BatchLoop(
            self._pass, MAX_PASS_TOKENS, self._executor
        )

    @property
    def num_rows(self) -> int:
        """Rows that are open."""
        return len(self._rows)

    def stats(self) -> dict[str, float]:
        """Counters since the start and the present load."""
        return _stats(self._rows, self._loop)

    async def open(self, row_id: str, capacity: int) -> None:
        """Takes room for a row of up to `capacity` tokens."""
        _open(self._rows, row_id, self.tower, capacity)

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> int:
        """Reads prompt and generated tokens, cut where the undisturbed row would have cut them."""
        state = self._open_row(row_id)
        pieces = prefill_pieces(prompt, generated, params)
        for index, piece in enumerate(pieces):
            last = index == len(pieces) - 1
            draw = None
            if last and params.mode == "ar":
                position = len(prompt) + len(generated)
                draw = _Draw(Sampler.from_params(params), position)
            # mock_ar reads the context as it was before its last token: that one stays in the log.
            keep = last and params.mode == "mock_ar"
            result = await self._submit(_ContextWork(state, piece, not keep, draw))
            self._open_row(row_id)
            if result.token is not None:
                self._next[row_id] = result.token
        if params.mode != "ar":
            await self._publish(row_id, state, 0)
        return len(pieces)

    async def extend(self, row_id: str, token_ids: Sequence[int]) -> int:
        """Appends a committed block, or one token of a mock_ar row, and publishes the state."""
        state = self._open_row(row_id)
        start = state.position
        mock = state.length > state.position
        if mock:
            self.tower.advance(state, 1)
        await self._submit(_ContextWork(state, token_ids, advance=not mock))
        await self._publish(row_id, state, start)
        return 1

    async def decode(self, row_id: str, count: int, params: GenerationParams) -> Block:
        """Takes the token drawn last, then reads it and draws the next, up to `count` times."""
        state = self._open_row(row_id)
        sampler = Sampler.from_params(params)
        start = state.position
        taken: list[_Token] = []
        passes = 0
        while len(taken) < count:
            token = self._next[row_id]
            taken.append(token)
            if token.token_id == params.eos_token_id:
                break
            if state.position + 1 >= state.capacity:
                break
            draw = _Draw(sampler, state.position + 1)
            result = await self._submit(_ContextWork(state, [token.token_id], draw=draw))
            passes += 1
            assert result.token is not None
            self._open_row(row_id)
            self._next[row_id] = result.token
        return Block(
            start,
            tuple(token.token_id for token in taken),
            tuple(range(len(taken))),
            tuple(token.confidence for token in taken),
            nfe=0,
            context_passes=passes,
        )

    async def score(self, token_ids: Sequence[int]) -> list[float]:
        """Natural-log probabilities of tokens 1..n-1; the state lives only as long as the call."""
        state = self.tower.new_state(len(token_ids))
        logprobs: list[float] = []
        read = token_ids[:-1]
        for start in range(0, len(read), PREFILL_CHUNK):
            piece = read[start : start + PREFILL_CHUNK]
            targets = token_ids[start + 1 : start + 1 + len(piece)]
            result = await self._submit(_ContextWork(state, piece, targets=targets))
            logprobs.extend(result.logprobs)
        return logprobs

    async def release(self, row_id: str) -> None:
        """Frees the row; a pass that still holds its state drops it at its end."""
        self._rows.pop(row_id, None)
        self._next.pop(row_id, None)

    def _open_row(self, row_id: str) -> ContextState:
        if row_id not in self._rows:
            raise UnavailableError("the row was released")
        return self._rows[row_id]

    async def _submit(self, work: _ContextWork) -> _ContextResult:
        return await self._loop.submit(work, len(work.tokens))

    async def _publish(self, row_id: str, state: ContextState, start: int) -> None:
        if self.link is not None and row_id in self._rows:
            await self.link.publish(row_id, state, start)

    def _pass(self, works: Sequence[_ContextWork]) -> list[_ContextResult | BaseException]:
        works = list(works)
        order = sorted(range(len(works)), key=lambda i: len(works[i].tokens))
        ordered = [works[i] for i in order]
        hidden = self.tower.forward(
            [work.tokens for work in ordered], [work.state for work in ordered]
        )
        results: list[_ContextResult | BaseException] = [_ContextResult()] * len(works)
        ends = _ends([len(work.tokens) for work in ordered])
        self._read_heads(ordered, order, hidden, ends, results)
        for work in ordered:
            if work.advance:
                self.tower.advance(work.state, len(work.tokens))
        return results

    def _read_heads(
        self,
        ordered: list[_ContextWork],
        order: list[int],
        hidden: torch.Tensor,
        ends: list[int],
        results: list[_ContextResult | BaseException],
    ) -> None:
        drawing = [i for i, work in enumerate(ordered) if work.draw is not None]
        if drawing:
            logits = self.tower.logits(hidden[[ends[i] - 1 for i in drawing]])
            for line, i in zip(logits.split(1), drawing, strict=True):
                results[order[i]] = _draw_token(ordered[i].draw, line)
        for i, work in enumerate(ordered):
            if work.targets is not None:
                span = slice(ends[i] - len(work.tokens), ends[i])
                results[order[i]] = _score(self.tower.logits(hidden[span]), work.targets)


@dataclass(frozen=True)
class _DenoiserWork:
    state: ContextState
    tokens: Sequence[int]
    timestep: float | None
    wanted: Sequence[int]
    first_position: int
    step: int
    sampler: Sampler
    domain: int
    excluded_token: int | None


Prediction = tuple[list[int], list[float]]


class DenoiserEngine:
    """Mirrors of rows in a denoiser tower; blocks at any step share its passes.

    `rule` replaces the requests' commit rules, for benchmarks that replay recorded schedules.
    """

    def __init__(
        self,
        tower: DenoiserTower,
        *,
        threaded: bool = False,
        rule: Callable[[GenerationParams], CommitRule] | None = None,
    ) -> None:
        self.tower = tower
        self._rule = rule or threshold_rule
        self._rows: dict[str, ContextState] = {}
        self._arrived: dict[str, asyncio.Event] = {}
        self._replay_weights: list[ReplayWeights] | None = None
        self._executor = ThreadPoolExecutor(1, "denoiser") if threaded else None
        self._loop: BatchLoop[_DenoiserWork, Prediction] = BatchLoop(
            self._pass, MAX_PASS_TOKENS, self._executor
        )

    @property
    def num_rows(self) -> int:
        """Rows that are open."""
        return len(self._rows)

    def stats(self) -> dict[str, float]:
        """Counters since the start and the present load."""
        return _stats(self._rows, self._loop)

    async def open(self, row_id: str, capacity: int) -> None:
        """Takes room for the mirror of a row of up to `capacity` tokens."""
        _open(self._rows, row_id, self.tower, capacity)
        self._arrived[row_id] = asyncio.Event()

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
        state = self._rows.get(row_id)
        if state is not None:
            with torch.inference_mode():
                state.apply(update, self._replay_weights)
            self._arrived[row_id].set()

    def adopt(self, row_id: str, state: ContextState) -> None:
        """Lets an open row read the context tower's own state, for towers on one device."""
        if row_id in self._rows:
            self._rows[row_id] = state
            self._arrived[row_id].set()

    async def denoise_block(self, row_id: str, position: int, params: GenerationParams) -> Block:
        """Runs all steps of the block at `position`. Raises NumericalError, UnavailableError."""
        state = await self._at(row_id, position)
        sampler = Sampler.from_params(params)
        mask = self.tower.config.mask_token_id
        draft = BlockDraft(params.block_size, mask, self._rule(params))
        while not draft.done:
            work = _DenoiserWork(
                state,
                list(draft.token_ids),
                draft.timestep,
                list(draft.masked),
                position,
                draft.step,
                sampler,
                DOMAIN_DENOISE,
                mask,
            )
            tokens, confidences = await self._loop.submit(work, params.block_size)
            if row_id not in self._rows:
                raise UnavailableError("the row was released")
            draft.commit(tokens, confidences)
        return Block(
            position,
            tuple(draft.token_ids),
            tuple(draft.commit_steps),
            tuple(draft.confidences),
            nfe=draft.step,
        )

    async def next_token(
        self, row_id: str, position: int, last_token: int, params: GenerationParams
    ) -> Block:
        """One plain pass over `last_token` from the state before it."""
        state = await self._at(row_id, position - 1)
        sampler = Sampler.from_params(params)
        work = _DenoiserWork(
            state, [last_token], None, [0], position, 0, sampler, DOMAIN_AUTOREGRESSIVE, None
        )
        tokens, confidences = await self._loop.submit(work, 1)
        return Block(position, tuple(tokens), (0,), tuple(confidences), nfe=1)

    async def release(self, row_id: str) -> None:
        """Frees the row; a pass that still reads its mirror drops it at its end."""
        self._rows.pop(row_id, None)
        arrived = self._arrived.pop(row_id, None)
        if arrived is not None:
            arrived.set()

    async def _at(self, row_id: str, position: int) -> ContextState:
        """The row's state once it stands at `position`."""
        try:
            async with asyncio.timeout(MIRROR_TIMEOUT_S):
                while self._rows[row_id].position != position:
                    self._arrived[row_id].clear()
                    await self._arrived[row_id].wait()
        except TimeoutError:
            raise UnavailableError(
                f"the context state did not reach token {position} in {MIRROR_TIMEOUT_S:g} s"
            ) from None
        except KeyError:
            raise UnavailableError("the row was released while it waited") from None
        return self._rows[row_id]

    def _pass(self, works: Sequence[_DenoiserWork]) -> list[Prediction | BaseException]:
        order = sorted(range(len(works)), key=lambda i: len(works[i].tokens))
        ordered = [works[i] for i in order]
        hidden = self.tower.forward(
            [work.tokens for work in ordered],
            [work.timestep for work in ordered],
            [work.state for work in ordered],
        )
        ends = _ends([len(work.tokens) for work in ordered])
        wanted = [
            ends[i] - len(work.tokens) + offset
            for i, work in enumerate(ordered)
            for offset in work.wanted
        ]
        logits = self.tower.logits(hidden[wanted])
        results: list[Prediction | BaseException] = [([], [])] * len(works)
        parts = logits.split([len(work.wanted) for work in ordered])
        for i, work, part in zip(order, ordered, parts, strict=True):
            results[i] = _predict(work, part)
        return results


def threshold_rule(params: GenerationParams) -> CommitRule:
    """The rule that a request's own parameters ask for."""
    return ThresholdRule(params.confidence_threshold, params.steps_per_block)


def prefill_pieces(
    prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
) -> list[list[int]]:
    """The passes that read a row: its prompt on the fixed grid, then what was generated in the
    units in which it was committed. The last token of a mock_ar row is a pass of its own."""
    tokens = list(prompt)
    unit = params.block_size if params.mode == "mask_diffusion" else 1
    tail = [tokens.pop()] if params.mode == "mock_ar" else []
    pieces = [tokens[i : i + PREFILL_CHUNK] for i in range(0, len(tokens), PREFILL_CHUNK)]
    if tail:
        pieces.append(tail)
    pieces += [list(generated[i : i + unit]) for i in range(0, len(generated), unit)]
    return pieces


def _open(
    rows: dict[str, ContextState], row_id: str, tower: ContextTower | DenoiserTower, capacity: int
) -> None:
    if row_id in rows:
        raise ValueError(f"row_id: {row_id} is open already")
    try:
        rows[row_id] = tower.new_state(capacity)
    except (RuntimeError, MemoryError):
        raise CapacityError(f"no memory for a row of {capacity} tokens") from None


def _stats(
    rows: dict[str, ContextState],
    loop: BatchLoop[_ContextWork, _ContextResult] | BatchLoop[_DenoiserWork, Prediction],
) -> dict[str, float]:
    return {
        "rows": len(rows),
        "waiting": loop.waiting,
        "state_bytes": sum(state.num_bytes for state in rows.values()),
        "passes": loop.stats.passes,
        "pass_rows": loop.stats.rows,
        "pass_tokens": loop.stats.tokens,
        "pass_seconds": loop.stats.seconds,
    }


def _ends(lengths: Sequence[int]) -> list[int]:
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    return ends


def _draw_token(draw: _Draw | None, logits: torch.Tensor) -> _ContextResult | BaseException:
    assert draw is not None
    try:
        tokens, confidences = draw.sampler.draw(logits, [draw.position], 0, DOMAIN_AUTOREGRESSIVE)
    except TwoTowerError as error:
        return error
    return _ContextResult(_Token(tokens[0], confidences[0]))


def _score(logits: torch.Tensor, targets: Sequence[int]) -> _ContextResult | BaseException:
    if not bool(torch.isfinite(logits).all()):
        return NumericalError("non-finite logits while scoring")
    chosen = torch.tensor(list(targets), device=logits.device).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1)
    return _ContextResult(logprobs=tuple(logprobs.tolist()))


def _predict(work: _DenoiserWork, logits: torch.Tensor) -> Prediction | BaseException:
    positions = [work.first_position + offset for offset in work.wanted]
    try:
        return work.sampler.draw(logits, positions, work.step, work.domain, work.excluded_token)
    except TwoTowerError as error:
        return error

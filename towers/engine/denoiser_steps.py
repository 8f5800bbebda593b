"""The denoiser's step with its decisions on the device: forward, predict, commit.

A block's draft stands in tables by slot. A step sends which slots take part, replays two graphs
(the pass itself, then the head for as many lines as are masked) and waits once, for what the step
made of the drafts. Bits and decisions are those of the host's loop (`unmasking.BlockDraft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.commit import Drafts, threshold_below
from twotower.kernels.unmask import SamplingBatch
from twotower.towers.decoding.sampling import Sampler, signed
from twotower.towers.decoding.unmasking import CommitRule, ReplayRule, ThresholdRule
from twotower.towers.engine.cuda_graph import (
    GraphMemory,
    Program,
    Programs,
    Results,
    bucket_for,
    buckets_up_to,
    rows_at_once,
)
from twotower.towers.errors import NumericalError
from twotower.towers.model.backbone import MixerInputs
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.tensors import StateTensors

MAX_LENGTH = 64
_MAX_QUOTA = 64
# Lines through the head, as shares of the pass's tokens: a quarter, a half, all.
_HEAD_SHARES = (4, 2, 1)
_WORDS = ("key", "start", "domain", "fixed_step", "eos", "eos_from")


@dataclass(eq=False)
class DeviceDraft:
    """A block on its way from masks to tokens whose state the device keeps.

    `known` tokens at its head are committed from the start. `step` and `remaining` follow the
    device. `fixed_step` draws every step with the noise of step 0.
    """

    length: int
    start: int
    known: Sequence[int]
    rule: ThresholdRule | ReplayRule
    sampler: Sampler
    domain: int
    fixed_step: bool
    step: int = 0
    remaining: int = -1

    @property
    def begun(self) -> bool:
        """Whether the device has it."""
        return self.remaining >= 0

    @property
    def masked(self) -> int:
        """Positions still masked."""
        return self.remaining if self.begun else self.length - len(self.known)


@dataclass(frozen=True)
class StepResult:
    """A draft after a step: masked positions left, and of every position token, commit step (-1:
    masked), confidence and log-probability."""

    remaining: int
    token_ids: list[int]
    commit_steps: list[int]
    confidences: list[float]
    log_probs: list[float]


def on_device(rule: CommitRule, sampler: Sampler, length: int) -> bool:
    """Whether such a block can be committed on the device."""
    known = isinstance(rule, ThresholdRule) or (
        isinstance(rule, ReplayRule) and len(rule.schedule) < _MAX_QUOTA
    )
    return known and not sampler.filtered and length <= MAX_LENGTH


class DenoiserSteps:
    """Steps of blocks whose states live in one pool, which is that of the first step."""

    def __init__(self, tower: DenoiserTower) -> None:
        self._tower = tower
        self._memory = GraphMemory(tower.device)
        self._tables: _Tables | None = None
        self._programs: Programs[tuple[int, int], _Program] = Programs(self._new_program)

    def run(
        self, works: Sequence[tuple[ContextState, DeviceDraft]]
    ) -> list[StepResult | NumericalError]:
        """One step of each row's draft, those of one length together."""
        results: dict[int, StepResult | NumericalError] = {}
        for length in {draft.length for _, draft in works}:
            same = [index for index, (_, draft) in enumerate(works) if draft.length == length]
            for first in range(0, len(same), rows_at_once(length)):
                own = same[first : first + rows_at_once(length)]
                steps = self._run_length([works[index] for index in own], length)
                results |= zip(own, steps, strict=True)
        return [results[index] for index in range(len(works))]

    def warm_up(self, pool: StateTensors, length: int, rows: int) -> None:
        """Captures the graphs of all passes of up to `rows` blocks of `length` tokens; blocks of
        more than MAX_LENGTH have none."""
        for bucket in buckets_up_to(rows, length) if length <= MAX_LENGTH else ():
            self._program(pool, bucket, length).capture()

    def _run_length(
        self, works: Sequence[tuple[ContextState, DeviceDraft]], length: int
    ) -> list[StepResult | NumericalError]:
        pool = works[0][0].pool
        program = self._program(pool, bucket_for(len(works)), length)
        assert self._tables is not None
        fresh = [(state.slot, draft) for state, draft in works if not draft.begun]
        if fresh:
            self._tables.begin(fresh)
        states = [state for state, _ in works]
        masked = sum(draft.masked for _, draft in works)
        results = program.step(states, masked)
        for (_, draft), result in zip(works, results, strict=True):
            if isinstance(result, StepResult):
                draft.step += 1
                draft.remaining = result.remaining
        return results

    def _program(self, pool: StateTensors, rows: int, length: int) -> _Program:
        if self._tables is None or self._tables.pool is not pool:
            self._tables = _Tables(pool, self._tower)
            self._programs.clear()
        return self._programs[rows, length]

    def _new_program(self, shape: tuple[int, int]) -> _Program:
        assert self._tables is not None
        return _Program(self._tower, self._tables, *shape, self._memory)


class _Tables:
    """What the device knows of each slot's draft, and the modulations of each block length."""

    def __init__(self, pool: StateTensors, tower: DenoiserTower) -> None:
        slots, device = pool.slots.num_slots, tower.device
        self.pool = pool
        self._tower = tower
        # As long as a program of the length: those of 64 tokens are 54 MB for the 30B model.
        self._modulations: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

        def table(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.words = table(len(_WORDS), dtype=torch.int64)
        self.temperature = table(dtype=torch.float32)
        self.drafts = Drafts(
            table(MAX_LENGTH, dtype=torch.int64),
            table(MAX_LENGTH, dtype=torch.int32),
            table(MAX_LENGTH, dtype=torch.float32),
            table(MAX_LENGTH, dtype=torch.float32),
            table(dtype=torch.int32),
            table(dtype=torch.int32),
            table(dtype=torch.float32),
            table(_MAX_QUOTA, dtype=torch.int32),
            table(dtype=torch.int32),
        )

    def modulations(self, length: int) -> Tensor:
        """Of every number of masked positions of a block, [length + 1, layers, 3, H]."""
        known = self._modulations.get(length)
        if known is None:
            parts = [self._tower.modulation(masked / length) for masked in range(length + 1)]
            known = self._modulations[length] = torch.stack(parts)
        return known

    def word(self, name: str, slots: Tensor) -> Tensor:
        """One word of each slot, as `slots`."""
        return self.words[slots, _WORDS.index(name)]

    @torch.inference_mode()
    def begin(self, fresh: Sequence[tuple[int, DeviceDraft]]) -> None:
        """Enters blocks of which nothing has been denoised yet."""
        drafts, device = self.drafts, self.words.device
        slots = torch.tensor([slot for slot, _ in fresh]).to(device)
        own = [draft for _, draft in fresh]
        mask = self._tower.config.mask_token_id
        rows = [_first_rows(draft, mask) for draft in own]
        whole = torch.tensor([row[0] for row in rows], dtype=torch.int64).to(device)
        real = torch.tensor([row[1] for row in rows], dtype=torch.float32).to(device)
        wide = [MAX_LENGTH, MAX_LENGTH, _MAX_QUOTA, 2, len(_WORDS)]
        tokens, commit_steps, quota, counts, words = whole.split(wide, dim=1)
        drafts.tokens[slots] = tokens
        drafts.commit_steps[slots] = commit_steps.int()
        drafts.confidences[slots] = (commit_steps >= 0).float()
        drafts.log_probs[slots] = 0.0
        drafts.step[slots] = 0
        drafts.steps[slots] = counts[:, 0].int()
        drafts.remaining[slots] = counts[:, 1].int()
        drafts.quota[slots] = quota.int()
        drafts.threshold[slots] = real[:, 0]
        self.temperature[slots] = real[:, 1]
        self.words[slots] = words


def _first_rows(draft: DeviceDraft, mask_token_id: int) -> tuple[list[int], list[float]]:
    """A draft's entries before its first step: whole numbers, and real ones."""
    known, masked, sampler = len(draft.known), draft.masked, draft.sampler
    beyond = MAX_LENGTH - draft.length
    tokens = [*draft.known, *[mask_token_id] * masked, *[0] * beyond]
    commit_steps = [*[0] * known, *[-1] * masked, *[0] * beyond]
    rule, quota, steps, threshold = draft.rule, [-1] * _MAX_QUOTA, 1, 1.0
    if isinstance(rule, ReplayRule):
        # A schedule that has run out commits the rest, which `steps` = 1 does at every step.
        quota[: len(rule.schedule)] = rule.schedule
    else:
        steps, threshold = rule.steps_per_block, threshold_below(rule.threshold)
    eos = -1 if sampler.eos_token_id is None else sampler.eos_token_id
    words = [
        signed(sampler.key),
        draft.start,
        draft.domain,
        int(draft.fixed_step),
        eos,
        sampler.eos_from,
    ]
    whole = [*tokens, *commit_steps, *quota, min(steps, MAX_LENGTH), masked, *words]
    return whole, [threshold, sampler.temperature]


class _Program(Program):
    """The step of up to B rows with blocks of L tokens, over buffers of its own."""

    def __init__(
        self,
        tower: DenoiserTower,
        tables: _Tables,
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
        # What is drawn of each token; one more takes what the padding of the lines gives.
        self._drawn = torch.zeros(4, total + 1, dtype=torch.float64, device=device)
        self._results = Results((rows, 1 + 4 * length), device)
        self._body = self._add(self._forward)
        sizes = dict.fromkeys(-(-total // share) for share in _HEAD_SHARES)
        self._heads = {size: self._add(partial(self._predict_and_commit, size)) for size in sizes}

    def step(
        self, states: Sequence[ContextState], masked: int
    ) -> list[StepResult | NumericalError]:
        """One step of the drafts in these states' slots, with so many masked positions in all."""
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
        own = self._slots.clamp_min(0).long()
        tokens = drafts.tokens[own, :length].flatten()
        # Padding reads slot 0, whose block may be of any length: without the bound its entry could
        # lie behind this length's table. A failed row has -1.
        masked = torch.where(self._slots >= 0, drafts.remaining[own], 0).clamp(0, length)
        index = masked.long().repeat_interleave(length)
        self._hidden.copy_(self._tower.run(tokens, self._modulations, index, reads))
        self._lines.copy_(dispatch.select_masked(drafts, self._slots, length))

    def _predict_and_commit(self, count: int) -> None:
        """Draws the first `count` lines, which hold all masked positions, and commits."""
        drafts, length = self._tables.drafts, self._length
        lines = self._lines[:count].long()
        total = self._drawn.shape[1] - 1
        token = torch.where(lines >= 0, lines, total)
        picked = self._hidden[token.clamp_max(total - 1)]
        drawn = dispatch.predict(self._tower.logits(picked), self._lines_of(token, total))
        self._drawn.index_copy_(1, token, torch.stack([part.double() for part in drawn]))
        ids, confidences, log_probs, finite = self._drawn[:, :total].unflatten(1, (-1, length))
        dispatch.commit(
            drafts,
            self._slots,
            ids.long(),
            confidences.float(),
            log_probs.float(),
            finite > 0,
        )
        own = self._slots.clamp_min(0).long()
        parts = (drafts.tokens, drafts.commit_steps, drafts.confidences, drafts.log_probs)
        kept = [part[own, :length].double() for part in parts]
        self._results.put(torch.cat([drafts.remaining[own, None].double(), *kept], dim=1))

    def _lines_of(self, token: Tensor, total: int) -> SamplingBatch:
        """How the line of each token of the pass is drawn; `total` is no token."""
        tables, length = self._tables, self._length
        own = token.clamp_max(total - 1)
        slots = self._slots.clamp_min(0).long()[own // length]
        position = tables.word("start", slots) + own % length
        step = torch.where(tables.word("fixed_step", slots) > 0, 0, tables.drafts.step[slots])
        early = position < tables.word("eos_from", slots)
        mask = self._tower.config.mask_token_id
        return SamplingBatch(
            tables.temperature[slots],
            tables.word("key", slots),
            position,
            step.long(),
            tables.word("domain", slots),
            torch.full_like(position, mask),
            torch.where(early, tables.word("eos", slots), -1),
        )

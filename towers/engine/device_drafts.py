"""Drafts of blocks whose state the device keeps while they are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from twotower.kernels.commit import RULES, Drafts, threshold_below
from twotower.kernels.draft_lines import WORDS, DraftSampling
from twotower.towers.decoding.sampling import Sampler, signed
from twotower.towers.decoding.services import ProvisionalBlock
from twotower.towers.decoding.unmasking import CommitName, CommitRule, ReplayRule, ThresholdRule
from twotower.towers.engine.buckets import MAX_LENGTH
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.tensors import StateTensors

_MAX_QUOTA = 64


@dataclass(eq=False)
class DeviceDraft:
    """A block on its way from masks to tokens, kept on the device.

    `known` tokens at its head are committed from the start. `step` and `remaining` (masked
    positions, -1 before the first step) follow the device. `fixed_step` draws every step with the
    noise of step 0.
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
        """True once the device has it."""
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

    def draft(self, start: int, steps: int) -> ProvisionalBlock:
        """The draft of the block at `start` after so many steps."""
        masked = tuple(step < 0 for step in self.commit_steps)
        parts = tuple(self.token_ids), masked, tuple(self.confidences)
        return ProvisionalBlock(start, steps - 1, *parts)


def on_device(rule: CommitRule, sampler: Sampler, length: int) -> bool:
    """True if a block of `length` tokens with this rule and sampler can be kept on the device."""
    supported = isinstance(rule, ThresholdRule) or (
        isinstance(rule, ReplayRule) and len(rule.schedule) < _MAX_QUOTA
    )
    return supported and sampler.plain and length <= MAX_LENGTH


class DraftTables:
    """Drafts of a pool's slots on the device, and the modulations of each block length."""

    def __init__(self, pool: StateTensors, tower: DenoiserTower) -> None:
        slots, device = pool.slots.num_slots, tower.device
        self.pool = pool
        self._tower = tower
        # As long as a program of the length: those of 64 tokens are 54 MB for the 30B model.
        self._modulations: WeakValueDictionary[int, Tensor] = WeakValueDictionary()

        def table(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, *shape, dtype=dtype, device=device)

        self.sampling = DraftSampling(
            table(len(WORDS), dtype=torch.int64),
            table(dtype=torch.float32),
            tower.config.mask_token_id,
        )
        self.drafts = Drafts(
            table(MAX_LENGTH, dtype=torch.int64),
            table(MAX_LENGTH, dtype=torch.int32),
            table(MAX_LENGTH, dtype=torch.float32),
            table(MAX_LENGTH, dtype=torch.float32),
            table(dtype=torch.int32),
            table(dtype=torch.int32),
            table(dtype=torch.float32),
            table(dtype=torch.int32),
            table(_MAX_QUOTA, dtype=torch.int32),
            table(dtype=torch.int32),
        )

    def modulations(self, length: int) -> Tensor:
        """Modulations of 0 to `length` masked positions of a block, [length + 1, layers, 3, H]."""
        known = self._modulations.get(length)
        if known is None:
            parts = [self._tower.modulation(masked / length) for masked in range(length + 1)]
            known = self._modulations[length] = torch.stack(parts)
        return known

    @torch.inference_mode()
    def begin(self, fresh: Sequence[tuple[int, DeviceDraft]]) -> None:
        """Enters blocks before their first step, with their slots."""
        drafts, sampling = self.drafts, self.sampling
        device = sampling.words.device
        slots = torch.tensor([slot for slot, _ in fresh]).to(device)
        mask = self._tower.config.mask_token_id
        rows = [_first_rows(draft, mask) for _, draft in fresh]
        whole = torch.tensor([row[0] for row in rows], dtype=torch.int64).to(device)
        real = torch.tensor([row[1] for row in rows], dtype=torch.float32).to(device)
        wide = [MAX_LENGTH, MAX_LENGTH, _MAX_QUOTA, 3, len(WORDS)]
        tokens, commit_steps, quota, counts, words = whole.split(wide, dim=1)
        drafts.tokens[slots] = tokens
        drafts.commit_steps[slots] = commit_steps.int()
        drafts.confidences[slots] = (commit_steps >= 0).float()
        drafts.log_probs[slots] = 0.0
        drafts.step[slots] = 0
        drafts.steps[slots] = counts[:, 0].int()
        drafts.remaining[slots] = counts[:, 1].int()
        drafts.rule[slots] = counts[:, 2].int()
        drafts.quota[slots] = quota.int()
        drafts.threshold[slots] = real[:, 0]
        sampling.temperature[slots] = real[:, 1]
        sampling.words[slots] = words


def _first_rows(draft: DeviceDraft, mask_token_id: int) -> tuple[list[int], list[float]]:
    """A draft's entries before its first step: whole numbers, and real numbers."""
    known, masked, sampler = len(draft.known), draft.masked, draft.sampler
    beyond = MAX_LENGTH - draft.length
    tokens = [*draft.known, *[mask_token_id] * masked, *[0] * beyond]
    commit_steps = [*[0] * known, *[-1] * masked, *[0] * beyond]
    rule, quota, steps, threshold = draft.rule, [-1] * _MAX_QUOTA, 1, 1.0
    name: CommitName = "released"
    if isinstance(rule, ReplayRule):
        # A schedule that has run out commits the rest, which `steps` = 1 does at every step.
        quota[: len(rule.schedule)] = rule.schedule
    else:
        steps, threshold = rule.steps_per_block, threshold_below(rule.threshold)
        name = rule.name
    eos = -1 if sampler.eos_token_id is None else sampler.eos_token_id
    words = [
        signed(sampler.key),
        draft.start,
        draft.domain,
        int(draft.fixed_step),
        eos,
        sampler.eos_from,
    ]
    whole = [
        *tokens,
        *commit_steps,
        *quota,
        min(steps, MAX_LENGTH),
        masked,
        RULES.index(name),
        *words,
    ]
    return whole, [threshold, sampler.temperature]

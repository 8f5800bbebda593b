"""Single passes over rows of equal context, through a tower's modules and in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.bench.filled import FilledPool
from twotower.bench.plain import PlainPass, copy_states
from twotower.planner.floors import MASKED, PassKind
from twotower.towers.engine.context_pass import ContextPass
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.model.backbone import Tower
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.state.context_state import ContextState

# Routing does not depend on how much context attention reads.
_SHORT_CONTEXT = 64
_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class Probe:
    """A pass of a kind over `tokens` [B, L] of rows whose states are at the same position."""

    kind: PassKind
    tower: Tower
    states: Sequence[ContextState]
    tokens: Tensor

    @classmethod
    def of(
        cls,
        kind: PassKind,
        tower: Tower,
        states: Sequence[ContextState],
        block: int,
        seed: int = 0,
    ) -> Probe:
        """A pass over random tokens, `block` a row, or 1 in an AR step; a denoiser's are partly
        masked."""
        length = 1 if kind == "ar" else block
        generator = torch.Generator().manual_seed(seed)
        vocab, mask = tower.config.vocab_size, tower.config.mask_token_id
        tokens = torch.randint(mask + 1, vocab, (len(states), length), generator=generator)
        if kind == "denoise":
            order = torch.rand(tokens.shape, generator=generator).argsort(dim=1)
            tokens[order < round(MASKED * length)] = mask
        return cls(kind, tower, states, tokens)

    @torch.inference_mode()
    def run(self) -> Tensor:
        """Runs the pass and, unless it is an extension, the head over all positions. Returns hidden
        states, [B * L, H] of a denoiser, [B, H] of a context tower, whose states are advanced."""
        rows = self.tokens.tolist()
        if isinstance(self.tower, DenoiserTower):
            hidden = self.tower.forward(rows, [self.timestep] * len(rows), list(self.states))
        else:
            assert isinstance(self.tower, ContextTower)
            works = [ContextWork(*pair) for pair in zip(self.states, rows, strict=True)]
            results = ContextPass(self.tower).run(works)
            hidden = torch.stack([_hidden_of(result) for result in results])
        if self.kind != "extend":
            self.tower.logits(hidden)
        return hidden

    @property
    def timestep(self) -> float:
        """The masked fraction of the rows' tokens, which a denoiser takes as its timestep."""
        mask = self.tower.config.mask_token_id
        return float((self.tokens[0] == mask).float().mean())

    def wanted(self) -> Tensor:
        """The positions of all B * L that go through the head: a denoiser's masked positions, all
        of a context tower's."""
        if self.kind != "denoise":
            return torch.arange(self.tokens.numel())
        return (self.tokens.flatten() == self.tower.config.mask_token_id).nonzero().squeeze(1)

    def modulation(self) -> Tensor | None:
        """Shift, scale and gate of a denoiser's layers, [B, layers, 3, H]; else None."""
        if not isinstance(self.tower, DenoiserTower):
            return None
        modulation = self.tower.modulation(self.timestep)
        return modulation.unsqueeze(0).expand(len(self.states), *modulation.shape)

    def plain(self, *, compiled: bool = False, seen: int | None = None) -> PlainPass:
        """The same pass in plain PyTorch, from copies of the states."""
        length = self.tokens.shape[1]
        copies = copy_states(self.states, self.tower.config, length, seen)
        return PlainPass(self.tower, copies, compiled=compiled)

    def experts_chosen(self) -> list[Tensor]:
        """The experts that the tokens choose, [B * L, k] per MoE layer."""
        plain = self.plain(seen=_SHORT_CONTEXT)
        plain.hidden(self.tokens.to(self.tower.device), self.modulation())
        return plain.experts_chosen


def measured_unique(kind: PassKind, tower: Tower, pool: FilledPool, rows: int, block: int) -> float:
    """Different experts that a pass over fresh rows reads per MoE layer, in the mean of all layers;
    0 without MoE layers. Rows choose independently, so some of them at a time are computed."""
    chosen: list[list[Tensor]] = []
    at_once = min(_ROWS_AT_ONCE, pool.slots.num_slots)
    for begin in range(0, rows, at_once):
        with pool.rows_at(_SHORT_CONTEXT, min(at_once, rows - begin), block) as states:
            chosen.append(Probe.of(kind, tower, states, block, seed=begin).experts_chosen())
    layers: list[int] = [torch.cat(layer).unique().numel() for layer in zip(*chosen, strict=True)]
    return sum(layers) / max(1, len(layers))


def _hidden_of(result: object) -> Tensor:
    if isinstance(result, BaseException):
        raise result
    hidden = result.hidden  # type: ignore[attr-defined]
    assert isinstance(hidden, Tensor)
    return hidden

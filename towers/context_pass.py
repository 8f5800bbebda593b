"""One pass of the context tower over works of many rows, and what each asked to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from twotower.towers.context import ContextTower
from twotower.towers.errors import NumericalError, TwoTowerError
from twotower.towers.protocols import LayerSink
from twotower.towers.sampling import DOMAIN_AUTOREGRESSIVE, Drawn, Sampler
from twotower.towers.state import ContextState


@dataclass(frozen=True)
class Draw:
    """Draw a token from each of the last `len(positions)` logits of the pass."""

    sampler: Sampler
    positions: list[int]


@dataclass(frozen=True)
class ContextWork:
    state: ContextState
    tokens: Sequence[int]
    advance: bool = True
    draw: Draw | None = None
    targets: Sequence[int] | None = None
    sink: LayerSink | None = None


@dataclass(frozen=True)
class ContextResult:
    """What a pass gave a row: its last hidden state [H] and what was asked for besides."""

    hidden: Tensor
    drawn: Drawn | None = None
    logprobs: tuple[float, ...] = ()


class ContextPass:
    """Runs works of several rows as one packed pass of a tower."""

    def __init__(self, tower: ContextTower) -> None:
        self._tower = tower

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        """One result per work; an error there concerns its row alone."""
        hidden = self._tower.forward(
            [work.tokens for work in works],
            [work.state for work in works],
            [work.sink for work in works],
        )
        results = self._read_heads(works, hidden)
        for work in works:
            if work.advance:
                self._tower.advance(work.state, len(work.tokens), work.sink)
        return results

    def _read_heads(
        self, works: Sequence[ContextWork], hidden: Tensor
    ) -> list[ContextResult | BaseException]:
        """What each row asked to know of its hidden states; one product serves all draws."""
        ends = list(accumulate(len(work.tokens) for work in works))
        drawn_lines = [
            range(end - len(work.draw.positions), end) if work.draw else range(0)
            for work, end in zip(works, ends, strict=True)
        ]
        lines = [line for part in drawn_lines for line in part]
        counts = [len(part) for part in drawn_lines]
        logits = self._tower.logits(hidden[lines]).split(counts) if lines else ()
        results: list[ContextResult | BaseException] = []
        for index, (work, end) in enumerate(zip(works, ends, strict=True)):
            last = hidden[end - 1].clone()
            if work.draw is not None:
                results.append(_draw(work.draw, logits[index], last))
            elif work.targets is not None:
                span = slice(end - len(work.tokens), end)
                results.append(_score(self._tower.logits(hidden[span]), work.targets, last))
            else:
                results.append(ContextResult(last))
        return results


def _draw(draw: Draw, logits: Tensor, hidden: Tensor) -> ContextResult | BaseException:
    try:
        drawn = draw.sampler.draw(logits, draw.positions, 0, DOMAIN_AUTOREGRESSIVE)
    except TwoTowerError as error:
        return error
    return ContextResult(hidden, drawn)


def _score(logits: Tensor, targets: Sequence[int], hidden: Tensor) -> ContextResult | BaseException:
    if not bool(torch.isfinite(logits).all()):
        return NumericalError("non-finite logits while scoring")
    chosen = torch.tensor(list(targets), device=logits.device).unsqueeze(1)
    logprobs = torch.log_softmax(logits, dim=-1).gather(1, chosen).squeeze(1)
    return ContextResult(hidden, logprobs=tuple(logprobs.tolist()))

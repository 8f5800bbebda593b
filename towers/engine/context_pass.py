"""One pass of the context tower over works of many rows, and what each asked to know of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from twotower.towers.decoding.sampling import Draw, Drawn, draw_tokens
from twotower.towers.engine.context_blocks import MAX_LENGTH, BlockWork, ContextBlocks
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.errors import NumericalError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import LayerSink

_SCORED_LINES = 128


@dataclass(frozen=True)
class ContextWork:
    """Tokens of a row to read. `advance` moves the snapshot over them, otherwise they stay in the
    log; `draw` draws at the last of them, `targets` asks for these tokens' log-probabilities,
    `sink` takes the update's shares. `prefill` is a piece of a prompt."""

    state: ContextState
    tokens: Sequence[int]
    advance: bool = True
    draw: Draw | None = None
    targets: Sequence[int] | None = None
    sink: LayerSink | None = None
    prefill: bool = False

    @property
    def is_step(self) -> bool:
        """Whether it reads one token into the state, draws the next and no more."""
        plain = self.advance and self.targets is None and self.sink is None
        return plain and len(self.tokens) == 1 and _draws(self.draw, 1)

    @property
    def is_block(self) -> bool:
        """Whether it extends a row by a committed block, or checks a whole draft."""
        if self.prefill or self.targets is not None or len(self.tokens) > MAX_LENGTH:
            return False
        if self.advance:
            return self.draw is None
        return self.sink is None and _draws(self.draw, len(self.tokens))


def _draws(draw: Draw | None, count: int) -> bool:
    """Whether it draws so many tokens, without filters."""
    return draw is not None and len(draw.positions) == count and not draw.sampler.filtered


@dataclass(frozen=True)
class ContextResult:
    """What a pass gave a row: its last hidden state [H] and what was asked for besides."""

    hidden: Tensor
    drawn: Drawn | None = None
    logprobs: tuple[float, ...] = ()


def _given(hidden: Tensor, drawn: Drawn | NumericalError | None) -> ContextResult | NumericalError:
    return drawn if isinstance(drawn, NumericalError) else ContextResult(hidden, drawn)


class ContextPass:
    """Runs works of several rows: decode steps as `steps`, blocks as `blocks`, the rest as one
    packed pass of the tower.

    Blocks join the packed pass where there is one: it reads the weights in any case.
    """

    def __init__(
        self,
        tower: ContextTower,
        steps: ContextSteps | None = None,
        blocks: ContextBlocks | None = None,
    ) -> None:
        self._tower = tower
        self._steps = steps
        self._blocks = blocks

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        """One result per work; an error there concerns its row alone."""
        kinds = [self._kind(work) for work in works]
        if "packed" in kinds:
            kinds = ["packed" if kind == "block" else kind for kind in kinds]
        runs = {"step": self._step, "block": self._block, "packed": self._pass}
        results = {
            kind: iter(run([work for work, own in zip(works, kinds, strict=True) if own == kind]))
            for kind, run in runs.items()
            if kind in kinds
        }
        return [next(results[kind]) for kind in kinds]

    def _kind(self, work: ContextWork) -> str:
        if self._steps is not None and work.is_step:
            return "step"
        return "block" if self._blocks is not None and work.is_block else "packed"

    def _step(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        assert self._steps is not None
        steps = [(work.state, work.tokens[0], work.draw) for work in works if work.draw is not None]
        return [_given(hidden, drawn) for hidden, drawn in self._steps.run(steps)]

    def _block(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        assert self._blocks is not None
        blocks = [BlockWork(work.state, work.tokens, work.draw, work.sink) for work in works]
        return [_given(hidden, drawn) for hidden, drawn in self._blocks.run(blocks)]

    def _pass(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        states, sinks = [work.state for work in works], [work.sink for work in works]
        passed = self._tower.read([work.tokens for work in works], states, sinks)
        results = self._read_heads(works, passed.hidden)
        counts = [len(work.tokens) if work.advance else 0 for work in works]
        self._tower.advance_rows(passed, states, counts, sinks)
        for state, count in zip(states, counts, strict=True):
            if not count:
                state.own_log()
        return results

    def _read_heads(
        self, works: Sequence[ContextWork], hidden: Tensor
    ) -> list[ContextResult | BaseException]:
        """What each row asked to know of its hidden states; one product serves all draws."""
        ends = list(accumulate(len(work.tokens) for work in works))
        drawing = [
            (index, work.draw, end)
            for index, (work, end) in enumerate(zip(works, ends, strict=True))
            if work.draw is not None
        ]
        lines = [line for _, draw, end in drawing for line in range(end - len(draw.positions), end)]
        tokens: dict[int, Drawn | NumericalError] = {}
        if lines:
            drawn = draw_tokens(self._tower.logits(hidden[lines]), [draw for _, draw, _ in drawing])
            tokens = {index: own for (index, _, _), own in zip(drawing, drawn, strict=True)}
        results: list[ContextResult | BaseException] = []
        for index, (work, end) in enumerate(zip(works, ends, strict=True)):
            last, own = hidden[end - 1].clone(), tokens.get(index)
            if isinstance(own, NumericalError):
                results.append(own)
            elif work.targets is not None:
                span = slice(end - len(work.tokens), end)
                results.append(self._score(hidden[span], work.targets, last))
            else:
                results.append(ContextResult(last, own))
        return results

    def _score(
        self, hidden: Tensor, targets: Sequence[int], last: Tensor
    ) -> ContextResult | BaseException:
        """Log-probabilities of `targets` at hidden states [n, H], a few lines at a time: in fp32
        the logits of a whole piece of a prompt would be gigabytes."""
        chosen = torch.tensor(list(targets), device=hidden.device).unsqueeze(1)
        found: list[float] = []
        for lines, own in zip(
            hidden.split(_SCORED_LINES), chosen.split(_SCORED_LINES), strict=True
        ):
            logits = self._tower.logits(lines)
            if not bool(torch.isfinite(logits).all()):
                return NumericalError("non-finite logits while scoring")
            logprobs = torch.log_softmax(logits.float(), dim=-1)
            found += logprobs.gather(1, own).squeeze(1).tolist()
        return ContextResult(last, logprobs=tuple(found))

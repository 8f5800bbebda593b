"""A pass of the context tower over works of many rows, and what is drawn and scored of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from twotower.towers.decoding.acceptance import Checked, check_draft
from twotower.towers.decoding.alternatives import most_probable
from twotower.towers.decoding.sampling import Drawn, draw_tokens
from twotower.towers.decoding.services import TopLogProbs
from twotower.towers.engine.context_blocks import ContextBlocks
from twotower.towers.engine.context_drafts import ContextDrafts
from twotower.towers.engine.context_packed import ContextPacked
from twotower.towers.engine.context_steps import ContextSteps
from twotower.towers.engine.context_work import ContextResult, ContextWork, accepted_of
from twotower.towers.errors import NumericalError
from twotower.towers.model.context_tower import ContextTower

_SCORED_LINES = 128


class ContextPass:
    """Runs works of several rows: decode steps as `steps`, committed blocks as `blocks`, drafts as
    `drafts`, the rest as one packed pass, of `packed` or of the tower itself.

    Blocks and drafts join the packed pass where there is one: it reads the weights in any case.
    Otherwise steps join drafts.
    """

    def __init__(
        self,
        tower: ContextTower,
        steps: ContextSteps | None = None,
        blocks: ContextBlocks | None = None,
        drafts: ContextDrafts | None = None,
        packed: ContextPacked | None = None,
    ) -> None:
        self._tower = tower
        self._steps = steps
        self._blocks = blocks
        self._drafts = drafts
        self._packed = packed

    def run(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        """One result per work; an error there concerns its row alone."""
        kinds = [self._kind(work) for work in works]
        if "packed" in kinds:
            kinds = [kind if kind == "step" else "packed" for kind in kinds]
        if "draft" in kinds:
            kinds = ["draft" if kind == "step" else kind for kind in kinds]
        results: dict[str, Iterator[ContextResult | BaseException]] = {}
        for kind in dict.fromkeys(kinds):
            same = [work for work, other in zip(works, kinds, strict=True) if other == kind]
            results[kind] = iter(self._run_kind(kind, same))
        return [next(results[kind]) for kind in kinds]

    def _kind(self, work: ContextWork) -> str:
        if self._steps is not None and work.is_step:
            return "step"
        if self._drafts is not None and work.is_draft:
            return "draft"
        return "block" if self._blocks is not None and work.is_block else "packed"

    def _run_kind(
        self, kind: str, works: Sequence[ContextWork]
    ) -> Sequence[ContextResult | BaseException]:
        if kind == "step" and self._steps is not None:
            return self._steps.run(works)
        if kind == "block" and self._blocks is not None:
            return self._blocks.run(works)
        if kind == "draft" and self._drafts is not None:
            return self._drafts.run(works)
        return self._pass(works)

    def _pass(self, works: Sequence[ContextWork]) -> list[ContextResult | BaseException]:
        states, sinks = [work.state for work in works], [work.sink for work in works]
        reader = self._packed or self._tower
        passed = reader.read([work.tokens for work in works], states, sinks)
        results = self._read_heads(works, passed.hidden)
        counts = [_moved(work, result) for work, result in zip(works, results, strict=True)]
        self._tower.advance_rows(passed, states, counts, sinks)
        for work, count in zip(works, counts, strict=True):
            if work.accepts:
                work.state.truncate()
            elif not count:
                work.state.own_log()
        return results

    def _read_heads(
        self, works: Sequence[ContextWork], hidden: Tensor
    ) -> list[ContextResult | BaseException]:
        """Each row's result from the pass's hidden states [T, H]."""
        ends = list(accumulate(len(work.tokens) for work in works))
        drawn = self._draw(works, hidden, ends)
        results: list[ContextResult | BaseException] = []
        for index, (work, end) in enumerate(zip(works, ends, strict=True)):
            last, picked = hidden[end - 1].clone(), drawn.get(index)
            if isinstance(picked, NumericalError):
                results.append(picked)
            elif isinstance(picked, Checked):
                results.append(ContextResult(last, checked=picked))
            elif work.targets is not None:
                span = slice(end - len(work.tokens), end)
                results.append(self._score(hidden[span], work.targets, work.top_logprobs, last))
            elif work.logits:
                logits = self._tower.logits(hidden[end - len(work.tokens) : end])
                results.append(_whole_result(last, logits))
            else:
                right = 0
                if work.accepts and picked is not None:
                    right = accepted_of(work.tokens, picked.token_ids)
                results.append(ContextResult(last, picked, accepted=right))
        return results

    def _draw(
        self, works: Sequence[ContextWork], hidden: Tensor, ends: Sequence[int]
    ) -> dict[int, Drawn | Checked | NumericalError]:
        """What the works that draw get, by their index; one product serves all draws and checks."""
        parts = {
            index: _drawn_from(work, hidden[end - len(work.tokens) : end])
            for index, (work, end) in enumerate(zip(works, ends, strict=True))
            if work.draw is not None
        }
        if not parts:
            return {}
        logits = self._tower.logits(torch.cat(list(parts.values())))
        lines = dict(zip(parts, logits.split([len(part) for part in parts.values()]), strict=True))
        results: dict[int, Drawn | Checked | NumericalError] = {}
        plain: list[int] = []
        for index in parts:
            draw, mixed = works[index].draw, works[index].mixed
            if draw is not None and mixed is not None:
                results[index] = check_draft(lines[index], draw, mixed)
            else:
                plain.append(index)
        if plain:
            draws = [draw for index in plain if (draw := works[index].draw) is not None]
            if results:
                logits = torch.cat([lines[index] for index in plain])
            results |= zip(plain, draw_tokens(logits, draws), strict=True)
        return results

    def _score(
        self, hidden: Tensor, targets: Sequence[int], top_logprobs: int, last: Tensor
    ) -> ContextResult | BaseException:
        """Log-probabilities of `targets` at hidden states [n, H] and `top_logprobs` most probable
        tokens there, a few lines at a time: in fp32 the logits of a whole piece of a prompt would
        be gigabytes."""
        chosen = torch.tensor(list(targets), device=hidden.device).unsqueeze(1)
        found: list[float] = []
        most: list[TopLogProbs] = []
        parts = zip(hidden.split(_SCORED_LINES), chosen.split(_SCORED_LINES), strict=True)
        for lines, targets_of_lines in parts:
            logits = self._tower.logits(lines)
            if not bool(torch.isfinite(logits).all()):
                return NumericalError("non-finite logits while scoring")
            wide = logits.float()
            # As `most_probable` makes them, so that a token is told one number in both places.
            logprobs = wide - torch.logsumexp(wide, dim=-1, keepdim=True)
            found += logprobs.gather(1, targets_of_lines).squeeze(1).tolist()
            if top_logprobs:
                most += most_probable(wide, top_logprobs)
        return ContextResult(last, logprobs=tuple(found), top_log_probs=tuple(most))


def _moved(work: ContextWork, result: ContextResult | BaseException) -> int:
    """Tokens by which a work moves the snapshot."""
    if work.accepts:
        return 1 + result.accepted if isinstance(result, ContextResult) else 0
    return len(work.tokens) if work.advance else 0


def _drawn_from(work: ContextWork, hidden: Tensor) -> Tensor:
    """The hidden states [n, H] that a work's draw is made from, of those of its tokens."""
    assert work.draw is not None
    count = len(work.draw.positions)
    if work.before is None:
        return hidden[len(hidden) - count :]
    return torch.cat([work.before.unsqueeze(0), hidden[len(hidden) - count + 1 :]])


def _whole_result(last: Tensor, logits: Tensor) -> ContextResult | NumericalError:
    """The result of a work that asks for the logits [n, V] of its tokens."""
    if not bool(torch.isfinite(logits).all()):
        return NumericalError("non-finite logits while reading")
    return ContextResult(last, logits=logits)

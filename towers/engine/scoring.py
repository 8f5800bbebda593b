"""A text's probabilities under the context tower, read as a prompt is."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.towers.decoding.services import Scores, TopLogProbs
from twotower.towers.engine.context_work import ContextWork
from twotower.towers.engine.draft_rounds import Submit
from twotower.towers.state.context_state import ContextState


async def score(
    submit: Submit, state: ContextState, token_ids: Sequence[int], top_logprobs: int, chunk: int
) -> Scores:
    """Reads a text into an empty state, `chunk` tokens a pass; see `ContextService.score`."""
    logprobs: list[float] = []
    most: list[TopLogProbs] = []
    read = token_ids[:-1]
    for start in range(0, len(read), chunk):
        piece = read[start : start + chunk]
        targets = token_ids[start + 1 : start + 1 + len(piece)]
        work = ContextWork(state, piece, targets=targets, prefill=True, top_logprobs=top_logprobs)
        result = await submit(work)
        logprobs.extend(result.logprobs)
        most.extend(result.top_log_probs)
    return Scores(logprobs, most)


async def logits(
    submit: Submit, state: ContextState, token_ids: Sequence[int], chunk: int
) -> Tensor:
    """As `score`: the logits [n, V] at every token, in the tower's dtype and on its device."""
    parts: list[Tensor] = []
    for start in range(0, len(token_ids), chunk):
        work = ContextWork(state, token_ids[start : start + chunk], prefill=True, logits=True)
        result = await submit(work)
        assert result.logits is not None
        parts.append(result.logits)
    return torch.cat(parts)

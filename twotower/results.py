"""Results of prompts that are decoded together to their ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output import Begun, Output
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block, TopLogProbs
from twotower.towers.request.params import FinishReason, GenerationParams

T = TypeVar("T")


@dataclass(frozen=True)
class GenerationResult:
    """The whole output of a prompt.

    `token_ids` are the new tokens only, EOS and those of a stop string included; `text` is theirs
    without either (empty without a tokenizer). `log_probs` are the natural-log probabilities of
    the tokens: the denoiser's in mask_diffusion and mock_ar, the context tower's in ar,
    verified and auto. `top_log_probs` are at each token the `top_logprobs` most probable tokens of
    the same distribution as (id, log-probability), empty if none were asked for. `matched_stop` is
    the stop string that ended the output, if one has. `nfe` counts denoiser calls,
    `context_passes` passes of the context tower. `cached_tokens` of the prompt came from the prefix
    cache. In verified and auto, `accepted_tokens` of `drafted_tokens` were accepted; of lookups
    `lookup_accepted_tokens` of `lookup_drafted_tokens`.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason
    nfe: int
    context_passes: int
    seed: int
    blocks: list[Block]
    matched_stop: str | None
    cached_tokens: int
    accepted_tokens: int
    drafted_tokens: int
    log_probs: list[float]
    top_log_probs: list[TopLogProbs] = field(default_factory=list)
    lookup_accepted_tokens: int = 0
    lookup_drafted_tokens: int = 0


async def results_of(rows: Sequence[Begun]) -> list[GenerationResult]:
    """Decodes rows together; if one fails or the call is cancelled, all are freed."""
    return await together([_result(*row) for row in rows])


async def together(calls: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of calls that run at once; if one fails or all are cancelled, none goes on."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _result(
    output: Output, text: OutputText, log: CommitLog, params: GenerationParams
) -> GenerationResult:
    pairs = [(block, piece) async for block, piece in output if isinstance(block, Block)]
    blocks = [block for block, _ in pairs]
    assert log.finish_reason is not None
    assert params.seed is not None
    log_probs = [value for block in blocks for value in block.log_probs]
    return GenerationResult(
        list(log.token_ids),
        "".join(piece for _, piece in pairs),
        log.finish_reason,
        log.nfe,
        log.context_passes,
        params.seed,
        [_joined(blocks, log)] if params.traits.unit == "token" else blocks,
        text.matched_stop,
        log.cached_tokens,
        log.accepted_tokens,
        log.drafted_tokens,
        log_probs,
        [top for block in blocks for top in block.top_log_probs],
        log.lookup_accepted_tokens,
        log.lookup_drafted_tokens,
    )


def _joined(blocks: Sequence[Block], log: CommitLog) -> Block:
    """All blocks of a log as one, with one step per token over the whole row."""
    return replace(
        blocks[-1],
        start=blocks[0].start,
        token_ids=log.token_ids,
        commit_steps=tuple(range(len(log.token_ids))),
        confidences=tuple(value for block in blocks for value in block.confidences),
        log_probs=tuple(value for block in blocks for value in block.log_probs),
        nfe=log.nfe,
        context_passes=log.context_passes,
        cached_tokens=log.cached_tokens,
        top_log_probs=tuple(top for block in blocks for top in block.top_log_probs),
        timing=None,
    )

"""The output of a request in pieces: what a stream sends one by one and an answer joins.

Both kinds of answers are made of the same pieces, so a stream gives what an answer gives.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from twotower.deployments.completions.completions import Completion, merged
from twotower.towers.decoding.services import Block, ProvisionalBlock, Scores
from twotower.towers.request.params import FinishReason
from twotower.towers.text.tokenizer import TextStream, Tokenizer

Top = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class TokenLogprob:
    """A token, the text that it completes, its offset in the output's text, its log-probability
    and the likeliest at its place. The first token of a prompt has neither."""

    token_id: int
    text: str
    offset: int
    log_prob: float | None
    top: Top | None


@dataclass(frozen=True)
class Piece:
    """What a block adds to a choice; `finish_reason` only with its last one.

    `logprobs` are None if they were not asked for. A draft that is on its way has no text.
    """

    choice: int
    text: str = ""
    token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | None = None
    block: Block | None = None
    draft: ProvisionalBlock | None = None


class TokenTexts:
    """Splits a text into those of its tokens: joined they are the text, and a token that completes
    no character has an empty one. Without a tokenizer the id stands for the text."""

    def __init__(self, tokenizer: Tokenizer | None, offset: int = 0) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._offset = offset

    def of(self, token_ids: Sequence[int], *, last: bool) -> list[tuple[str, int]]:
        """The text and the offset of each token after those of earlier calls. With the `last` of
        them comes what they leave unfinished."""
        found = [self._next(token) for token in token_ids]
        if last and found and self._stream is not None:
            text, offset = found[-1]
            found[-1] = text + self._stream.flush(), offset
        return found

    def _next(self, token: int) -> tuple[str, int]:
        if self._stream is None:
            return f"token_id:{token}", 0
        text, offset = self._stream.push([token]), self._offset
        self._offset += len(text)
        return text, offset


def token_text(tokenizer: Tokenizer | None, token: int) -> str:
    """The text of a token that stands alone, as an alternative does."""
    return f"token_id:{token}" if tokenizer is None else tokenizer.decode([token])


def prompt_logprobs(
    texts: TokenTexts, token_ids: Sequence[int], scores: Scores
) -> list[TokenLogprob]:
    """The log-probabilities of a prompt's tokens under the context tower."""
    tops: Sequence[Top | None] = scores.top_log_probs or [()] * (len(token_ids) - 1)
    values: list[tuple[float | None, Top | None]] = [(None, None)]
    values += zip(scores.log_probs, tops, strict=True)
    return [
        TokenLogprob(token, text, offset, value, top)
        for token, (text, offset), (value, top) in zip(
            token_ids, texts.of(token_ids, last=True), values, strict=True
        )
    ]


async def output_pieces(
    completions: Sequence[Completion], texts: Sequence[TokenTexts] | None
) -> AsyncGenerator[Piece, None]:
    """The pieces of completions as their blocks are committed, and drafts between them.

    `texts`, one for each completion, asks for log-probabilities. Closing it frees the rows.
    """
    async with aclosing(merged(completions)) as items:
        async for completion, (block, text) in items:
            if isinstance(block, ProvisionalBlock):
                yield Piece(completion.index, draft=block)
            else:
                split = None if texts is None else texts[completions.index(completion)]
                yield _piece(completion, block, text, split)


def joined_piece(parts: Sequence[Piece]) -> Piece:
    """All pieces of a choice as one."""
    last = parts[-1]
    logprobs = [each for part in parts for each in part.logprobs or ()]
    return Piece(
        last.choice,
        "".join(part.text for part in parts),
        [token for part in parts for token in part.token_ids],
        None if last.logprobs is None else logprobs,
        last.finish_reason,
        last.stop_reason,
    )


def _piece(completion: Completion, block: Block, text: str, texts: TokenTexts | None) -> Piece:
    logprobs = None
    if texts is not None:
        tops: Sequence[Top] = block.top_log_probs or [()] * len(block.token_ids)
        split = texts.of(block.token_ids, last=block.finish_reason is not None)
        logprobs = [
            TokenLogprob(token, piece, offset, value, top)
            for token, (piece, offset), value, top in zip(
                block.token_ids, split, block.log_probs, tops, strict=True
            )
        ]
    return Piece(
        completion.index,
        text,
        block.token_ids,
        logprobs,
        completion.log.finish_reason,
        completion.text.matched_stop,
        block,
    )

"""Commits the blocks of a row as the output of a request: log, text and stop strings."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.generation import Blocks
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import FinishReason, GenerationParams
from twotower.towers.request.results import TextBlock
from twotower.towers.text.tokenizer import Tokenizer

# Committed blocks with the text that each settles; drafts, which settle none.
Output = AsyncGenerator[tuple[Block | ProvisionalBlock, str], None]
# A completion that has not been decoded yet: its output, and what that is committed to.
Begun = tuple[Output, OutputText, CommitLog, GenerationParams]


def begin_output(
    tokenizer: Tokenizer | None,
    params: GenerationParams,
    prompt_tokens: int,
    generated: Sequence[int] = (),
) -> tuple[OutputText, CommitLog]:
    """Text and log of an output after the `generated` tokens of an earlier stream.

    The log has a finish_reason if these are a complete output already: a stream may break between
    its last block and its end, and its client cannot know that only the end is missing. Raises
    InvalidRequestError for tokens after a stop string, and for stop strings without a tokenizer.
    """
    text, log = OutputText(tokenizer, params), CommitLog(prompt_tokens, generated)
    if generated and params.eos_token_id not in generated[:-1]:
        log.finish_reason = _finish_reason(text, params, generated)
    return text, log


async def commit_blocks(blocks: Blocks, text: OutputText, log: CommitLog) -> Output:
    """Commits each block to the log, cut at a stop string; yields it with the text that it settles.
    Drafts are passed on with an empty text and never committed.

    Ends after the first stop string or with `blocks`, which are closed in any case. If the output
    is complete at the start, none is taken from them.
    """
    async with aclosing(blocks):
        if log.finish_reason is not None:
            return
        async for block in blocks:
            if isinstance(block, ProvisionalBlock):
                yield block, ""
                continue
            cut, settled = text.take(block)
            log.append(cut)
            yield cut, settled
            if text.matched_stop is not None:
                return


def text_block(log: CommitLog, block: Block, text: str) -> TextBlock:
    """The last block of a log, as users of a stream get it."""
    return TextBlock(
        log.num_blocks - 1,
        block.start,
        block.token_ids,
        text,
        block.commit_steps,
        block.confidences,
        block.log_probs,
        block.top_log_probs,
        block.drafted_by,
    )


def _finish_reason(
    text: OutputText, params: GenerationParams, generated: Sequence[int]
) -> FinishReason | None:
    """Reads the generated tokens into `text`; returns why they are complete, None if not."""
    # The text that they settle was shown by the earlier stream; what was held back stays inside.
    cut, _ = text.take(Block(0, tuple(generated), (), (), nfe=0))
    kept = len(cut.token_ids)
    if kept < len(generated):
        raise InvalidRequestError(
            f"generated_token_ids[{kept}]",
            generated[kept],
            f"no token after the stop string {text.matched_stop!r}",
        )
    if text.matched_stop is not None or params.eos_token_id in generated[-1:]:
        return "stop"
    return "length" if len(generated) == params.max_tokens else None

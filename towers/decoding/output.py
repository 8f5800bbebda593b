"""The output of one request: its blocks are committed here, in the service and in one process."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import FinishReason
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import Tokenizer


class Output:
    """The committed tokens of a request in `log`, and their text in `text`.

    `generated` tokens of an earlier stream come first; if they are complete already,
    `finish_reason` is set from the start: a stream may break between its last block and its end,
    and its client cannot know that only the end is missing. Raises InvalidRequestError for tokens
    after a stop string, and for stop strings without a tokenizer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        params: GenerationParams,
        prompt_tokens: int,
        generated: Sequence[int] = (),
    ) -> None:
        self.log = CommitLog(prompt_tokens, generated)
        self.text = OutputText(tokenizer, params)
        self._params = params
        self.log.finish_reason = self._take_generated(tuple(generated))

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the output is complete; None while it is not."""
        return self.log.finish_reason

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the output, if one has."""
        return self.text.matched_stop

    async def commit(
        self, blocks: AsyncGenerator[Block, None]
    ) -> AsyncGenerator[tuple[Block, str], None]:
        """Commits blocks as they come; yields each, cut after a stop string, and the text that it
        makes certain. Ends after a stop string; `blocks` is closed whatever ends it."""
        async with aclosing(blocks):
            async for block in blocks:
                cut, text = self.text.take(block)
                self.log.append(cut)
                yield cut, text
                if self.matched_stop is not None:
                    return

    def _take_generated(self, generated: tuple[int, ...]) -> FinishReason | None:
        params = self._params
        if not generated or params.eos_token_id in generated[:-1]:
            return None
        # The client has this text; what a stop string may begin with stays held back.
        cut, _ = self.text.take(Block(0, generated, (), (), nfe=0))
        kept = len(cut.token_ids)
        if kept < len(generated):
            raise InvalidRequestError(
                f"generated_token_ids[{kept}]",
                generated[kept],
                f"no token after the stop string {self.matched_stop!r}",
            )
        if self.matched_stop is not None or params.eos_token_id in generated[-1:]:
            return "stop"
        return "length" if len(generated) == params.max_tokens else None

"""The text of one request's output, as its blocks come."""

from __future__ import annotations

from collections.abc import Sequence

from twotower.towers.tokenizer import TextStream, Tokenizer


class OutputText:
    """Text without the end-of-text token, from the resume point on; empty without a tokenizer."""

    def __init__(
        self, tokenizer: Tokenizer | None, eos_token_id: int | None, generated: Sequence[int] = ()
    ) -> None:
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._eos_token_id = eos_token_id
        # What a resumed client has already seen is swallowed; a held-back character is not.
        self.push(generated)

    def push(self, token_ids: Sequence[int], *, last: bool = False) -> str:
        """The text that these tokens complete; with `last` also what nothing will complete."""
        if self._stream is None:
            return ""
        text = self._stream.push([token for token in token_ids if token != self._eos_token_id])
        return text + self._stream.flush() if last else text

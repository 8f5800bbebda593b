"""Decodes a request's output block by block and finds the stop string that ends it.

An occurrence of a stop string counts from the token that completes it, so what has been handed
out never depends on what comes later: the occurrence that is complete first ends the output, and
of those that are complete at the same character the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import TextStream, Tokenizer


class OutputText:
    """Text without EOS and stop string; empty without a tokenizer.

    `matched_stop` is the stop string that ended the output. Raises InvalidRequestError for stop
    strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, params: GenerationParams) -> None:
        if tokenizer is None and params.stop:
            raise InvalidRequestError(
                "stop", params.stop, "no stop strings, as this model has no tokenizer"
            )
        self._stream = None if tokenizer is None else TextStream(tokenizer)
        self._search = StopSearch(params.stop)
        self._params = params
        self._num_tokens = 0

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the output, if one has."""
        return self._search.matched

    def take(self, block: Block) -> tuple[Block, str]:
        """The block, cut after the token that completes a stop string, and the text now certain.

        A block that is cut has finish_reason "stop", and nothing may come after it. A block with
        a finish_reason also gives the text that was held back.
        """
        kept, text = self._push(block.token_ids, last=block.finish_reason is not None)
        if self.matched_stop is None:
            return block, text
        return replace(block.first(kept), finish_reason="stop"), text

    def _push(self, token_ids: Sequence[int], *, last: bool) -> tuple[int, str]:
        """Tokens up to the end of a stop string, or all of them, and the text that they settle."""
        if self._stream is None:
            return len(token_ids), ""
        # Token by token only with stop strings, as each call of the tokenizer has a cost.
        parts = [[token] for token in token_ids] if self._params.stop else [token_ids]
        kept, text = 0, ""
        for index, part in enumerate(parts, start=1):
            kept += len(part)
            self._num_tokens += len(part)
            piece = self._stream.push([t for t in part if t != self._params.eos_token_id])
            if last and index == len(parts):
                piece += self._stream.flush()
            text += self._search.push(piece, counts=self._num_tokens >= self._params.min_tokens)
            if self.matched_stop is not None:
                return kept, text
        return kept, text + self._search.flush() if last else text


class StopSearch:
    """Finds the first of several stop strings in a text that comes in pieces."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = stop
        self._longest = max(map(len, stop), default=0)
        self._held = ""
        self.matched: str | None = None

    def push(self, piece: str, *, counts: bool) -> str:
        """The text that is certain now; it ends before a stop string that this piece completes.

        Without `counts` such a stop string is text like any other.
        """
        text = self._held + piece
        found = self._first_end(text) if counts else None
        if found is not None:
            end, self.matched = found
            self._held = ""
            return text[: end - len(self.matched)]
        certain = len(text) - self._possible_beginning(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """The text that was held back, once no more will come."""
        held, self._held = self._held, ""
        return held

    def _first_end(self, text: str) -> tuple[int, str] | None:
        """End and stop string of the first occurrence that ends after the text held before."""
        ends = []
        for stop in self._stop:
            start = text.find(stop, max(0, len(self._held) - len(stop) + 1))
            if start >= 0:
                ends.append((start + len(stop), stop))
        return min(ends, key=lambda found: (found[0], -len(found[1])), default=None)

    def _possible_beginning(self, text: str) -> int:
        """Length of the longest end of the text that a stop string could begin with."""
        for length in range(min(self._longest - 1, len(text)), 0, -1):
            # A whole stop string found here did not count: it may still begin a longer one.
            tail = text[-length:]
            if any(len(stop) > length and stop.startswith(tail) for stop in self._stop):
                return length
        return 0

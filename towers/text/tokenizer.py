"""Text to token ids and back, also piece by piece while a text is still being written."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as Library

from twotower.towers.errors import CheckpointError, InvalidRequestError
from twotower.towers.request.token_ids import check_text
from twotower.towers.text.fast_tokenizer import REPLACEMENT, FastTokenizer, is_panic

TOKENIZER_FILE = "tokenizer.json"
# Once more than _WINDOW_TOKENS are held, only the last _CONTEXT_TOKENS are decoded again.
_CONTEXT_TOKENS = 8
_WINDOW_TOKENS = 16
# A UTF-8 character has at most four bytes, so an unfinished one up to three.
_UNFINISHED_BYTES = 3


class Tokenizer(Protocol):
    """Encodes text as token ids, and decodes them."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with the special tokens that the tokenizer puts around one."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none."""

    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it, None for an id without one."""

    def special_id(self, text: str) -> int | None:
        """The id of the special token that the text is, None if it is none."""


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has none (token ids only).

    Raises CheckpointError, naming the file that is damaged or missing.
    """
    # A link that leads nowhere is there too: half a download is not a model without a tokenizer.
    if os.path.lexists(folder / TOKENIZER_FILE):
        return _read_file(folder / TOKENIZER_FILE)
    if os.path.lexists(folder / "tokenizer_config.json"):
        # Costs seconds to import, and only checkpoints without a tokenizer.json need it.
        from twotower.towers.text.hub_tokenizer import read_hub_tokenizer

        return read_hub_tokenizer(folder)
    return None


def text_ids(
    tokenizer: Tokenizer | None, field: str, text: str, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of the text in a request's field. Raises InvalidRequestError, naming the field,
    for a text that has none, and without a tokenizer."""
    check_text(field, text)
    if tokenizer is None:
        raise InvalidRequestError(field, text, "token ids, as this model has no tokenizer")
    try:
        if add_special_tokens:
            return tokenizer.encode(text)
        return tokenizer.encode(text, add_special_tokens=False)
    except InvalidRequestError as error:
        raise InvalidRequestError(field, error.value, error.limit) from None


def _read_file(path: Path) -> Tokenizer:
    try:
        return FastTokenizer(Library.from_file(str(path)), path.name)
    except CheckpointError:
        raise
    except BaseException as error:  # the library raises bare Exception for any malformed file
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise CheckpointError(f"{path.name}: unreadable ({error})") from None


class TextStream:
    """Decodes token ids as they come, and holds back an unfinished character.

    The pieces join to the text of all ids decoded at once, however the ids are split, and a piece
    depends only on the ids up to it. Where a later token may change earlier text (not
    `keeps_beginnings`), all of the text comes with `flush`.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._fast = tokenizer if isinstance(tokenizer, FastTokenizer) else None
        self._waits = self._fast is not None and not self._fast.keeps_beginnings
        # The tokens that are still decoded, and the part of their text that was returned.
        self._tokens: list[int] = []
        self._shown = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds token ids; returns the text that is now certain and was not returned before."""
        before = len(self._tokens)
        # Tokens without text would fill the window and leave decoding without context.
        fast = self._fast
        self._tokens.extend(t for t in token_ids if fast is None or fast.gives_text(t))
        if self._waits or len(self._tokens) == before:
            return ""
        text = self._tokenizer.decode(self._tokens)
        broken = len(text) - len(text.rstrip(REPLACEMENT))
        new = self._show(text[: len(text) - min(broken, _UNFINISHED_BYTES)])
        if len(self._tokens) > _WINDOW_TOKENS:
            self._shorten(text)
        return new

    def flush(self) -> str:
        """The rest, once no more tokens will come."""
        return self._show(self._tokenizer.decode(self._tokens))

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def _shorten(self, text: str) -> None:
        """Keeps only the last tokens, if decoding them alone gives the end of the `text`.

        A first token may be decoded otherwise than one in the middle (without its space, or with
        the end of a character only), so some text that has been returned stays as context.
        """
        tokens = self._tokens[-_CONTEXT_TOKENS:]
        tail = self._tokenizer.decode(tokens)
        held = len(text) - len(self._shown)
        shown = tail[: max(0, len(tail) - held)]
        if shown and text.endswith(tail[len(shown) // 2 :]):
            self._tokens, self._shown = tokens, shown

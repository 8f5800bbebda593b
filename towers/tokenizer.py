"""Text to token ids and back, also piece by piece while a text is still being written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tokenizers import Tokenizer as FastTokenizer

from twotower.towers.errors import CheckpointError

_REPLACEMENT = "\ufffd"
_CONTEXT_TOKENS = 8
# A UTF-8 character has at most four bytes.
_CHARACTER_BYTES = 4


class Tokenizer(Protocol):
    """What the towers' users need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens around it."""

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids; special tokens give none."""


class _FileTokenizer:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for any malformed file
            raise CheckpointError(f"{path.name}: unreadable ({error})") from None
        # A prompt that spells out a special token means those letters, not the token.
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> list[int]:
        # As a batch of one: only then does the library let other threads run meanwhile.
        [encoding] = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(encoding.ids)

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


class _HubTokenizer:
    """Any other tokenizer that transformers reads without running a checkpoint's code."""

    def __init__(self, folder: Path) -> None:
        # Costs seconds to import, and only checkpoints without a tokenizer.json need it.
        from transformers import AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True
            )
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"tokenizer: unreadable ({type(error).__name__})") from None

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, token_ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer of a checkpoint folder, or None if it has none (token ids only)."""
    if (folder / "tokenizer.json").is_file():
        return _FileTokenizer(folder / "tokenizer.json")
    if (folder / "tokenizer_config.json").is_file():
        return _HubTokenizer(folder)
    return None


class TextStream:
    """Turns a growing list of token ids into text, holding back an incomplete UTF-8 character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._settled = 0
        self._shown = ""

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds token ids; returns the text that is now certain and was not returned before."""
        self._tokens.extend(token_ids)
        total = len(self._tokens)
        for count in range(total, max(self._settled, total - _CHARACTER_BYTES), -1):
            text = self._tokenizer.decode(self._tokens[:count])
            if not text.endswith(_REPLACEMENT):
                new = self._show(text)
                self._settle(count)
                return new
        if total - self._settled < _CHARACTER_BYTES:
            return ""
        # Broken bytes, or tokens that all end inside a character: hold back its bytes alone.
        text = self._tokenizer.decode(self._tokens)
        broken = len(text) - len(text.rstrip(_REPLACEMENT))
        return self._show(text[: len(text) - min(broken, _CHARACTER_BYTES - 1)])

    def flush(self) -> str:
        """The rest, once no more tokens will come."""
        new = self._show(self._tokenizer.decode(self._tokens))
        self._settle(len(self._tokens))
        return new

    def _show(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown += new
        return new

    def _settle(self, count: int) -> None:
        """The first `count` tokens end with a character, all of which has been shown."""
        # A few tokens stay as context: some tokenizers drop the space before a first token.
        done = max(0, count - _CONTEXT_TOKENS)
        self._tokens = self._tokens[done:]
        self._settled = count - done
        self._shown = self._tokenizer.decode(self._tokens[: self._settled])

"""Tokenizers without a tokenizer.json, read by transformers and never by a checkpoint's code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from twotower.towers.errors import CheckpointError
from twotower.towers.text.fast_tokenizer import FastTokenizer, is_panic

_CONFIG_FILE = "tokenizer_config.json"
_FILE = "tokenizer.json"
# Vocabularies that transformers finds by other names than those that a class gives.
_OTHER_VOCABULARIES = ("*.model", "*.tiktoken", "tekken.json", "vocab.*")
# Files that may be missing where a class could not be read.
_ONE = {"tokenizer_file": _FILE}
_PAIR = {"vocab_file": "vocab.json", "merges_file": "merges.txt"}
_NO_VOCABULARY = ("normalizer.json", "added_tokens.json", _CONFIG_FILE)


class SlowTokenizer:
    """A tokenizer that transformers computes in Python."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        # As in FastTokenizer: special tokens around a text, and none that it spells out.
        return list(
            self._tokenizer.encode(
                text, add_special_tokens=add_special_tokens, split_special_tokens=True
            )
        )

    def token(self, token_id: int) -> str | None:
        found = self._tokenizer.convert_ids_to_tokens(token_id)
        return None if found is None else str(found)

    def special_id(self, text: str) -> int | None:
        if text not in self._tokenizer.all_special_tokens:
            return None
        return int(self._tokenizer.convert_tokens_to_ids(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        # Cleaning up would take back spaces once the next token is a full stop.
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def read_hub_tokenizer(folder: Path) -> FastTokenizer | SlowTokenizer:
    """The tokenizer that a tokenizer_config.json describes. Raises CheckpointError."""
    kind = _class_name(folder / _CONFIG_FILE)
    try:
        loaded = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        half = any((folder / name).is_file() for name in _PAIR.values())
        _check_vocabulary(folder, kind, _PAIR if half else _ONE)
        reason = f"{kind or 'its class'} could not be read, {type(error).__name__}"
        raise CheckpointError(f"{_CONFIG_FILE}: {reason}") from None
    _check_vocabulary(folder, type(loaded).__name__, loaded.vocab_files_names)
    backend = getattr(loaded, "backend_tokenizer", None)
    return SlowTokenizer(loaded) if backend is None else FastTokenizer(backend, _CONFIG_FILE)


def _class_name(path: Path) -> str:
    """The tokenizer's class as the file names it, or an empty string."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path.name}: expected an object, got {type(config).__name__}")
    return str(config.get("tokenizer_class") or "")


def _check_vocabulary(folder: Path, kind: str, names: Mapping[str, str]) -> None:
    """Raises CheckpointError if the files of a class are not there, by their names in the class.

    transformers makes an empty tokenizer of such a folder. A class that names no files has its
    vocabulary in its code (bytes, characters).
    """
    needed = [name for name in names.values() if name not in (_FILE, *_NO_VOCABULARY)]
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing == needed and names:
        found = any(path.is_file() for glob in _OTHER_VOCABULARIES for path in folder.glob(glob))
        missing = [] if found else [*needed, _FILE]
    elif "merges_file" not in names:
        # Of others a part may be enough; a vocabulary and its merges are of no use alone.
        missing = []
    if missing:
        expected = " or ".join(part for part in (" and ".join(needed), _FILE) if part)
        raise CheckpointError(
            f"{missing[0]}: missing from the checkpoint; the vocabulary of "
            f"{kind or 'its tokenizer'} is read from {expected}"
        )

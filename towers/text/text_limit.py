"""The most text that a token can stand for, from a checkpoint's tokenizer.json.

A text of more bytes than that times the number of tokens that a model takes cannot fit: it is
refused before a tokenizer reads it. The bound holds where no byte of a text is dropped: every one
is spelled by a token of the vocabulary, so that n tokens spell at most n times as many bytes as the
longest of them. What may drop text, or make one token of text of any length, has no bound:
vocabularies that do not spell every byte (WordPiece, WordLevel, Unigram and BPE with unknown
tokens), normalizers that delete, pre-tokenizers that remove what they split at, and added tokens
that take the spaces beside them. Normalizers that shorten by a known factor multiply the bound.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers.pre_tokenizers import ByteLevel

from twotower.towers.errors import CheckpointError

Json = Mapping[str, Any]
# The four forms of Unicode replace at most 4 bytes by one: a character of 4 bytes by a letter of
# ASCII (a test counts over all characters). A lower-case letter is not empty, a character has at
# most 4 bytes.
_SHRINKING = {"NFC": 4.0, "NFD": 4.0, "NFKC": 4.0, "NFKD": 4.0, "Lowercase": 4.0}
_GROWING = ("ByteLevel", "Prepend")
# Those that split and keep all; Split and Punctuation do unless told to remove.
_KEEPING = ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "Split", "Punctuation")


def longest_token_bytes(folder: Path) -> int | None:
    """The most bytes of UTF-8 text that one token of a checkpoint's tokenizer can stand for.

    None if there is no bound. Raises CheckpointError for a tokenizer.json that is no JSON.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        return longest_of(tokenizer)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path.name}: unreadable ({type(error).__name__})") from None


def longest_of(tokenizer: Json) -> int | None:
    """As longest_token_bytes, from the parsed tokenizer.json."""
    splits = _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    normalizers = _parts(tokenizer.get("normalizer"), "normalizers")
    added = tokenizer.get("added_tokens") or ()
    factor = _shrinking(normalizers)
    spelled = _longest_spelled(tokenizer["model"], [*splits, *normalizers])
    if factor is None or spelled is None or not all(map(_keeps, splits)):
        return None
    # Special tokens are not looked for in a text.
    matched = [token for token in added if not token.get("special")]
    if any(token.get("lstrip") or token.get("rstrip") for token in matched):
        return None
    longest = max([spelled, *(len(token["content"].encode()) for token in matched)])
    return int(longest * factor)


def _longest_spelled(model: Json, steps: list[Json]) -> int | None:
    """Bytes of the longest entry of a vocabulary that spells every byte, otherwise None."""
    vocab = model.get("vocab") or {}
    if model.get("type") not in ("BPE", "Unigram"):
        return None
    names = vocab if isinstance(vocab, Mapping) else [entry[0] for entry in vocab]
    known = set(names)
    by_letters = any(step["type"] == "ByteLevel" for step in steps)
    if model["type"] == "BPE" and by_letters and known.issuperset(ByteLevel.alphabet()):
        # Each byte is a letter of an alphabet of 256.
        return max(map(len, known))
    if model.get("byte_fallback") and known.issuperset(f"<0x{byte:02X}>" for byte in range(256)):
        return max(len(name.encode()) for name in known)
    return None


def _shrinking(normalizers: list[Json]) -> float | None:
    """Factor by which normalizers, applied in turn, may shorten a text; None if unbounded."""
    factor = 1.0
    for normalizer in normalizers:
        kind = normalizer["type"]
        if kind in _SHRINKING:
            factor *= _SHRINKING[kind]
        elif kind == "Replace":
            pattern = normalizer["pattern"].get("String")
            content = normalizer["content"]
            if not pattern or not content:
                return None
            factor *= max(1.0, len(pattern.encode()) / len(content.encode()))
        elif kind not in _GROWING:
            return None
    return factor


def _keeps(split: Json) -> bool:
    return split["type"] in _KEEPING and split.get("behavior") != "Removed"


def _parts(step: Json | None, members: str) -> list[Json]:
    """A step of a tokenizer, or the steps of a sequence of them."""
    if step is None:
        return []
    if step["type"] != "Sequence":
        return [step]
    return [part for member in step[members] for part in _parts(member, members)]

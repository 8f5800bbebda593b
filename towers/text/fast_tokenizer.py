"""A tokenizer of the `tokenizers` library, as a server needs it: whole prompts, readable bytes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer as Library

from twotower.towers.errors import CheckpointError, InvalidRequestError

REPLACEMENT = "\ufffd"
# Tokens of single bytes in vocabularies with byte fallback.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Decoders that join tokens into a text, and those that may follow as they do not look ahead.
_JOINING = ("ByteFallback", "ByteLevel", "Fuse")
_AFTER_JOINING = ("Fuse", "Metaspace", "Strip")


class FastTokenizer:
    """Text to ids and back; `name` is the file that errors name. Raises CheckpointError.

    A prompt's ids are those of transformers' `tokenizer(text, split_special_tokens=True)`: with
    the special tokens that the file's post-processor puts around a text (most often one that
    begins it). What would change a prompt by its length or by chance is switched off:
    truncation, padding, BPE dropout.
    """

    def __init__(self, tokenizer: Library, name: str) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        if getattr(tokenizer.model, "dropout", None) is not None:
            tokenizer.model.dropout = None
        # A prompt that spells out a special token means those letters, not the token.
        tokenizer.encode_special_tokens = True
        added = tokenizer.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        size = tokenizer.get_vocab_size(with_added_tokens=False)
        if not size or tokenizer.get_vocab_size() <= len(self._special):
            raise CheckpointError(f"{name}: its vocabulary is empty, but for added tokens")
        self._tokenizer = tokenizer
        try:
            self.encode("")
        except InvalidRequestError as error:
            # A post-processor may name tokens that are not there.
            raise CheckpointError(f"{name}: cannot encode an empty text ({error.limit})") from None
        decoders = list(_decoders_of(tokenizer))
        self._falls_back = any(decoder["type"] == "ByteFallback" for decoder in decoders)
        self.keeps_beginnings = _keep_beginnings(decoders, tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The ids; raises InvalidRequestError for a text that the vocabulary cannot spell."""
        try:
            # In a batch call the library releases the GIL.
            [encoding] = self._tokenizer.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )
            return list(encoding.ids)
        except BaseException as error:  # the library raises bare Exception
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            limit = f"a text that the model's tokenizer can spell ({error})"
            raise InvalidRequestError("text", text, limit) from None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text; bytes that are no UTF-8 are U+FFFD each.

        The library's own decoding of byte fallback gives up a whole run of bytes for a broken one
        in it. A text that is cut by its limit, or streamed, would lose characters that are there.
        """
        tokens = [token for token in map(self._visible, token_ids) if token is not None]
        if not tokens:
            return ""
        try:
            text = str(self._tokenizer.decode(list(token_ids), skip_special_tokens=True))
            if self._falls_back and REPLACEMENT in text:
                text = str(self._tokenizer.decoder.decode(_readable(tokens)))
        except BaseException as error:
            if not is_panic(error):
                raise
            # The library's Strip cannot stand a text that has less than it would strip.
            return ""
        return text

    def gives_text(self, token_id: int) -> bool:
        """False for special tokens and for ids without a token: decoding leaves those out."""
        return self._visible(token_id) is not None

    def token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it, None for an id without one."""
        spelled: str | None = self._tokenizer.id_to_token(token_id)
        return spelled

    def special_id(self, text: str) -> int | None:
        """The id of the special token that the text is, None if it is none."""
        known: int | None = self._tokenizer.token_to_id(text) if text in self._special else None
        return known

    def _visible(self, token_id: int) -> str | None:
        token = self.token(token_id)
        return None if token in self._special else token


def is_panic(error: BaseException) -> bool:
    """True for a panic of the library: no subclass of Exception, and of a class without a name to
    import."""
    return type(error).__name__ == "PanicException"


def _decoders_of(tokenizer: Library) -> Iterator[dict[str, Any]]:
    """The steps of decoding in order, as in the file; none without a decoder."""
    if tokenizer.decoder is not None:
        yield from _flat(json.loads(tokenizer.decoder.__getstate__()))


def _flat(decoder: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if decoder["type"] != "Sequence":
        yield decoder
        return
    for part in decoder["decoders"]:
        yield from _flat(part)


def _keep_beginnings(decoders: Iterable[dict[str, Any]], tokenizer: Library) -> bool:
    """True if more tokens only append to the text, except to an unfinished character.

    False where a step searches the joined text for a pattern, which a later token may complete.
    """
    joined = fused = False
    for decoder in decoders:
        kind = decoder["type"]
        if kind == "Strip" and decoder["stop"] and not fused:
            # The library fails as soon as a token is stripped whole, and all text is gone.
            return False
        if kind == "Replace":
            if joined and len(decoder["pattern"].get("String", "")) != 1:
                return False
        elif joined and kind not in _AFTER_JOINING:
            return False
        if kind == "BPEDecoder" and _inside(decoder["suffix"], tokenizer.get_vocab()):
            return False
        joined = joined or kind in _JOINING
        fused = fused or kind in ("ByteLevel", "Fuse")
    return True


def _inside(suffix: str, tokens: Iterable[str]) -> bool:
    """True if a token has the suffix of a word also before its end: decoding leaves out the last
    only."""
    return any(suffix in token.removesuffix(suffix) for token in tokens)


def _readable(tokens: Iterable[str]) -> list[str]:
    """The tokens, with each byte that is not part of valid UTF-8 replaced by U+FFFD."""
    readable: list[str] = []
    for is_byte, group in groupby(tokens, lambda token: _BYTE.fullmatch(token) is not None):
        if not is_byte:
            readable.extend(group)
            continue
        run = bytes(int(token[3:5], 16) for token in group)
        # Broken bytes become surrogates, which no valid UTF-8 spells.
        for character in run.decode("utf-8", "surrogateescape"):
            if "\udc80" <= character <= "\udcff":
                readable.append(REPLACEMENT)
            else:
                readable.extend(f"<0x{byte:02X}>" for byte in character.encode())
    return readable

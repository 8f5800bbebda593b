"""No text that fits is ever refused: the bound holds for every tokenizer that has one."""

from __future__ import annotations

import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.errors import CheckpointError
from twotower.towers.text.text_limit import longest_of, longest_token_bytes

Steps = Any
BYTES = {f"<0x{byte:02X}>": byte for byte in range(256)}
TEXTS = [
    "aaaa " * 30,
    "aaaa",
    "  \n\n    def größe(漢字):",
    "ﬁ ﷺ Å 𝐀 İẞ K",
    "é" * 5,
    "🌍\u200d\ufe0f",
    "ÅÅ",
]


def byte_level(*, normalizer: Steps = None, before: Sequence[Steps] = ()) -> Tokenizer:
    """A tokenizer that has learned long tokens of TEXTS, over all bytes."""
    tokenizer = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, level])
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([text for text in TEXTS for _ in range(3)], trainer)
    return tokenizer


def fallback(**options: Any) -> Tokenizer:
    """Letters and bytes, as of SentencePiece."""
    vocab = {**BYTES, "▁": 256, "a": 257, "aa": 258, "<unk>": 259}
    model = models.BPE(vocab, [("a", "a")], unk_token="<unk>", **options)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def bound(tokenizer: Tokenizer) -> int | None:
    return longest_of(json.loads(tokenizer.to_str()))


def added(tokenizer: Tokenizer, *tokens: AddedToken, special: bool = False) -> Tokenizer:
    (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(list(tokens))
    return tokenizer


def split(behavior: str) -> Steps:
    return pre_tokenizers.Split(" ", behavior)


BOUND = {
    "byte level": byte_level(),
    "after a split": byte_level(before=[split("isolated"), pre_tokenizers.Digits()]),
    "NFC": byte_level(normalizer=normalizers.NFC()),
    "NFKC": byte_level(normalizer=normalizers.NFKC()),
    "lower NFKD": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFKD(), normalizers.Lowercase()])
    ),
    "replaced": byte_level(normalizer=normalizers.Replace("aaaa", "a")),
    "added": added(byte_level(), AddedToken("<" + "long" * 40 + ">", normalized=False)),
    "special": added(byte_level(), AddedToken("<x>", rstrip=True), special=True),
    "fallback": fallback(byte_fallback=True),
}
NO_BOUND = {
    "letters that are dropped": Tokenizer(models.BPE({"a": 0}, [])),
    "one unknown token for many": fallback(fuse_unk=True),
    "words": Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")),
    "pieces of words": Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]")),
    "unigrams": Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
    "removed": byte_level(before=[split("removed")]),
    "without spaces": byte_level(before=[pre_tokenizers.WhitespaceSplit()]),
    "stripped": byte_level(normalizer=normalizers.Strip()),
    "accents": byte_level(normalizer=normalizers.StripAccents()),
    "deleted": byte_level(normalizer=normalizers.Replace("a", "")),
    "in a sequence": byte_level(
        normalizer=normalizers.Sequence([normalizers.NFC(), normalizers.Strip()])
    ),
    "spaces of an added token": added(byte_level(), AddedToken("<x>", lstrip=True)),
}


@pytest.mark.parametrize("name", BOUND)
def test_a_text_has_no_more_bytes_than_its_tokens_may_have(name: str) -> None:
    tokenizer = BOUND[name]
    tokenizer.encode_special_tokens = True
    longest = bound(tokenizer)
    assert longest is not None
    draw = random.Random(1)
    texts = [*TEXTS, "<" + "long" * 40 + ">", "<x>" + " " * 500]
    texts += ["".join(draw.choices(TEXTS, k=5)) for _ in range(50)]
    texts += ["".join(map(chr, draw.choices(range(32, 0xD7FF), k=40))) for _ in range(50)]
    for text in texts:
        count = len(tokenizer.encode(text, add_special_tokens=False).ids)
        assert len(text.encode()) <= longest * count, text


def test_the_bounds_themselves() -> None:
    plain = bound(BOUND["byte level"])
    assert plain is not None
    assert plain == max(map(len, BOUND["byte level"].get_vocab()))
    assert bound(BOUND["added"]) == 162
    assert bound(BOUND["fallback"]) == len("<0x00>")
    assert bound(BOUND["replaced"]) == 4 * max(map(len, BOUND["replaced"].get_vocab()))


@pytest.mark.parametrize("name", NO_BOUND)
def test_what_may_take_any_text_has_no_bound(name: str) -> None:
    assert bound(NO_BOUND[name]) is None


def test_checkpoints(tmp_path: Path) -> None:
    assert longest_token_bytes(resolve_checkpoint(None)) == 41
    assert longest_token_bytes(tmp_path) is None
    for wrong in ("{", "[]", "{}", '{"model": {"type": "BPE"}, "normalizer": {}}'):
        (tmp_path / "tokenizer.json").write_text(wrong, encoding="utf-8")
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: unreadable"):
            longest_token_bytes(tmp_path)


@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_normal_forms_shorten_to_a_quarter_at_most(form: Any) -> None:
    """Over all characters: one, and the longest ones that may stand for parts of a composed one.

    What is decomposed has no fewer characters than before, which is a quarter of the bytes too.
    """
    base: Any = "NFKD" if "K" in form else "NFD"
    apart = {}
    longest: dict[str, float] = defaultdict(float)
    # Beyond these no character changes.
    for code in range(0x32400):
        if not 0xD800 <= code < 0xE000:
            parts = apart[chr(code)] = unicodedata.normalize(base, chr(code))
            share = len(chr(code).encode()) / len(parts)
            for part in parts:
                longest[part] = max(longest[part], share)
    for character, parts in apart.items():
        size = len(unicodedata.normalize(form, character).encode())
        assert len(character.encode()) <= 4 * size
        assert sum(longest[part] for part in parts) <= 4 * size

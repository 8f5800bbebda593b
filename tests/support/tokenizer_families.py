"""A tokenizer of every kind that a tokenizer.json can describe, small enough to make for a test."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

LETTERS = "abé日本🙂 .!'\n\u0301￦nt"
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>"]
ADDED = [
    AddedToken("<tool>", special=False),
    AddedToken(" wide ", special=False, lstrip=True, rstrip=True),
    AddedToken("ж日", special=False),
    AddedToken("<secret>", special=True),
]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPLIT = "▁"


def byte_level() -> Tokenizer:
    """GPT-2, Qwen, Nemotron: every character is spelled in bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a日b é🙂.\n"] * 3, trainer)
    return tokenizer


def byte_level_then_strip() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 2, 0)])
    return tokenizer


def byte_fallback(*more: decoders.Decoder) -> Tokenizer:
    """Gemma, and Llama with a Strip: what the vocabulary lacks is spelled in tokens of a byte."""
    words = [*SPECIAL, *BYTES, SPLIT, "a", "b", f"{SPLIT}a", "ab", "日", ".", SPLIT * 2]
    merges = [(SPLIT, "a"), ("a", "b"), (SPLIT, SPLIT)]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPLIT)
    steps = [decoders.Replace(SPLIT, " "), decoders.ByteFallback(), decoders.Fuse(), *more]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def llama() -> Tokenizer:
    tokenizer = byte_fallback(decoders.Strip(" ", 1, 0))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend(SPLIT), normalizers.Replace(" ", SPLIT)]
    )
    bos = ("<s>", 1)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    return tokenizer


def byte_fallback_unfused() -> Tokenizer:
    tokenizer = byte_fallback()
    steps = [decoders.ByteFallback(), decoders.Replace(SPLIT, " "), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def strip_before_joining() -> Tokenizer:
    tokenizer = byte_fallback()
    steps = [decoders.ByteFallback(), decoders.Replace(SPLIT, " "), decoders.Strip(" ", 0, 1)]
    tokenizer.decoder = decoders.Sequence(steps)
    return tokenizer


def unigram() -> Tokenizer:
    """T5, XLM-R: a word begins with the mark that stands for a space."""
    words = [*SPECIAL, SPLIT, f"{SPLIT}a", "a", "b", "日本", "é", ".", "!", f"{SPLIT}b{SPLIT}"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 * len(word)) for word in words], 0, False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


def unigram_with_bytes() -> Tokenizer:
    words = [*SPECIAL, *BYTES, SPLIT, "a", "b", f"{SPLIT}a"]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0 * len(word)) for word in words], 0, True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    steps = [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Fuse()])
    return tokenizer


def word_piece(*, cleanup: bool = True) -> Tokenizer:
    """BERT: pieces of a word after its first begin with ##; cleaned up before full stops."""
    words = [*SPECIAL, "a", "##a", "b", "##b", "日", "本", "é", ".", "!", "'", "n", "##t", "##é"]
    words += ["n't", "'s", "do not", "e"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=cleanup)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def word_level() -> Tokenizer:
    """Whole words and no decoder: the library joins them by spaces."""
    words = [*SPECIAL, "a", "b", "ab", "日本", ".", "!"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def word_ends(*inside: str) -> Tokenizer:
    """XLM, CLIP: the last piece of a word ends with a mark, which stands for a space."""
    words = [*SPECIAL, "a", "b", "日", "a</w>", "b</w>", "日</w>", ".</w>", *inside]
    vocabulary = {word: index for index, word in enumerate(words)}
    model = models.BPE(vocabulary, [], unk_token="<unk>", end_of_word_suffix="</w>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    return tokenizer


def ctc() -> Tokenizer:
    """Speech models: a token that is repeated counts once."""
    words = [*SPECIAL, "|", "a", "b", "日", "'", "n", "t"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.CTC("<pad>", "|", cleanup=True)
    return tokenizer


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte level, strip": byte_level_then_strip,
    "byte fallback": byte_fallback,
    "llama": llama,
    "byte fallback, strip both ends": lambda: byte_fallback(decoders.Strip(" ", 1, 1)),
    "byte fallback, not fused": byte_fallback_unfused,
    "unigram, metaspace": unigram,
    "unigram, bytes": unigram_with_bytes,
    "word piece": word_piece,
    "word piece, no cleanup": lambda: word_piece(cleanup=False),
    "word level": word_level,
    "word ends": word_ends,
    "ctc": ctc,
}
# Their text may change where it was certain elsewhere: what comes may complete a pattern.
WAITING: dict[str, Callable[[], Tokenizer]] = {
    "pattern in the joined text": lambda: byte_fallback(decoders.Replace("ab", "X")),
    "pattern over bytes": lambda: byte_fallback(decoders.WordPiece()),
    "ends inside words": lambda: word_ends("a</w>b"),
    "strip before joining": strip_before_joining,
}


def saved(make: Callable[[], Tokenizer], folder: Path, added: Sequence[AddedToken] = ADDED) -> Path:
    """Writes a tokenizer.json with special and added tokens into `folder`; returns that."""
    tokenizer = make()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder

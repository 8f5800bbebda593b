"""Tokenizers that are no tokenizer.json, and folders that lack what they name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from twotower.towers.errors import CheckpointError
from twotower.towers.text.tokenizer import TextStream, Tokenizer, load_tokenizer


def folder_of(folder: Path, kind: str | None, **files: str) -> Path:
    config = {} if kind is None else {"tokenizer_class": kind}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


WITHOUT = [
    ("LlamaTokenizer", "tokenizer.model"),
    ("LlamaTokenizerFast", "tokenizer.model"),
    ("CodeLlamaTokenizer", "tokenizer.model"),
    ("GPT2Tokenizer", "vocab.json"),
    ("Qwen2Tokenizer", "vocab.json"),
    ("RobertaTokenizer", "vocab.json"),
    ("GemmaTokenizer", "tokenizer.json"),
    ("T5Tokenizer", "spiece.model"),
    ("BertTokenizer", "vocab.txt"),
    ("PreTrainedTokenizerFast", "tokenizer.json"),
    ("SomeoneElsesTokenizer", "tokenizer.json"),
    (None, "tokenizer.json"),
]


@pytest.mark.parametrize(("kind", "file"), WITHOUT)
def test_a_class_without_its_vocabulary(tmp_path: Path, kind: str | None, file: str) -> None:
    folder = folder_of(tmp_path, kind, special_tokens_map__json="{}")
    said = rf"^{file}: missing from the checkpoint; .*tokenizer\.json$"
    with pytest.raises(CheckpointError, match=said):
        load_tokenizer(folder)


def test_half_of_a_vocabulary(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "GPT2Tokenizer", vocab__json='{"h": 0, "e": 1, "he": 2}')
    with pytest.raises(CheckpointError, match=r"^merges.txt: missing"):
        load_tokenizer(folder)
    (folder / "vocab.json").unlink()
    (folder / "merges.txt").write_text("#version: 0.2\nh e\n")
    with pytest.raises(CheckpointError, match=r"^vocab.json: missing"):
        load_tokenizer(folder)


def test_a_vocabulary_of_the_older_kind(tmp_path: Path) -> None:
    words = {"h": 0, "e": 1, "he": 2, "<|endoftext|>": 3, "<": 4, "|": 5}
    merges = "#version: 0.2\nh e\n"
    folder = folder_of(tmp_path, "GPT2Tokenizer", vocab__json=json.dumps(words), merges__txt=merges)
    tokenizer = loaded(folder)
    assert tokenizer.encode("heh") == [2, 0]
    assert tokenizer.decode([2, 0, 3]) == "heh"
    # As in a tokenizer.json: letters.
    assert 3 not in tokenizer.encode("<|endoftext|>")


def test_a_vocabulary_in_code(tmp_path: Path) -> None:
    """Bytes; what is no UTF-8 gives no text at all, where others give U+FFFD."""
    tokenizer = loaded(folder_of(tmp_path, "ByT5Tokenizer"))
    text = "größe 日本語 🙂" * 8
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert 1 not in tokenizer.encode("</s>")[:-1]
    for size in (1, 2, 3, 7, 50):
        stream = TextStream(tokenizer)
        pieces = [stream.push(ids[at : at + size]) for at in range(0, len(ids), size)]
        assert "".join(pieces) + stream.flush() == text
    stream = TextStream(tokenizer)
    assert stream.push(ids[-4:-2]) + stream.flush() == tokenizer.decode(ids[-4:-2])


@pytest.mark.parametrize("text", ["", "[", "[1]", "null", "\x00", '{"a": }', "[" * 100_000])
def test_a_damaged_description(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer_config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^tokenizer_config.json: (not|expected)"):
        load_tokenizer(tmp_path)


def test_a_damaged_vocabulary(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "LlamaTokenizer", tokenizer__model="no model")
    with pytest.raises(CheckpointError, match=r"^tokenizer_config.json: "):
        load_tokenizer(folder)


def test_a_tokenizer_in_the_checkpoints_own_code_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("raise SystemExit('was run')")
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError):
        load_tokenizer(tmp_path)

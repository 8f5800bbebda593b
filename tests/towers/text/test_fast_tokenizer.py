"""Prompts whole and as transformers encodes them; ids to text for every kind of tokenizer."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Library
from tokenizers import models, pre_tokenizers, processors

from tests.support.tokenizer_families import (
    FAMILIES,
    LETTERS,
    WAITING,
    llama,
    saved,
    word_piece,
)
from twotower.towers.errors import CheckpointError, InvalidRequestError
from twotower.towers.text.tokenizer import Tokenizer, load_tokenizer

SHIPPED = Path(__file__).parents[3] / "twotower" / "models" / "pystdlib" / "tokenizer.json"
CODE = "def add(a, b):\n    return a + b  # größe 日本語\n"
EVERY = FAMILIES | WAITING


def loaded(folder: Path) -> Tokenizer:
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    return tokenizer


def changed(folder: Path, source: Path = SHIPPED, **changes: Any) -> Tokenizer:
    """The tokenizer of a file with changes to its keys; those of `model` are within it."""
    raw = json.loads(source.read_text(encoding="utf-8"))
    raw["model"] |= changes.pop("model", {})
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(raw | changes), encoding="utf-8")
    return loaded(folder)


def some_text(source: random.Random) -> str:
    return "".join(source.choice(LETTERS) for _ in range(source.randint(0, 60)))


CUTS = [
    {"direction": side, "max_length": length, "strategy": "LongestFirst", "stride": 0}
    for side in ("Right", "Left")
    for length in (0, 1, 8)
]


@pytest.mark.parametrize("truncation", CUTS)
def test_truncation_in_the_file_cuts_no_prompt(tmp_path: Path, truncation: object) -> None:
    ids = loaded(SHIPPED.parent).encode(CODE)
    assert len(ids) > 16
    assert changed(tmp_path, truncation=truncation).encode(CODE) == ids


@pytest.mark.parametrize("strategy", ["BatchLongest", {"Fixed": 64}])
@pytest.mark.parametrize("direction", ["Right", "Left"])
def test_padding_in_the_file_adds_nothing(tmp_path: Path, strategy: Any, direction: str) -> None:
    padding = {
        "strategy": strategy,
        "direction": direction,
        "pad_to_multiple_of": 32,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<|pad|>",
    }
    ids = loaded(SHIPPED.parent).encode(CODE)
    assert changed(tmp_path, padding=padding).encode(CODE) == ids


def test_dropout_in_the_file_leaves_nothing_to_chance(tmp_path: Path) -> None:
    ids = loaded(SHIPPED.parent).encode(CODE)
    tokenizer = changed(tmp_path, model={"dropout": 0.9})
    assert all(tokenizer.encode(CODE) == ids for _ in range(5))


@pytest.mark.parametrize("kind", EVERY)
def test_ids_are_those_that_transformers_gives(tmp_path: Path, kind: str) -> None:
    from transformers import PreTrainedTokenizerFast

    folder = saved(EVERY[kind], tmp_path)
    tokenizer = loaded(folder)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), split_special_tokens=True
    )
    source = random.Random(1)
    for text in ["", " ", "</s>", *(some_text(source) for _ in range(40))]:
        assert tokenizer.encode(text) == theirs(text)["input_ids"]


def test_special_tokens_around_a_prompt_are_the_files(tmp_path: Path) -> None:
    assert loaded(saved(llama, tmp_path / "bos")).encode("")[:1] == [1]
    assert loaded(saved(llama, tmp_path / "bos")).encode("a") == [1, 263]
    assert loaded(saved(word_piece, tmp_path / "both")).encode("a") == [1, 4, 2]
    template = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    both = processors.Sequence([processors.ByteLevel(), template])

    def make() -> Library:
        tokenizer = FAMILIES["byte level"]()
        tokenizer.post_processor = both
        return tokenizer

    plain = loaded(saved(FAMILIES["byte level"], tmp_path / "plain")).encode("a b")
    assert loaded(saved(make, tmp_path / "template")).encode("a b") == [1, *plain, 2]


@pytest.mark.parametrize("kind", EVERY)
def test_a_special_token_that_a_prompt_spells_out_is_letters(tmp_path: Path, kind: str) -> None:
    tokenizer = loaded(saved(EVERY[kind], tmp_path))
    around = tokenizer.encode("")
    ids = tokenizer.encode("</s><secret>")
    secret = Library.from_file(str(tmp_path / "tokenizer.json")).token_to_id("<secret>")
    assert secret not in ids
    assert len(ids) > len(around)
    # The post-processor of one kind ends a prompt with </s>; to a unigram model it is a word like
    # any other, which split_special_tokens of transformers does not change either.
    if "unigram" not in kind:
        assert ids.count(2) == around.count(2)


@pytest.mark.parametrize("kind", EVERY)
def test_a_text_is_decoded_as_the_library_does(tmp_path: Path, kind: str) -> None:
    folder = saved(EVERY[kind], tmp_path)
    tokenizer, library = loaded(folder), Library.from_file(str(folder / "tokenizer.json"))
    source = random.Random(2)
    for _ in range(40):
        ids = tokenizer.encode("a" + some_text(source) + "b")
        assert tokenizer.decode(ids) == library.decode(ids)


@pytest.mark.parametrize("kind", EVERY)
def test_what_has_no_text(tmp_path: Path, kind: str) -> None:
    """Nothing at all, special tokens alone, and ids of an embedding larger than the vocabulary."""
    tokenizer = loaded(saved(EVERY[kind], tmp_path))
    size = Library.from_file(str(tmp_path / "tokenizer.json")).get_vocab_size()
    for ids in ([], [1], [3] * 40, [size, size + 1000, 2**31 - 1], [size, 2]):
        assert tokenizer.decode(ids) == ""
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([size, *ids, 3, size]) == tokenizer.decode(ids) != ""


def test_one_broken_byte_costs_no_other_character(tmp_path: Path) -> None:
    tokenizer = loaded(saved(FAMILIES["byte fallback"], tmp_path))

    def of(raw: bytes) -> list[int]:
        return [4 + byte for byte in raw]

    face = "🙂é語".encode()
    assert tokenizer.decode(of(face)) == "🙂é語"
    for cut, end in ((0, "🙂é語"), (1, "🙂é\ufffd\ufffd"), (2, "🙂é\ufffd"), (3, "🙂é")):
        assert tokenizer.decode(of(face[: len(face) - cut])) == end
    assert tokenizer.decode(of(face[1:])) == "\ufffd" * 3 + "é語"
    assert tokenizer.decode(of(b"a\xffb")) == "a\ufffdb"
    # Spelled in bytes, the mark of a space is itself; so is U+FFFD.
    assert tokenizer.decode(of("▁\ufffd".encode() + b"\x80")) == "▁\ufffd\ufffd"


def test_strip_of_all_there_is_gives_nothing(tmp_path: Path) -> None:
    """The library fails there in a way that no `except Exception` sees."""
    tokenizer = loaded(saved(FAMILIES["byte fallback, strip both ends"], tmp_path))
    space = tokenizer.encode(" ")
    assert [tokenizer.decode(space * count) for count in range(4)] == ["", "", "", " "]


def unigram_without_words() -> Library:
    return Library(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))


@pytest.mark.parametrize(
    "make", [lambda: Library(models.BPE()), unigram_without_words], ids=["nothing", "unknown"]
)
def test_an_empty_vocabulary_is_refused(tmp_path: Path, make: Callable[[], Library]) -> None:
    tokenizer = make()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: its vocabulary is empty"):
        load_tokenizer(tmp_path)


def test_a_post_processor_that_names_no_token_is_refused(tmp_path: Path) -> None:
    """Every prompt would fail, in a way that no `except Exception` sees."""
    raw = json.loads((saved(llama, tmp_path) / "tokenizer.json").read_text())
    raw["post_processor"]["special_tokens"] = {}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: cannot encode an empty text"):
        load_tokenizer(tmp_path)


def test_a_text_that_the_vocabulary_cannot_spell(tmp_path: Path) -> None:
    """Without a token for what is unknown."""
    raw = json.loads((saved(word_piece, tmp_path) / "tokenizer.json").read_text())
    del raw["model"]["vocab"]["<unk>"]
    raw["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = loaded(tmp_path)
    assert tokenizer.encode("a") == [1, 4, 2]
    with pytest.raises(InvalidRequestError, match=r"^text: got 'q', expected a text that .*UNK"):
        tokenizer.encode("q")

"""Tokenizers from a folder, and text that comes piece by piece."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from twotower.towers.errors import CheckpointError
from twotower.towers.tokenizer import TextStream, Tokenizer, load_tokenizer

TEXT = "def f(x):\n    return 'ça va — 日本語 🙂🙃' + x  # ж\n"
FACE = "🙂".encode()


class Bytes:
    """A tokenizer whose ids are the bytes of UTF-8; 256 is special and gives no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@pytest.fixture(scope="module")
def folder_with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE with few merges, so that characters are split over tokens."""
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<pad>", "<bos>", "<eos>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator([TEXT] * 3, trainer)
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder_with_tokenizer: Path) -> Tokenizer:
    loaded = load_tokenizer(folder_with_tokenizer)
    assert loaded is not None
    return loaded


def test_a_text_comes_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 20
    assert tokenizer.decode(ids) == TEXT
    assert min(ids) > 3


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([1, *ids, 2, 3]) == "ab"


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[", "\x00"])
def test_a_malformed_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("largest", [1, 3, 16])
def test_pieces_add_up_to_the_text(tokenizer: Tokenizer, seed: int, largest: int) -> None:
    source = random.Random(seed)
    text = "".join(source.choice("aé日🙂 \n") for _ in range(60))
    for own in (tokenizer, Bytes()):
        ids = own.encode(text)
        stream, shown = TextStream(own), ""
        while ids:
            count = source.randint(1, largest)
            shown += stream.push(ids[:count])
            ids = ids[count:]
            # Nothing that was shown is ever taken back, and no half character is shown.
            assert text.startswith(shown)
        assert shown + stream.flush() == text


@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_block_that_ends_inside_a_character_holds_back_only_that(cut: int) -> None:
    stream = TextStream(Bytes())
    assert stream.push([*b"twelve bytes", *FACE[:cut]]) == "twelve bytes"
    assert stream.push([*FACE[cut:], *b"!"]) == "🙂!"
    assert stream.flush() == ""


def test_a_character_byte_by_byte() -> None:
    stream = TextStream(Bytes())
    assert [stream.push([byte]) for byte in FACE] == ["", "", "", "🙂"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end() -> None:
    stream = TextStream(Bytes())
    assert stream.push([*b"a", FACE[0]]) == "a"
    assert stream.flush() == "\ufffd"
    stream = TextStream(Bytes())
    shown = "".join(stream.push([0xFF]) for _ in range(12))
    assert shown + stream.flush() == "\ufffd" * 12
    assert len(shown) >= 8


def test_a_character_after_broken_bytes_is_whole() -> None:
    stream = TextStream(Bytes())
    shown = stream.push([0xFF] * 4)
    shown += "".join(stream.push([byte]) for byte in FACE)
    assert shown + stream.flush() == "\ufffd" * 4 + "🙂"


def test_special_tokens_between_the_bytes_of_a_character() -> None:
    stream = TextStream(Bytes())
    shown = "".join(stream.push([token]) for token in (FACE[0], 256, *FACE[1:], 256))
    assert shown + stream.flush() == "🙂"


def test_nothing_gives_nothing() -> None:
    stream = TextStream(Bytes())
    assert stream.push([]) == ""
    assert stream.flush() == ""
    assert stream.push([256]) == ""
    assert stream.push(b"x") == "x"

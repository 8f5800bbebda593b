"""Tokenizers from a folder, and text that comes piece by piece."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from tests.support.tokenizer_families import FAMILIES, LETTERS, WAITING, saved
from twotower.towers.errors import CheckpointError, InvalidRequestError
from twotower.towers.text.fast_tokenizer import FastTokenizer as Fast
from twotower.towers.text.tokenizer import TextStream, Tokenizer, load_tokenizer, text_ids

TEXT = "def f(x):\n    return 'ça va — 日本語 🙂🙃' + x  # ж\n"
FACE = "🙂".encode()
FAULTS = Path(__file__).parents[2] / "data" / "faults"


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


class Fussy(Bytes):
    """Cannot spell an x."""

    def encode(self, text: str) -> list[int]:
        if "x" in text:
            raise InvalidRequestError("text", text, "a text without an x")
        return super().encode(text)


def test_errors_of_a_text_name_the_field_that_it_came_in() -> None:
    assert text_ids(Fussy(), "input", "abc") == [97, 98, 99]
    for tokenizer, text, said in (
        (Fussy(), "ax", "input: got 'ax', expected a text without an x"),
        (Fussy(), "a\ud83d", "input[1]: got '\\ud83d', expected text that can be encoded in UTF-8"),
        (None, "abc", "input: got 'abc', expected token ids, as this model has no tokenizer"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            text_ids(tokenizer, "input", text)
        assert str(caught.value).startswith(said)


def test_special_tokens_give_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ab")
    assert tokenizer.decode([1, *ids, 2, 3]) == "ab"


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{}", "[", "\x00", "null", "[]", '"x"', '{"model": 1}'])
def test_a_malformed_tokenizer_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["byte level", "llama", "unigram, bytes", "word piece"])
def test_a_damaged_tokenizer_is_named(tmp_path: Path, kind: str) -> None:
    """Cut anywhere, and with a key or value of another type."""
    path = saved(FAMILIES[kind], tmp_path) / "tokenizer.json"
    text = path.read_text()
    for end in range(0, len(text) - 1, len(text) // 40):
        path.write_text(text[:end])
        with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
            load_tokenizer(tmp_path)
    raw = json.loads(text)
    for key in ("model", "added_tokens", "decoder"):
        for value in (7, "x", [1], {"type": "None"}):
            path.write_text(json.dumps(raw | {key: value}))
            with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
                load_tokenizer(tmp_path)


def test_a_tokenizer_file_that_is_none(tmp_path: Path) -> None:
    """Half a download: a link that leads nowhere; bytes; a folder."""
    path = tmp_path / "tokenizer.json"
    path.symlink_to(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
        load_tokenizer(tmp_path)
    path.unlink()
    path.write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
        load_tokenizer(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"^tokenizer.json: unreadable"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("seed", range(5))
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


def streamed(tokenizer: Tokenizer, ids: Sequence[int], sizes: Sequence[int]) -> list[str]:
    """What has been shown after each piece of ids, and last after the end."""
    stream, shown, at = TextStream(tokenizer), [""], 0
    for size in sizes:
        shown.append(shown[-1] + stream.push(ids[at : at + size]))
        at += size
    return [*shown[1:], shown[-1] + stream.flush()]


def some_ids(tokenizer: Tokenizer, size: int, source: random.Random) -> list[int]:
    """Ids of a text, or any at all (few different ones, so that they repeat)."""
    if source.random() < 0.5:
        return tokenizer.encode("".join(source.choice(LETTERS) for _ in range(60)))
    pool = [source.randrange(size) for _ in range(source.choice([2, 5, 60]))]
    return [source.choice(pool) for _ in range(source.randint(1, 120))]


@pytest.mark.parametrize("kind", FAMILIES | WAITING)
@pytest.mark.parametrize("seed", range(3))
def test_every_kind_however_it_is_cut(tmp_path: Path, kind: str, seed: int) -> None:
    """The pieces join to the text at once, and what is shown depends on the ids so far alone."""
    folder = saved((FAMILIES | WAITING)[kind], tmp_path)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None
    # A few ids beyond the vocabulary, as an embedding may have.
    size = FastTokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size() + 3
    source = random.Random(seed)
    for _ in range(25):
        ids = some_ids(tokenizer, size, source)
        whole = tokenizer.decode(ids)
        one_by_one = streamed(tokenizer, ids, [1] * len(ids))
        assert one_by_one[-1] == whole
        for largest in (3, 20, 120):
            sizes = [source.randint(1, largest) for _ in ids]
            shown = streamed(tokenizer, ids, sizes)
            assert shown[-1] == whole
            for at, size_so_far in enumerate(accumulate(sizes)):
                assert shown[at] == one_by_one[min(size_so_far, len(ids)) - 1]


@pytest.mark.parametrize("kind", FAMILIES)
def test_nothing_but_an_unfinished_character_is_held_back(tmp_path: Path, kind: str) -> None:
    tokenizer = load_tokenizer(saved(FAMILIES[kind], tmp_path))
    assert tokenizer is not None
    ids = tokenizer.encode("ab 日本 a🙂b. é" * 6)
    for count, shown in enumerate(streamed(tokenizer, ids, [1] * len(ids))[:-1], start=1):
        text = tokenizer.decode(ids[:count])
        assert shown == text[: len(shown)]
        assert text[len(shown) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)


def test_long_runs_of_byte_tokens() -> None:
    """The 50 characters from U+4E00 on, a byte a token: shown one by one, none lost."""
    tokenizer = load_tokenizer(FAULTS / "byte_fallback")
    assert tokenizer is not None
    text = "".join(chr(0x4E00 + index) for index in range(50))
    ids = tokenizer.encode(text)
    assert len(ids) == 150
    assert tokenizer.decode(ids) == text
    shown = streamed(tokenizer, ids, [1] * 150)
    assert [len(part) for part in shown] == [count // 3 for count in range(1, 151)] + [50]
    assert shown[-1] == text
    for size in (2, 7, 8, 9, 16, 149):
        assert streamed(tokenizer, ids, [size] * (150 // size + 1))[-1] == text
    for cut in (1, 2):
        assert streamed(tokenizer, ids[:-cut], [1] * 150)[-1] == text[:-1] + "\ufffd" * (3 - cut)


@pytest.mark.parametrize("kind", [*FAMILIES, "special tokens only"])
def test_decoding_costs_the_same_for_every_token(tmp_path: Path, kind: str) -> None:
    """Tokens that are decoded in all, for 4,000 that come one by one."""
    tokenizer = load_tokenizer(saved(FAMILIES.get(kind, FAMILIES["llama"]), tmp_path))
    assert isinstance(tokenizer, Fast)
    ids = tokenizer.encode("ab 日本 a🙂b. é" * 400)[:4000] if kind in FAMILIES else [1, 2, 3] * 1333
    decoded = 0
    plain = tokenizer.decode

    def counted(token_ids: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(token_ids)
        return plain(token_ids)

    tokenizer.decode = counted  # type: ignore[method-assign]
    assert streamed(tokenizer, ids, [1] * len(ids))[-1] == plain(ids)
    assert decoded < 40 * len(ids)

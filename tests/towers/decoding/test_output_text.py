"""Text and stop strings, however the output is cut into blocks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support.tokenizer_families import FAMILIES, saved
from twotower.towers.decoding.output_text import OutputText, StopSearch
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams
from twotower.towers.text.tokenizer import Tokenizer, load_tokenizer

EOS = 256
# Merged tokens, so that one token may hold the end of one stop string and the start of another.
MERGED = {300: b"ab", 301: b"bca", 302: "日本".encode(), 303: "🙂".encode()[:2], 304: b"aabbab"}
SHIPPED = Path(__file__).parents[3] / "twotower" / "models" / "pystdlib"


class Bytes:
    """A tokenizer whose ids are bytes of UTF-8, or several; EOS is special and gives no text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return b"".join(self.bytes_of(token) for token in token_ids).decode(errors="replace")

    @staticmethod
    def bytes_of(token: int) -> bytes:
        return bytes([token]) if token < EOS else MERGED.get(token, b"")


def params_of(*stop: str, min_tokens: int = 0, eos: int | None = EOS) -> GenerationParams:
    return GenerationParams(stop=stop, min_tokens=min_tokens, max_tokens=1000, eos_token_id=eos)


def block_of(start: int, tokens: Sequence[int], *, last: bool) -> Block:
    steps = tuple(range(start, start + len(tokens)))
    shares = tuple(1.0 / (1 + step) for step in steps)
    return Block(
        start,
        tuple(tokens),
        steps,
        shares,
        nfe=2,
        finish_reason="length" if last else None,
        log_probs=tuple(-float(step) for step in steps),
        accepted_tokens=1,
    )


def stream(
    output: OutputText, tokens: Sequence[int], sizes: Sequence[int], start: int = 0
) -> tuple[list[int], list[str], Block]:
    """Kept tokens, pieces of text and the last block of an output in blocks of these sizes."""
    kept: list[int] = []
    pieces = []
    place = 0
    for size in sizes:
        part = tokens[place : place + size]
        place += size
        block, text = output.take(block_of(start, part, last=place >= len(tokens)))
        assert block.start == start
        start += len(block.token_ids)
        kept += block.token_ids
        pieces.append(text)
        if block.finish_reason is not None:
            break
    return kept, pieces, block


def random_sizes(source: random.Random, total: int, largest: int) -> list[int]:
    sizes = []
    while sum(sizes) < total:
        sizes.append(min(source.randint(1, largest), total - sum(sizes)))
    return sizes


def whole(
    tokenizer: Tokenizer, tokens: Sequence[int], params: GenerationParams
) -> tuple[list[int], str, str | None]:
    """The same by brute force: every end in the whole text in order, every stop string there."""
    plain = [token for token in tokens if token != params.eos_token_id]
    text = tokenizer.decode(plain)
    for end in range(1, len(text) + 1):
        ending = [stop for stop in params.stop if text[:end].endswith(stop)]
        if not ending:
            continue
        # The first token with which the text up to `end` is there, in whole characters.
        count = next(
            count
            for count in range(1, len(tokens) + 1)
            if tokenizer.decode(tokens[:count])[:end] == text[:end]
        )
        if count >= params.min_tokens:
            stop = max(ending, key=len)
            return list(tokens[:count]), text[: end - len(stop)], stop
    return list(tokens), text, None


STOPS = [
    (),
    ("ab",),
    ("abb", "ab"),
    ("aab", "abab", "b本"),
    ("日本",),
    ("🙂", "本日"),
    ("bca", "cab"),
    ("a", "aa", "aaa"),
    ("ca日c", "a日", "日c"),
    ("b" * 9,),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("min_tokens", [0, 7])
def test_block_borders_change_nothing(stop: tuple[str, ...], seed: int, min_tokens: int) -> None:
    source = random.Random(seed)
    tokens: list[int] = []
    while len(tokens) < 24:
        part = source.choice(["a", "b", "c", "日", "本", "🙂", 300, 301, 302, 304])
        tokens += Bytes().encode(part) if isinstance(part, str) else [part]
    params = params_of(*stop, min_tokens=min_tokens)
    want_tokens, want_text, want_stop = whole(Bytes(), tokens, params)
    for largest in (1, 2, 5, 30):
        output = OutputText(Bytes(), params)
        sizes = random_sizes(source, len(tokens), largest)
        kept, pieces, last = stream(output, tokens, sizes)
        assert (kept, "".join(pieces)) == (want_tokens, want_text)
        assert output.matched_stop == want_stop
        assert last.finish_reason == ("length" if want_stop is None else "stop")


@pytest.mark.parametrize("largest", [1, 3, 8])
def test_a_stop_string_that_comes_too_early_may_begin_one_that_counts(largest: int) -> None:
    """Rare in random texts: a whole stop string just before min_tokens, and its continuation."""
    tokens = list(b"xxxxxxab")
    params = params_of("a", "ab", min_tokens=8)
    want = (tokens, "xxxxxx", "ab")
    assert whole(Bytes(), tokens, params) == want
    output = OutputText(Bytes(), params)
    sizes = [largest] * (8 // largest) + [8 % largest] * bool(8 % largest)
    kept, pieces, _ = stream(output, tokens, sizes)
    assert (kept, "".join(pieces), output.matched_stop) == want


@pytest.mark.parametrize("seed", range(3))
def test_a_resume_gives_the_rest_and_nothing_twice(seed: int) -> None:
    """Whatever was held back when the stream broke comes with the next block."""
    source = random.Random(seed)
    tokens = [source.choice(b"ab") for _ in range(30)]
    params = params_of("aabab", "bbbb", "babba")
    want_tokens, want_text, want_stop = whole(Bytes(), tokens, params)
    for broken in range(len(want_tokens)):
        first = OutputText(Bytes(), params)
        seen, shown, _ = stream(first, tokens, [1] * broken) if broken else ([], [], None)
        again = OutputText(Bytes(), params)
        again.take(block_of(0, seen, last=False))
        rest = tokens[broken:]
        sizes = random_sizes(source, len(rest), 6)
        kept, pieces, _ = stream(again, rest, sizes, start=broken)
        assert seen + kept == want_tokens
        assert "".join(shown + pieces) == want_text
        assert again.matched_stop == want_stop


def test_the_shipped_tokenizer() -> None:
    tokenizer = load_tokenizer(SHIPPED)
    assert tokenizer is not None
    tokens = tokenizer.encode("def größe(x):\n    return x  # 日本\n\ndef g():\n    pass\n")
    for stop in ("\ndef", "ße(x", "# 日", "return x  #"):
        params = params_of(stop, eos=None)
        want_tokens, want_text, want_stop = whole(tokenizer, tokens, params)
        assert want_stop == stop
        for size in (1, 3, 16):
            output = OutputText(tokenizer, params)
            kept, pieces, _ = stream(output, tokens, [size] * len(tokens))
            assert (kept, "".join(pieces)) == (want_tokens, want_text)


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("broken", [False, True])
def test_every_kind_of_tokenizer(tmp_path: Path, kind: str, broken: bool) -> None:
    """Stop strings of 1 to 4 characters from anywhere in the text, in blocks of every size."""
    tokenizer = load_tokenizer(saved(FAMILIES[kind], tmp_path))
    assert tokenizer is not None
    tokens = tokenizer.encode("ab 日本 ba🙂. éb a日a 本.b" * 2 + "🙂")
    if broken:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens)
    source = random.Random(kind)
    for _ in range(8):
        begin = source.randrange(len(text) - 4)
        stop = text[begin : begin + source.randint(1, 4)]
        params = params_of(stop, "never", eos=None)
        want_tokens, want_text, want_stop = whole(tokenizer, tokens, params)
        assert want_stop == stop
        for size in (1, 2, 5, 16, len(tokens)):
            output = OutputText(tokenizer, params)
            kept, pieces, last = stream(output, tokens, [size] * len(tokens))
            assert ("".join(pieces), output.matched_stop) == (want_text, stop)
            assert (kept, last.finish_reason) == (want_tokens, "stop")


def test_a_text_that_ends_inside_a_character(tmp_path: Path) -> None:
    """What is missing of it shows only at the end, and a stop string may be in what shows then."""
    tokenizer = load_tokenizer(saved(FAMILIES["byte fallback"], tmp_path))
    assert tokenizer is not None
    tokens = tokenizer.encode("a🙂é")[:-1]
    for stop, want in (("x", "a🙂\ufffd"), ("🙂\ufffd", "a"), ("\ufffd", "a🙂")):
        for size in (1, 2, 4, 9):
            output = OutputText(tokenizer, params_of(stop, eos=None))
            kept, pieces, _ = stream(output, tokens, [size] * 9)
            assert ("".join(pieces), kept) == (want, tokens)
    # Complete, it is no end of a stop string; nor is the half of a character before the last one.
    output = OutputText(tokenizer, params_of("\ufffd", eos=None))
    assert "".join(stream(output, tokenizer.encode("a🙂é"), [1] * 9)[1]) == "a🙂é"


def test_only_a_possible_beginning_is_held_back() -> None:
    output = OutputText(Bytes(), params_of("END", "\n\n"))
    _, pieces, last = stream(output, list(b"one E two EN\nEND"), [5, 4, 3, 2, 9])
    assert pieces == ["one ", "E two", " ", "EN\n", ""]
    assert last.finish_reason == "stop"


def test_the_block_is_cut_with_everything_known_per_token() -> None:
    output = OutputText(Bytes(), params_of("日"))
    block, text = output.take(block_of(7, [*b"x", *"日".encode(), *b"yz"], last=True))
    assert (block.token_ids, text) == ((*b"x", *"日".encode()), "x")
    assert block.commit_steps == (7, 8, 9, 10)
    assert block.confidences == (1 / 8, 1 / 9, 1 / 10, 1 / 11)
    assert block.log_probs == (-7.0, -8.0, -9.0, -10.0)
    assert (block.nfe, block.accepted_tokens, block.finish_reason) == (2, 1, "stop")


def test_the_end_token_gives_no_text_and_releases_what_was_held() -> None:
    output = OutputText(Bytes(), params_of("abc"))
    assert output.take(block_of(0, list(b"xab"), last=False))[1] == "x"
    block, text = output.take(block_of(3, [EOS], last=True))
    assert (block.token_ids, text, output.matched_stop) == ((EOS,), "ab", None)
    assert block.finish_reason == "length"


def test_an_occurrence_that_ends_too_early_is_text_but_may_begin_one_that_counts() -> None:
    output = OutputText(Bytes(), params_of("aba", min_tokens=5))
    kept, pieces, _ = stream(output, list(b"ababab"), [2, 2, 2])
    assert (bytes(kept), "".join(pieces)) == (b"ababa", "ab")
    output = OutputText(Bytes(), params_of("aba", min_tokens=3))
    assert bytes(stream(output, list(b"ababab"), [6])[0]) == b"aba"


def test_tokens_count_from_the_start_of_the_output_also_after_a_resume() -> None:
    output = OutputText(Bytes(), params_of("b", min_tokens=4))
    output.take(block_of(0, list(b"ab"), last=False))
    kept, pieces, _ = stream(output, list(b"bbb"), [3], start=2)
    assert (bytes(kept), "".join(pieces)) == (b"bb", "b")


def test_without_a_tokenizer() -> None:
    output = OutputText(None, params_of())
    block = block_of(0, [5, 6], last=True)
    assert output.take(block) == (block, "")
    with pytest.raises(InvalidRequestError, match=r"^stop: got .*this model has no tokenizer"):
        OutputText(None, params_of("x"))


def test_the_first_complete_occurrence_wins_then_the_longest() -> None:
    for stop, matched, shown in (
        (["abcdef", "cd"], "cd", "xab"),
        (["cd", "bcd"], "bcd", "xa"),
        (["abc", "ab"], "ab", "x"),
        (["bcd", "zz"], "bcd", "xa"),
    ):
        for pieces in (["xabcdef"], list("xabcdef"), ["xab", "cdef"], ["x", "abc", "def"]):
            search, text = StopSearch(stop), ""
            for piece in pieces:
                text += search.push(piece, counts=True)
                if search.matched is not None:
                    break
            assert (search.matched, text) == (matched, shown)

"""Blocks are committed up to a stop string; an earlier stream's tokens are gone on with, are a
complete output, or are refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace

import pytest

from twotower.towers.decoding.output import begin_output, commit_blocks, text_block
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.params import GenerationParams

EOS = 0


class Letters:
    """A tokenizer of one id per character."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))


PARAMS = GenerationParams(max_tokens=8, eos_token_id=EOS, stop=("END", "!"))
ids = Letters().encode


@pytest.mark.parametrize(
    ("generated", "reason", "matched"),
    [
        ([], None, None),
        (ids("abc"), None, None),
        (ids("abcEN"), None, None),
        (ids("abcdefgh"), "length", None),
        (ids("abEND"), "stop", "END"),
        (ids("a!"), "stop", "!"),
        # The last token that fits may end it in another way as well.
        (ids("abcdeEND"), "stop", "END"),
        ([*ids("ab"), EOS], "stop", None),
        ([*ids("abcdefg"), EOS], "stop", None),
        # These are for check_row to refuse.
        ([*ids("ab"), EOS, *ids("c")], None, None),
        (ids("abcdefghi"), None, None),
    ],
)
def test_why_an_output_is_complete(
    generated: list[int], reason: str | None, matched: str | None
) -> None:
    text, log = begin_output(Letters(), PARAMS, 3, generated)
    assert (log.finish_reason, text.matched_stop) == (reason, matched)
    assert (log.token_ids, log.end) == (tuple(generated), 3 + len(generated))


def test_tokens_after_a_stop_string_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"generated_token_ids\[2\]: got 98, expected no"):
        begin_output(Letters(), PARAMS, 3, ids("a!b"))


def test_an_early_stop_string_is_text() -> None:
    params = GenerationParams(max_tokens=8, min_tokens=4, stop=("!",))
    assert begin_output(Letters(), params, 3, ids("a!"))[1].finish_reason is None
    assert begin_output(Letters(), params, 3, ids("a!b!"))[1].finish_reason == "stop"


@pytest.mark.parametrize("generated", ["", "abc", "abcEN"])
def test_the_text_goes_on_as_that_of_a_stream_that_never_broke(generated: str) -> None:
    rest = Block(0, tuple(ids("D")), (0,), (1.0,), nfe=1, finish_reason="length")
    resumed = begin_output(Letters(), PARAMS, 3, ids(generated))[0]
    unbroken = OutputText(Letters(), PARAMS)
    for token in ids(generated):
        unbroken.take(Block(0, (token,), (0,), (1.0,), nfe=1))
    assert resumed.take(rest) == unbroken.take(rest)


def test_without_a_tokenizer_there_are_no_stop_strings() -> None:
    with pytest.raises(InvalidRequestError, match="stop: got"):
        begin_output(None, PARAMS, 3, [1])
    params = GenerationParams(max_tokens=2)
    assert begin_output(None, params, 3, [1, 2])[1].finish_reason == "length"


class Source:
    """Blocks of two tokens of a text from position 3 on, and what became of them."""

    def __init__(self, text: str) -> None:
        self._tokens = ids(text)
        self.asked = 0
        self.closed = False

    async def blocks(self) -> AsyncGenerator[Block, None]:
        try:
            for start in range(0, len(self._tokens), 2):
                self.asked += 1
                part = tuple(self._tokens[start : start + 2])
                last = start + 2 >= len(self._tokens)
                block = Block(start + 3, part, (0, 1), (0.5, 0.25), nfe=2, log_probs=(-0.5, -1.5))
                yield replace(block, finish_reason="length" if last else None)
        finally:
            self.closed = True


async def test_blocks_are_committed_as_they_come() -> None:
    source = Source("abcdef")
    text, log = begin_output(Letters(), PARAMS, 3)
    seen = []
    async for block, settled in commit_blocks(source.blocks(), text, log):
        # Nothing is asked for ahead of the reader.
        assert source.asked == log.num_blocks == len(seen) + 1
        seen.append(text_block(log, block, settled))
    assert [(block.index, block.start, block.text) for block in seen] == [
        (0, 3, "ab"),
        (1, 5, "cd"),
        (2, 7, "ef"),
    ]
    assert (seen[1].token_ids, seen[1].commit_steps) == (tuple(ids("cd")), (0, 1))
    assert (seen[1].confidences, seen[1].log_probs) == ((0.5, 0.25), (-0.5, -1.5))
    assert (log.finish_reason, log.usage.completion_tokens, log.usage.nfe) == ("length", 6, 6)
    assert source.closed


async def test_drafts_are_passed_on_and_not_committed() -> None:
    source = Source("abcd")

    async def with_drafts() -> AsyncGenerator[Block | ProvisionalBlock, None]:
        async with aclosing(source.blocks()) as blocks:
            async for block in blocks:
                yield ProvisionalBlock(block.start, 0, (7, 7), (True, True), (0.5, 0.5))
                tops = tuple(((token, -0.5), (1, -2.0)) for token in block.token_ids)
                yield replace(block, top_log_probs=tops)

    text, log = begin_output(Letters(), PARAMS, 3)
    seen = [part async for part in commit_blocks(with_drafts(), text, log)]
    assert [type(item) for item, _ in seen] == [ProvisionalBlock, Block] * 2
    assert [settled for _, settled in seen] == ["", "ab", "", "cd"]
    assert log.token_ids == tuple(ids("abcd"))
    last = seen[-1][0]
    assert isinstance(last, Block)
    assert text_block(log, last, "cd").top_log_probs == last.top_log_probs
    assert text_block(log, replace(last, drafted_by="lookup"), "cd").drafted_by == "lookup"
    assert source.closed


async def test_nothing_comes_after_a_stop_string() -> None:
    source = Source("a!bcdef")
    text, log = begin_output(Letters(), PARAMS, 3)
    seen = [part async for part in commit_blocks(source.blocks(), text, log)]
    assert [(block.token_ids, settled) for block, settled in seen] == [(tuple(ids("a!")), "a")]
    assert (log.finish_reason, text.matched_stop, log.token_ids) == ("stop", "!", tuple(ids("a!")))
    assert (source.asked, source.closed) == (1, True)


async def test_a_complete_output_asks_for_nothing() -> None:
    source = Source("abcdef")
    text, log = begin_output(Letters(), PARAMS, 3, ids("a!"))
    assert [part async for part in commit_blocks(source.blocks(), text, log)] == []
    assert source.asked == 0


async def test_a_reader_that_leaves_closes_the_blocks() -> None:
    source = Source("abcdef")
    text, log = begin_output(Letters(), PARAMS, 3)
    output = commit_blocks(source.blocks(), text, log)
    await anext(output)
    assert not source.closed
    await output.aclose()
    assert source.closed

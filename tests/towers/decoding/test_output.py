"""What a client sends back is gone on with, is complete, or is refused."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace

import pytest

from twotower.towers.decoding.output import Output
from twotower.towers.decoding.services import Block
from twotower.towers.errors import InvalidRequestError
from twotower.towers.request.modes import FinishReason
from twotower.towers.request.params import GenerationParams
from twotower.towers.request.results import Usage

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
    output = Output(Letters(), PARAMS, 3, generated)
    assert (output.finish_reason, output.matched_stop) == (reason, matched)
    assert output.log.token_ids == tuple(generated)


def test_tokens_after_a_stop_string_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"generated_token_ids\[2\]: got 98, expected no"):
        Output(Letters(), PARAMS, 3, ids("a!b"))


def test_an_early_stop_string_is_text() -> None:
    params = GenerationParams(max_tokens=8, min_tokens=4, stop=("!",))
    assert Output(Letters(), params, 3, ids("a!")).finish_reason is None
    assert Output(Letters(), params, 3, ids("a!b!")).finish_reason == "stop"


async def blocks_of(start: int, *tokens: str, reason: FinishReason) -> AsyncGenerator[Block, None]:
    for index, token in enumerate(tokens):
        last = index == len(tokens) - 1
        block = Block(start + index, tuple(ids(token)), (0,), (1.0,), nfe=1)
        yield replace(block, finish_reason=reason if last else None)


@pytest.mark.parametrize("generated", ["", "abc", "abcEN"])
async def test_the_text_goes_on_as_that_of_a_stream_that_never_broke(generated: str) -> None:
    unbroken = Output(Letters(), PARAMS, 3)
    stream = unbroken.commit(blocks_of(3, *generated, "D", reason="length"))
    *_, want = [piece async for piece in stream]
    resumed = Output(Letters(), PARAMS, 3, ids(generated))
    rest = resumed.commit(blocks_of(3 + len(generated), "D", reason="length"))
    assert [piece async for piece in rest] == [want]
    assert resumed.log.token_ids == unbroken.log.token_ids
    assert resumed.finish_reason == unbroken.finish_reason


async def test_a_stop_string_ends_the_output_and_closes_the_blocks() -> None:
    closed = False

    async def endless() -> AsyncGenerator[Block, None]:
        nonlocal closed
        try:
            async for block in blocks_of(3, *"abcEND", "x", "y", reason="length"):
                yield block
        finally:
            closed = True

    output = Output(Letters(), PARAMS, 3)
    pieces = [(block.token_ids, text) async for block, text in output.commit(endless())]
    assert "".join(text for _, text in pieces) == "abc"
    assert [len(token_ids) for token_ids, _ in pieces] == [1] * 6
    assert closed
    assert (output.finish_reason, output.matched_stop) == ("stop", "END")
    assert output.log.usage() == Usage(3, 6, 6, 0, 0, 0, 0)


def test_without_a_tokenizer_there_are_no_stop_strings() -> None:
    with pytest.raises(InvalidRequestError, match="stop: got"):
        Output(None, PARAMS, 3, [1])
    params = GenerationParams(max_tokens=2)
    assert Output(None, params, 3, [1, 2]).finish_reason == "length"

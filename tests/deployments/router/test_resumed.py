"""What a client sends back is gone on with, is complete, or is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from twotower.deployments.router.resumed import resumed_text
from twotower.towers.decoding.output_text import OutputText
from twotower.towers.decoding.services import Block
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
    text, finish_reason = resumed_text(Letters(), PARAMS, generated)
    assert (finish_reason, text.matched_stop) == (reason, matched)


def test_tokens_after_a_stop_string_are_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"generated_token_ids\[2\]: got 98, expected no"):
        resumed_text(Letters(), PARAMS, ids("a!b"))


def test_an_early_stop_string_is_text() -> None:
    params = GenerationParams(max_tokens=8, min_tokens=4, stop=("!",))
    assert resumed_text(Letters(), params, ids("a!"))[1] is None
    assert resumed_text(Letters(), params, ids("a!b!"))[1] == "stop"


@pytest.mark.parametrize("generated", ["", "abc", "abcEN"])
def test_the_text_goes_on_as_that_of_a_stream_that_never_broke(generated: str) -> None:
    rest = Block(0, tuple(ids("D")), (0,), (1.0,), nfe=1, finish_reason="length")
    resumed = resumed_text(Letters(), PARAMS, ids(generated))[0]
    unbroken = OutputText(Letters(), PARAMS)
    for token in ids(generated):
        unbroken.take(Block(0, (token,), (0,), (1.0,), nfe=1))
    assert resumed.take(rest) == unbroken.take(rest)


def test_without_a_tokenizer_there_are_no_stop_strings() -> None:
    with pytest.raises(InvalidRequestError, match="stop: got"):
        resumed_text(None, PARAMS, [1])
    params = GenerationParams(max_tokens=2)
    assert resumed_text(None, params, [1, 2])[1] == "length"

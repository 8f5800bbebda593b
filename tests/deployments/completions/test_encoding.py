"""Texts are read beside the event loop, within bounds, and not at all if they cannot fit."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from twotower.deployments.completions import encoding
from twotower.deployments.completions.encoding import AT_ONCE_BYTES, SHORT_BYTES, Lane, TextReader
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.errors import InvalidRequestError, QueueFullError
from twotower.towers.text.tokenizer import load_tokenizer

LONG = "a" * (SHORT_BYTES + 1)
SHORT = "a" * (AT_ONCE_BYTES + 1)


class Slow:
    """A tokenizer of 1 id per 64 bytes that reads long texts only when it is let to."""

    def __init__(self) -> None:
        self.read: list[tuple[str, int]] = []
        self.go_on = threading.Event()

    def encode(self, text: str) -> list[int]:
        self.read.append((threading.current_thread().name, len(text)))
        if len(text) > SHORT_BYTES:
            assert self.go_on.wait(30)
        return [7] * (len(text) // 64)

    def decode(self, token_ids: object) -> str:
        raise AssertionError(f"nothing decodes {token_ids}")


async def test_a_text_that_cannot_fit_is_not_read() -> None:
    slow = Slow()
    reader = TextReader(slow, 64, 100)
    assert len(await reader.encode("prompt", "a" * 6400)) == 100
    slow.read.clear()
    with pytest.raises(InvalidRequestError) as caught:
        await reader.encode("prompt", "ä" * 3201)
    assert str(caught.value) == (
        "prompt: got '6402 bytes of text', "
        "expected at most 100 tokens, which are at most 64 bytes each"
    )
    assert slow.read == []


async def test_what_turns_out_to_be_too_long_is_refused() -> None:
    reader = TextReader(Slow(), None, 100)
    with pytest.raises(InvalidRequestError, match="input: got '101 tokens', expected at most 100"):
        await reader.encode("input", "a" * 6464)


async def test_what_the_tokenizer_refuses_is_refused_by_the_name_of_the_field() -> None:
    class Fussy(Slow):
        def encode(self, text: str) -> list[int]:
            raise InvalidRequestError("text", text, "a text that can be spelled")

    for text in ("a", SHORT):
        with pytest.raises(InvalidRequestError, match=r"^input: got 'a.*, expected a text that"):
            await TextReader(Fussy(), None, 100).encode("input", text)


async def test_long_texts_hold_up_neither_the_loop_nor_shorter_ones() -> None:
    slow = Slow()
    reader = TextReader(slow, None, 10_000)
    long = [asyncio.ensure_future(reader.encode("prompt", LONG)) for _ in range(3)]
    while not slow.read:
        await asyncio.sleep(0)
    for text in ("a", SHORT, SHORT):
        await asyncio.wait_for(reader.encode("prompt", text), 10)
    names = [name.partition("-")[0] for name, _ in slow.read]
    assert names == ["long", "MainThread", "short", "short"]
    assert not any(one.done() for one in long)
    slow.go_on.set()
    assert [len(ids) for ids in await asyncio.gather(*long)] == [len(LONG) // 64] * 3


async def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "MAX_LONG_WAITING", 2)
    slow = Slow()
    reader = TextReader(slow, None, 10_000)
    kept = [asyncio.ensure_future(reader.encode("prompt", LONG)) for _ in range(2)]
    await asyncio.sleep(0)
    with pytest.raises(QueueFullError, match="2 long texts wait to be read"):
        await reader.encode("prompt", LONG)
    # One that is given up while it waits leaves its place, and is never read.
    kept[1].cancel()
    await asyncio.wait([kept[1]])
    kept[1] = asyncio.ensure_future(reader.encode("prompt", LONG))
    slow.go_on.set()
    await asyncio.gather(*kept)
    assert len(slow.read) == 2
    assert len(await reader.encode("prompt", LONG)) == len(LONG) // 64


async def test_what_work_raises_is_raised_here_and_its_place_is_free_again() -> None:
    lane = Lane("short", 1)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            await lane.run(lambda: 1 // 0)


async def test_the_tokenizer_lets_the_loop_run_meanwhile() -> None:
    """A text of a word of a million letters takes it half a second."""
    reader = TextReader(load_tokenizer(resolve_checkpoint(None)), None, 1_000_000)
    reading = asyncio.ensure_future(reader.encode("prompt", "a" * 1_000_000))
    began, ticks = time.monotonic(), 0
    while not reading.done():
        await asyncio.sleep(0.001)
        ticks += 1
    took = time.monotonic() - began
    # Before, two: one until it has begun, one when it has ended.
    assert ticks > 10, (ticks, took)
    assert len(reading.result()) > 1000

"""The router over a played stream: stop strings, what is read of it, log-probabilities."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.deployments.router.test_router import Context, ask
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.tower_pair import Job
from twotower.deployments.router.router import Router
from twotower.protos.v1 import generation_pb2 as pb
from twotower.towers.decoding.services import Block
from twotower.towers.errors import UnavailableError
from twotower.towers.text.tokenizer import load_tokenizer


class PlayedStream:
    """What a streaming call of Serve gives, as far as it is used; notes what was read of it.

    It may be lost after so many blocks.
    """

    def __init__(self, blocks: Sequence[Block], lost_after: int | None = None) -> None:
        self._blocks = list(blocks)
        self._lost_after = lost_after
        self.read = 0
        self.cancelled = False

    def __aiter__(self) -> PlayedStream:
        return self

    async def __anext__(self) -> Block:
        assert not self.cancelled
        if self.read == self._lost_after:
            raise UnavailableError("a tower is gone")
        if self.read == len(self._blocks):
            raise StopAsyncIteration
        self.read += 1
        return self._blocks[self.read - 1]

    def cancel(self) -> None:
        self.cancelled = True


class PlayedHandle:
    """A deployment of pairs that answers each job with the next of these streams."""

    def __init__(self, *streams: PlayedStream) -> None:
        self._streams = list(streams)
        self.generate = self

    def options(self, **_: object) -> PlayedHandle:
        return self

    def remote(self, _job: Job) -> PlayedStream:
        return self._streams.pop(0)


class Played:
    """A router over a played stream; every block but the last lacks a finish reason."""

    def __init__(
        self, folder: Path, texts: Sequence[str], start: int = 3, lost_after: int | None = None
    ) -> None:
        tokenizer = load_tokenizer(folder)
        assert tokenizer is not None
        self.tokens = [tuple(tokenizer.encode(text)) for text in texts]
        blocks = []
        for token_ids in self.tokens:
            shares = (0.5,) * len(token_ids)
            last = token_ids is self.tokens[-1]
            blocks.append(
                Block(
                    start,
                    token_ids,
                    (0,) * len(token_ids),
                    shares,
                    nfe=2,
                    finish_reason="length" if last else None,
                    log_probs=(math.log(0.5),) * len(token_ids),
                )
            )
            start += len(token_ids)
        self.stream = PlayedStream(blocks)
        config = ServiceConfig(model=str(folder), max_context=80)
        streams = [self.stream]
        if lost_after is not None:
            streams = [PlayedStream(blocks, lost_after), PlayedStream(blocks[lost_after:])]
        self._router = Router(config, PlayedHandle(*streams))

    def generate(self, request: pb.GenerateRequest) -> list[pb.GenerateResponse]:
        async def collect() -> list[pb.GenerateResponse]:
            return [event async for event in self._router.Generate(request, Context())]

        return asyncio.run(collect())


def test_a_stop_string_over_two_blocks_ends_the_request(tiny_text: Path) -> None:
    played = Played(tiny_text, ["x = 1\n", "\ny = 2", " and much more"])
    _, first, second, complete = played.generate(ask(stop=["zzz", "\n\n"]))
    assert (first.block.text, second.block.text) == ("x = 1", "")
    assert tuple(first.block.token_ids) == played.tokens[0]
    assert tuple(second.block.token_ids) == played.tokens[1][:1]
    assert len(second.block.commit_steps) == len(second.block.confidences) == 1
    assert complete.complete.finish_reason == "stop"
    assert complete.complete.matched_stop == "\n\n"
    assert complete.complete.usage.completion_tokens == len(played.tokens[0]) + 1
    assert (played.stream.read, played.stream.cancelled) == (2, True)


def test_min_tokens_lets_an_early_stop_string_pass(tiny_text: Path) -> None:
    texts = ["a;", "b;", "c;"]
    played = Played(tiny_text, texts)
    count = sum(len(tokens) for tokens in played.tokens[:2])
    events = played.generate(ask(stop=[";"], min_tokens=count))
    assert "".join(event.block.text for event in events[1:-1]) == "a;b"
    assert events[-1].complete.usage.completion_tokens == count
    assert played.stream.read == 2


def test_a_stop_string_may_begin_before_a_resume(tiny_text: Path) -> None:
    before = Played(tiny_text, ["x = EN"]).tokens[0]
    played = Played(tiny_text, ["D of it", "more"], start=3 + len(before))
    request = ask(stop=["END"], mode="ar", seed=1)
    request.generated_token_ids.extend(before)
    _, block, complete = played.generate(request)
    assert (block.block.text, complete.complete.matched_stop) == ("", "END")
    # Without the stop string the held back beginning is the resumed client's to see.
    played = Played(tiny_text, ["d of it"], start=3 + len(before))
    _, block, complete = played.generate(request)
    assert block.block.text == "ENd of it"
    assert not complete.complete.HasField("matched_stop")


@pytest.mark.parametrize("lost_after", [0, 1, 2, 3])
def test_a_lost_pair_shows_in_no_message(tiny_text: Path, lost_after: int) -> None:
    """Held back text, half a character and a stop string over the loss included."""
    texts = ["größ", "e = 漢", "字 E", "ND and more"]
    for stop in ([], ["END"]):
        request = ask(stop=stop, seed=4, logprobs=True)
        whole = Played(tiny_text, texts).generate(request)
        assert Played(tiny_text, texts, lost_after=lost_after).generate(request)[1:] == whole[1:]


def test_log_probabilities_come_if_asked_for(tiny_text: Path) -> None:
    _, block, _ = Played(tiny_text, ["x"]).generate(ask())
    assert list(block.block.log_probs) == []
    _, block, _ = Played(tiny_text, ["x"]).generate(ask(logprobs=True))
    assert list(block.block.log_probs) == pytest.approx([math.log(0.5)])

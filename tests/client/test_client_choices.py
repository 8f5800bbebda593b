"""Several completions of a prompt by one call, which a real server loses at any message."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

from twotower.client import AsyncClient, Client, ServiceError
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.errors import InvalidRequestError

TOKENS = 4


def output(seed: int) -> list[int]:
    """The tokens of a completion, which depend on its seed alone."""
    return [(seed * 7 + place) % 50 for place in range(TOKENS)]


class Choosing(generation_pb2_grpc.GenerationServicer):
    """Completions of two blocks each, side by side; a call ends as its entry of `plan` says."""

    def __init__(self) -> None:
        self.plan: list[tuple[int, grpc.StatusCode]] = []
        self.asked: list[pb.GenerateRequest] = []

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.asked.append(request)
        count, code = self.plan.pop(0) if self.plan else (1000, None)
        for index, message in enumerate(self._messages(request)):
            if index == count:
                break
            yield message
        if code is not None:
            context.abort(code, "no pair of towers is up")

    def _messages(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        choices = range(request.n or 1)
        first = request.sampling_params.seed or 9
        done = len(request.generated_token_ids)
        for choice in choices:
            started = pb.Started(request_id="r", seed=first + choice, prompt_tokens=1)
            yield pb.GenerateResponse(started=started, choice=choice)
        # The last choice ends first, and the first waits for all others.
        for place in range(done, TOKENS + (done == TOKENS), 2):
            for choice in reversed(choices):
                ids = output(first + choice)[place : place + 2]
                block = pb.Block(start=1 + place, token_ids=ids)
                if ids:
                    yield pb.GenerateResponse(block=block, choice=choice)
                if place + 2 >= TOKENS:
                    complete = pb.Complete(finish_reason="length")
                    yield pb.GenerateResponse(complete=complete, choice=choice)


@pytest.fixture
def served() -> Iterator[tuple[Choosing, str]]:
    service = Choosing()
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(service, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield service, f"127.0.0.1:{port}"
        server.stop(grace=None).wait()


def test_choices_share_a_call(served: tuple[Choosing, str]) -> None:
    service, address = served
    with Client(address) as client:
        stream = client.generate_choices([1], 3, seed=5, max_tokens=4)
        items = [(number, block.token_ids) for number, block in stream]
    assert [number for number, _ in items] == [2, 1, 0, 2, 1, 0]
    for number, choice in enumerate(stream.choices):
        assert choice.token_ids == output(5 + number)
        assert choice.token_ids == [i for which, ids in items if which == number for i in ids]
        assert (choice.seed, choice.finish_reason) == (5 + number, "length")
    assert [request.n for request in service.asked] == [3]


# Messages until a call is lost: within the beginnings, between blocks, before the last message.
@pytest.mark.parametrize("count", range(12))
def test_what_is_lost_goes_on_exactly(served: tuple[Choosing, str], count: int) -> None:
    service, address = served
    service.plan = [(count, grpc.StatusCode.UNAVAILABLE)]
    with Client(address) as client:
        stream = client.generate_choices([1], 3)
        got: list[list[int]] = [[], [], []]
        for number, block in stream:
            got[number] += block.token_ids
    assert got == [output(9), output(10), output(11)]
    assert [choice.token_ids for choice in stream.choices] == got
    first, *later = service.asked
    assert first.n == 3
    if count <= 3:
        # Nothing was there yet: the same again, with the seed if it is known.
        assert [request.n for request in later] == [3]
        assert later[0].sampling_params.seed == (9 if count else 0)
    else:
        assert {request.HasField("n") for request in later} == {False}
        unfinished = 3 - sum(count > end for end in (7, 9, 11))
        seeds = [request.sampling_params.seed for request in later]
        assert seeds == [9, 10, 11][:unfinished]
        assert len(later[0].generated_token_ids) in (0, 2, 4)


async def test_the_asyncio_client_goes_on_as_well(served: tuple[Choosing, str]) -> None:
    service, address = served
    service.plan = [(2, grpc.StatusCode.UNAVAILABLE), (7, grpc.StatusCode.UNAVAILABLE)]
    async with AsyncClient(address) as client:
        stream = client.generate_choices([1], 2, seed=20)
        got: list[list[int]] = [[], []]
        async for number, block in stream:
            got[number] += block.token_ids
    assert got == [output(20), output(21)]
    assert [request.n for request in service.asked] == [2, 2, 0]


def test_a_refusal_and_a_loss_without_resume_are_raised(served: tuple[Choosing, str]) -> None:
    service, address = served
    with Client(address) as client:
        service.plan = [(0, grpc.StatusCode.INVALID_ARGUMENT)]
        with pytest.raises(ServiceError, match="INVALID_ARGUMENT"):
            list(client.generate_choices([1], 2))
        service.plan = [(4, grpc.StatusCode.UNAVAILABLE)]
        with pytest.raises(ServiceError, match="UNAVAILABLE"):
            list(client.generate_choices([1], 2, resume=False))
        assert len(service.asked) == 2


def test_a_stream_that_is_left_ends(served: tuple[Choosing, str]) -> None:
    _, address = served
    with Client(address) as client:
        stream = client.generate_choices([1], 2)
        for _ in stream:
            break
        stream.cancel()
        with pytest.raises(ServiceError, match="cancelled by this client"):
            list(stream)


@pytest.mark.parametrize("n", [0, 129, 1.5, True, "2"])
def test_the_number_of_choices_is_checked(n: Any) -> None:
    with (
        Client("127.0.0.1:1") as client,
        pytest.raises(InvalidRequestError, match=r"n: got .*, expected a whole number of at least"),
    ):
        client.generate_choices([1], n)
    with Client("127.0.0.1:1") as client, pytest.raises(TypeError):
        client.generate_choices([1], 2, what=3)

"""Calls of a service that is full, broken, slow, gone or right."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from typing import Any

import pytest
from aiohttp import web

from tests.data_pipeline.fake_service import (
    FakeService,
    completion,
    failure,
    fake_service,
    scripted,
)
from twotower.data.caller import Answer, ServiceCaller
from twotower.data.places import Places
from twotower.protos import backoff
from twotower.towers.errors import InvalidRequestError

PATH = "/v1/completions"


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundredth of the waits between attempts."""
    monkeypatch.setattr(backoff, "FIRST_S", 0.001)
    monkeypatch.setattr(backoff, "LONGEST_S", 0.05)


async def post(service: FakeService, **how: Any) -> Answer:
    """The answer to one request."""
    caller = ServiceCaller(service.target, concurrency=2, **how)
    try:
        return await caller.post(PATH, {"prompt": "a secret"})
    finally:
        await caller.close()


async def test_a_completion_comes_as_it_was_sent() -> None:
    async def reply(body: dict[str, Any]) -> web.Response:
        answer = completion(body["prompt"] + "!")
        answer.headers["x-request-id"] = "name"
        return answer

    async with fake_service(reply) as service:
        answer = await post(service, api_key="key")
    assert (answer.status, answer.ok, answer.permanent, answer.attempts) == (200, True, False, 1)
    assert answer.body["choices"][0]["text"] == "a secret!"
    assert answer.request_id == "name"
    assert service.headers[0]["Authorization"] == "Bearer key"


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422, 302, 501])
async def test_what_would_be_refused_again_is_sent_once(status: int) -> None:
    async with fake_service(scripted(failure(status, "no"))) as service:
        answer = await post(service)
    assert (answer.status, answer.ok, answer.permanent, answer.attempts) == (status, False, True, 1)
    assert answer.body == {"error": {"message": "no", "type": "t", "param": "p", "code": "c"}}


@pytest.mark.parametrize("status", [408, 409, 425, 429, 500, 502, 503, 504])
async def test_what_passes_is_tried_again(status: int) -> None:
    async with fake_service(scripted(failure(status), failure(status), "good")) as service:
        answer = await post(service)
    assert (answer.ok, answer.attempts) == (True, 3)
    assert answer.body["choices"][0]["text"] == "good"


@pytest.mark.parametrize(
    "body",
    [b"<html>", b"[]", b"{}", b'{"choices": []}', b"\xff\xfe", b""],
    ids=["html", "list", "empty", "no choices", "no utf-8", "nothing"],
)
async def test_three_answers_that_are_none_are_an_error(body: bytes) -> None:
    async def reply(_: dict[str, Any]) -> web.Response:
        return web.Response(body=body)

    async with fake_service(reply) as service:
        answer = await post(service)
    assert (answer.status, answer.ok, answer.permanent, answer.attempts) == (200, False, True, 3)
    assert answer.body["error"]["code"] == "bad_answer"
    assert "status 200" in answer.body["error"]["message"]


async def test_a_row_that_always_fails_inside_the_service_is_given_up() -> None:
    async with fake_service(scripted(*(failure(500) for _ in range(20)))) as service:
        answer = await post(service)
    assert (answer.status, answer.attempts, answer.permanent) == (500, 8, False)


async def test_an_error_without_openais_shape_gets_it() -> None:
    page = web.Response(status=404, text="<html>" + "x" * 1000)
    async with fake_service(scripted(page)) as service:
        answer = await post(service)
    error = answer.body["error"]
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith("<html>xxx")
    assert len(error["message"]) == 200


@pytest.mark.parametrize("status", [429, 503])
async def test_a_full_service_is_left_alone_for_as_long_as_it_says(status: int) -> None:
    first: list[float] = []

    async def reply(_: dict[str, Any]) -> web.Response:
        first.append(time.monotonic())
        full = failure(status, **{"retry-after": "0.3"})
        return full if len(first) <= 4 else completion("good")

    async with fake_service(reply) as service:
        caller = ServiceCaller(service.target, concurrency=4)
        answers = await asyncio.gather(*(caller.post(PATH, {}) for _ in range(8)))
        await caller.close()
    assert all(answer.ok for answer in answers)
    assert Counter(answer.attempts for answer in answers) == {1: 4, 2: 4}
    # The first four were on their way together; then nobody came before it was time.
    assert first[3] < first[0] + 0.2
    assert first[4] >= first[0] + 0.3


async def refusals_of_a_small_service() -> tuple[int, int]:
    """Refusals while 200 requests get their answers from a service with room for 3, asked by a
    caller with 16 places; and the places that the caller has in the end."""
    refusals = 0

    async def reply(_: dict[str, Any]) -> web.Response:
        nonlocal refusals
        if service.in_flight > 3:
            refusals += 1
            return failure(429)
        await asyncio.sleep(0.004)
        return completion("good")

    async with fake_service(reply) as service:
        caller = ServiceCaller(service.target, concurrency=16)
        answers = await asyncio.gather(*(caller.post(PATH, {}) for _ in range(200)))
        await caller.close()
    assert all(answer.ok for answer in answers)
    assert caller.places.taken == 0
    return refusals, caller.places.limit


async def test_fewer_are_sent_to_a_service_that_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    refusals, places = await refusals_of_a_small_service()
    assert 1 <= places <= 8
    monkeypatch.setattr(Places, "refused", lambda *_: None)
    without, all_places = await refusals_of_a_small_service()
    print(f"{refusals} refusals, {without} where the places stay as they are")
    assert all_places == 16
    assert 3 * refusals < without


async def test_patience_ends_with_the_last_status() -> None:
    async def reply(_: dict[str, Any]) -> web.Response:
        return failure(503, "no pair is up", **{"retry-after": "0.05"})

    async with fake_service(reply) as service:
        began = time.monotonic()
        answer = await post(service, patience_s=0.4)
    assert 0.3 < time.monotonic() - began < 1.0
    assert (answer.status, answer.ok, answer.permanent) == (503, False, False)
    assert answer.body["error"]["message"] == "no pair is up"
    assert 3 <= answer.attempts <= 9


async def test_a_hung_service_is_given_up_in_time() -> None:
    async def reply(_: dict[str, Any]) -> web.Response:
        await asyncio.sleep(5.0)
        return completion("late")

    async with fake_service(reply) as service:
        answer = await post(service, patience_s=0.2)
    assert (answer.status, answer.attempts, answer.ok) == (0, 1, False)
    assert answer.body["error"]["code"] == "unreachable"
    assert "TimeoutError" in answer.body["error"]["message"]


async def test_a_connection_that_dies_in_the_middle_of_an_answer() -> None:
    calls = 0

    async def reply(_: dict[str, Any]) -> web.StreamResponse:
        nonlocal calls
        calls += 1
        if calls == 3:
            return completion("good")
        half = web.StreamResponse(headers={"content-length": "1000"})
        assert service.last is not None
        await half.prepare(service.last)
        await half.write(b'{"choices": [')
        assert service.last.transport is not None
        service.last.transport.abort()
        return half

    async with fake_service(reply) as service:
        answer = await post(service)
    assert (answer.ok, answer.attempts) == (True, 3)


async def test_nobody_there_and_then_somebody() -> None:
    async with fake_service(scripted()) as service:
        port = service.port
        await service.stop()
        gone = await post(service, patience_s=0.2)
        assert (gone.status, gone.ok, gone.permanent) == (0, False, False)
        assert gone.body["error"]["code"] == "unreachable"
        assert gone.attempts > 1
        coming = asyncio.create_task(post(service))
        await asyncio.sleep(0.1)
        assert not coming.done()
        await service.start(port)
        assert (await coming).ok


async def test_one_of_two_services_goes_and_comes_back() -> None:
    async def reply(_: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.01)
        return completion("good")

    async with fake_service(reply) as stays, fake_service(reply) as goes:
        caller = ServiceCaller([goes.target, stays.target], concurrency=4)

        async def many(count: int) -> list[int]:
            before = [len(stays.bodies), len(goes.bodies)]
            answers = await asyncio.gather(*(caller.post(PATH, {}) for _ in range(count)))
            assert all(answer.ok for answer in answers)
            return [len(stays.bodies) - before[0], len(goes.bodies) - before[1]]

        assert await many(40) == [20, 20]
        port = goes.port
        await goes.stop()
        assert await many(40) == [40, 0]
        await goes.start(port)
        await asyncio.sleep(0.06)
        back = await many(40)
        assert min(back) >= 10
        await caller.close()


async def test_connections_are_kept() -> None:
    async with fake_service(scripted()) as service:
        caller = ServiceCaller(service.target, concurrency=3)
        for _ in range(4):
            await asyncio.gather(*(caller.post(PATH, {}) for _ in range(6)))
        await caller.close()
    assert len(service.bodies) == 24
    assert len(service.connections) <= 3
    assert service.most <= 3


async def test_a_cancelled_call_leaves_its_place() -> None:
    async def reply(body: dict[str, Any]) -> web.Response:
        if body["prompt"] == "slow":
            await asyncio.sleep(5.0)
        return completion("good")

    async with fake_service(reply) as service:
        caller = ServiceCaller(service.target, concurrency=1)
        slow = asyncio.create_task(caller.post(PATH, {"prompt": "slow"}))
        await asyncio.sleep(0.05)
        slow.cancel()
        answer = await asyncio.wait_for(caller.post(PATH, {"prompt": "fast"}), 1.0)
        await caller.close()
    assert answer.ok


async def test_nothing_of_a_prompt_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with fake_service(scripted(failure(500), web.Response(text="odd"))) as service:
        assert (await post(service)).ok
    assert "a secret" in json.dumps(service.bodies)
    assert "a secret" not in caplog.text


def test_the_key_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWOTOWER_API_KEY", "from there")
    with pytest.raises(InvalidRequestError, match="api_key: got another text"):
        ServiceCaller("host:1", concurrency=1)
    ServiceCaller("host:1", concurrency=1, api_key="mine")


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ({"concurrency": 0}, "concurrency: got 0, expected a whole number from 1 on"),
        ({"concurrency": True}, "concurrency: got True"),
        ({"concurrency": 1, "patience_s": 0.0}, "patience_s: got 0.0"),
    ],
)
def test_bad_arguments(how: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidRequestError, match=text):
        ServiceCaller("host:1", **how)

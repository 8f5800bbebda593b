"""Calls over a stream: answers, errors, order, who may call, and what is left when it ends."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from twotower.cluster.calls import server as server_module
from twotower.cluster.calls import stream as stream_module
from twotower.cluster.calls.server import CallServer
from twotower.cluster.calls.stream import METHOD, TOKEN_KEY, CallAddress, CallStream
from twotower.cluster.channel.tls import new_identity
from twotower.cluster.services.tower_services import ROW_CALLS
from twotower.towers.decoding.services import Extended
from twotower.towers.errors import CapacityError, UnavailableError
from twotower.towers.request.params import GenerationParams

HOST = "127.0.0.1"
PARAMS = GenerationParams(seed=1)
OPEN, RELEASE, EXTEND = (
    "ContextTowerService.open",
    "TowerService.release",
    "ContextTowerService.extend",
)


class Tower:
    """Notes its calls; `open` waits until it may, `extend` fails if it is told to."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.may_open = asyncio.Event()
        self.may_release = asyncio.Event()
        self.may_release.set()
        self.error: Exception | None = None

    async def open(self, row_id: str, capacity: int) -> int:
        self.begun.append(row_id)
        try:
            await self.may_open.wait()
        finally:
            self.ended.append(row_id)
        return capacity

    async def release(self, row_id: str) -> None:
        self.begun.append(row_id)
        await self.may_release.wait()
        self.ended.append(row_id)

    async def extend(
        self, row_id: str, token_ids: tuple[int, ...], params: GenerationParams, _output: object
    ) -> Extended:
        self.begun.append(row_id)
        if self.error is not None:
            raise self.error
        assert params == PARAMS
        return Extended(len(token_ids))


@asynccontextmanager
async def answering(tower: Tower, *, tls: bool = False) -> AsyncIterator[CallAddress]:
    server = CallServer(lambda _side: tower, ROW_CALLS, new_identity() if tls else None)
    try:
        yield await server.start(HOST)
    finally:
        await server.stop()


@asynccontextmanager
async def calling(address: CallAddress) -> AsyncIterator[CallStream]:
    stream = CallStream(address, ROW_CALLS)
    try:
        yield stream
    finally:
        await stream.close()


async def extended(stream: CallStream, row: str = "a") -> Any:
    async with asyncio.timeout(10):
        return await stream.make(None, EXTEND, (row, (1, 2), PARAMS, ()))


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


@pytest.mark.parametrize("tls", [False, True])
async def test_a_call_has_the_towers_answer(tls: bool) -> None:
    async with answering(Tower(), tls=tls) as address, calling(address) as stream:
        assert await extended(stream) == Extended(2)


async def test_the_side_says_which_tower() -> None:
    towers = {"context": Tower(), "denoiser": Tower()}
    server = CallServer(lambda side: towers[str(side)], ROW_CALLS)
    async with calling(await server.start(HOST)) as stream:
        await stream.make("denoiser", RELEASE, ("a",))
        await stream.make("context", RELEASE, ("b",))
        await server.stop()
    assert (towers["context"].begun, towers["denoiser"].begun) == (["b"], ["a"])


async def test_a_call_that_waits_does_not_hold_up_others() -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        opening = asyncio.ensure_future(stream.make(None, OPEN, ("a", 64)))
        await until(lambda: tower.begun == ["a"])
        assert await extended(stream, "b") == Extended(2)
        tower.may_open.set()
        assert await opening == 64
        assert tower.begun == ["a", "b"]


async def test_calls_begin_in_the_order_in_which_they_are_made() -> None:
    tower, rows = Tower(), [str(number) for number in range(50)]
    async with answering(tower) as address, calling(address) as stream:
        await asyncio.gather(*(extended(stream, row) for row in rows))
    assert tower.begun == rows


async def test_calls_and_answers_that_are_ready_go_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sent: dict[Any, list[int]] = {stream_module: [], server_module: []}
    for module, sizes in sent.items():
        joined = module.joined

        def counted(messages: Any, sizes: Any = sizes, joined: Any = joined) -> bytes:
            sizes.append(len(messages))
            content: bytes = joined(messages)
            return content

        monkeypatch.setattr(module, "joined", counted)
    async with answering(Tower()) as address, calling(address) as stream:
        await extended(stream)
        await asyncio.gather(*(extended(stream) for _ in range(20)))
    # The first of them is on its way before the others are there.
    assert len(sent[stream_module]) <= 4
    assert len(sent[server_module]) <= 6
    assert sum(sent[stream_module]) == sum(sent[server_module]) == 21


async def test_errors_are_the_towers(caplog: pytest.LogCaptureFixture) -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        tower.error = CapacityError("no slot is free")
        with pytest.raises(CapacityError, match="no slot is free"):
            await extended(stream)
        assert not caplog.records
        tower.error = ZeroDivisionError("by zero")
        with pytest.raises(RuntimeError, match="ZeroDivisionError: by zero"):
            await extended(stream)
        assert "a call of a tower failed: ContextTowerService.extend" in caplog.text
        tower.error = None
        assert await extended(stream) == Extended(2)


async def test_arguments_of_another_type_fail_their_call_alone() -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        tower.may_open.set()
        with pytest.raises(RuntimeError, match="Expected `int`"):
            await stream.make(None, OPEN, ("a", "many"))
        assert await extended(stream) == Extended(2)


@pytest.mark.parametrize("given", ["", "another"])
async def test_a_caller_without_the_secret_is_refused(given: str) -> None:
    tower = Tower()
    async with answering(tower) as address:
        async with calling(replace(address, token=given)) as stream:
            with pytest.raises(UnavailableError, match="is gone"):
                await extended(stream)
        async with grpc.aio.insecure_channel(address.address) as channel:
            call: Any = channel.stream_stream(METHOD)
            made = call(metadata=((TOKEN_KEY, given),))
            assert await made.code() is grpc.StatusCode.UNAUTHENTICATED
    assert tower.begun == []


async def test_a_caller_that_expects_another_tower_is_refused() -> None:
    tower = Tower()
    async with answering(tower, tls=True) as address:
        for certificate in (new_identity().certificate, None):
            async with calling(replace(address, certificate=certificate)) as stream:
                with pytest.raises(UnavailableError, match="is gone"):
                    await extended(stream)
    assert tower.begun == []


@pytest.mark.parametrize("content", [b"", b"\x93\x01\x02\x03", b"\x80\x04N."])
async def test_a_message_that_is_none_ends_its_stream_alone(content: bytes) -> None:
    async with answering(Tower()) as address, calling(address) as stream:
        async with grpc.aio.insecure_channel(address.address) as channel:
            call: Any = channel.stream_stream(METHOD)
            made = call(metadata=((TOKEN_KEY, address.token),))
            await made.write(content)
            assert await made.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert await extended(stream) == Extended(2)


async def test_calls_of_a_tower_that_is_lost_fail_and_are_ended() -> None:
    tower = Tower()
    server = CallServer(lambda _side: tower, ROW_CALLS)
    async with calling(await server.start(HOST)) as stream:
        opening = [asyncio.ensure_future(stream.make(None, OPEN, (row, 64))) for row in "ab"]
        await until(lambda: len(tower.begun) == 2)
        await server.stop()
        for call in opening:
            with pytest.raises(UnavailableError, match="is gone"):
                await call
        with pytest.raises(UnavailableError, match="is gone"):
            await extended(stream)
        await until(lambda: sorted(tower.ended) == ["a", "b"])


async def test_after_a_stream_that_broke_comes_another() -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        assert await extended(stream) == Extended(2)
        broken = stream._stream
        assert broken is not None
        broken._call.cancel()
        with suppress(UnavailableError):
            await extended(stream)
        answers = await asyncio.gather(*(extended(stream) for _ in range(5)))
        assert answers == [Extended(2)] * 5


async def test_a_caller_that_gives_up_leaves_nothing_behind() -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        opening = asyncio.ensure_future(stream.make(None, OPEN, ("a", 64)))
        await until(lambda: tower.begun == ["a"])
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        tower.may_open.set()
        assert await extended(stream) == Extended(2)
        assert stream._stream is not None
        assert not stream._stream._waiting


async def test_a_release_ends_though_its_stream_has_broken() -> None:
    tower = Tower()
    tower.may_release.clear()
    async with answering(tower) as address, calling(address) as stream:
        opening = asyncio.ensure_future(stream.make(None, OPEN, ("a", 64)))
        releasing = asyncio.ensure_future(stream.make(None, RELEASE, ("b",)))
        await until(lambda: tower.begun == ["a", "b"])
        assert stream._stream is not None
        stream._stream._call.cancel()
        for call in (opening, releasing):
            with pytest.raises(UnavailableError, match="is gone"):
                await call
        # What waits for room is given up at once, and what frees it is not.
        await until(lambda: tower.ended == ["a"])
        tower.may_release.set()
        await until(lambda: tower.ended == ["a", "b"])


async def test_calls_of_a_lost_machine_wait_together_and_then_fail_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_module, "OPEN_TIMEOUT_S", 0.3)
    clock = asyncio.get_running_loop().time
    # Takes connections and says nothing.
    with socket.create_server((HOST, 0)) as silent:
        stream = CallStream(CallAddress(f"{HOST}:{silent.getsockname()[1]}", "secret"), ROW_CALLS)
        begin = clock()
        lost = [extended(stream) for _ in range(8)]
        outcomes = await asyncio.gather(*lost, return_exceptions=True)
        assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
        assert clock() - begin < 2 * 0.3
        begin = clock()
        with pytest.raises(UnavailableError, match="is gone"):
            await extended(stream)
        assert clock() - begin < 0.1
        await stream.close()


async def test_a_stream_that_was_closed_stays_so() -> None:
    tower = Tower()
    async with answering(tower) as address, calling(address) as stream:
        await stream.open()
        await stream.close()
        with pytest.raises(UnavailableError, match="is gone"):
            await extended(stream)
    assert tower.begun == []


async def test_an_error_whose_text_is_none_has_a_message() -> None:
    """Names of files may hold bytes that are no text."""
    tower = Tower()
    tower.error = CapacityError("\udcff")
    async with answering(tower) as address, calling(address) as stream:
        with pytest.raises(CapacityError, match=r"\?"):
            await extended(stream)


async def test_a_value_without_a_message_fails_its_call_alone() -> None:
    class Odd(Tower):
        async def open(self, row_id: str, capacity: int) -> Any:
            del row_id, capacity
            return object()

    async with answering(Odd()) as address, calling(address) as stream:
        with pytest.raises(RuntimeError, match="TypeError: a object has no message"):
            await stream.make(None, OPEN, ("a", 64))
        assert await extended(stream) == Extended(2)

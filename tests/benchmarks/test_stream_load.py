"""Figures of streams with known times, and streams of a server in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import pytest

from benchmarks.stream_load import Load, StreamTimes, figures, running, until

METHOD = "/test.Streams/Read"


def test_figures_count_what_came_within_the_window() -> None:
    load = Load(2)
    load.requests = [
        StreamTimes(0, 0.0, [1.0, 10.5, 11.0]),
        StreamTimes(1, 0.0, [3.0, 9.0]),
        StreamTimes(1, 10.0, [10.25, 12.0]),
        StreamTimes(0, 11.5, []),
    ]
    found = figures(load, 10.0, 12.0)
    assert (found.blocks, found.blocks_per_s) == (3, 1.5)
    assert found.burst_first_ms == (1000.0, 3000.0)
    assert found.first_ms == (250.0, 250.0)
    # 10.5 after 1.0, and 11.0 after 10.5; 12.0 is no more within it.
    assert found.between_ms == (500.0, 9500.0)
    # Two blocks of the one stream, one of the other: the median is 1.5.
    assert found.slowest_share == 1 / 1.5


def test_nothing_measured_is_none() -> None:
    load = Load(1)
    load.requests = [StreamTimes(0, 0.0)]
    found = figures(load, 1.0, 2.0)
    assert (found.blocks, found.burst_first_ms, found.first_ms, found.between_ms) == (
        0,
        None,
        None,
        None,
    )
    assert load.begun == 0


class Server:
    """Streams five messages to each request, or refuses; counts the streams that it has."""

    def __init__(self) -> None:
        self.open = self.asked = 0
        self.refusing = False
        self.applications = set[str]()

    async def read(self, request: bytes, context: Any) -> AsyncIterator[bytes]:
        self.asked += 1
        self.applications |= {v for k, v in context.invocation_metadata() if k == "application"}
        if self.refusing:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no more")
        self.open += 1
        try:
            for number in range(5):
                await asyncio.sleep(0.002)
                yield request + bytes([number])
        finally:
            self.open -= 1


@asynccontextmanager
async def served(server: Server) -> AsyncIterator[str]:
    running_server = grpc.aio.server()
    handler = grpc.unary_stream_rpc_method_handler(server.read)
    handlers = grpc.method_handlers_generic_handler("test.Streams", {"Read": handler})
    running_server.add_generic_rpc_handlers((handlers,))
    port = running_server.add_insecure_port("127.0.0.1:0")
    await running_server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await running_server.stop(None)


async def test_streams_are_kept_up_and_left_at_the_end() -> None:
    server = Server()
    async with served(server) as target:
        async with running([target], METHOD, b"x", "app", 3, ahead=1) as load:
            assert await until(lambda: server.asked >= 9, 5.0)
            assert server.open <= 3
        assert await until(lambda: server.open == 0, 5.0)
    assert server.applications == {"app"}
    assert load.begun == 3
    assert not load.failures
    whole = [each for each in load.requests if len(each.arrivals) == 3]
    # Five messages: one before the blocks, and the last, which is none.
    assert len(whole) >= 6
    assert all(each.arrivals == sorted(each.arrivals) for each in whole)
    assert all(each.sent < each.arrivals[0] for each in whole)


async def test_a_refused_stream_is_a_failure_and_begun_again() -> None:
    server = Server()
    server.refusing = True
    async with served(server) as target, running([target], METHOD, b"x", "a", 1, ahead=1) as load:
        assert await until(lambda: server.asked >= 2, 5.0)
    assert load.failures[0] == "RESOURCE_EXHAUSTED: no more"
    assert load.begun == 0


@pytest.mark.parametrize("holds", [True, False])
async def test_waiting_for_a_condition(holds: bool) -> None:
    assert await until(lambda: holds, 0.01) is holds

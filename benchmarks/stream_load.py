"""Many server streams of a service at once, kept up and timed; messages are counted, not read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

import grpc
import grpc.aio

from benchmarks.figures import percentile

POLL_S = 0.05
# Before a stream that has failed is begun again.
PAUSE_S = 0.1
CHANNEL = [("grpc.enable_http_proxy", 0), ("grpc.max_receive_message_length", -1)]


@dataclass
class StreamTimes:
    """One request of a stream: when it was sent, and when each of its blocks came."""

    stream: int
    sent: float
    arrivals: list[float] = field(default_factory=list)


@dataclass
class Load:
    """Requests of all streams, in the order in which they were sent, and errors that ended any."""

    streams: int
    requests: list[StreamTimes] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def begun(self) -> int:
        """Streams that have brought a block."""
        return len({each.stream for each in self.requests if each.arrivals})

    def firsts(self) -> list[StreamTimes]:
        """The first request of each stream."""
        found: dict[int, StreamTimes] = {}
        for each in self.requests:
            found.setdefault(each.stream, each)
        return list(found.values())


@dataclass(frozen=True)
class LoadFigures:
    """Blocks a second within a window of time and milliseconds to a block: the first of the streams
    that were all begun at once, the first of requests sent within the window, and each later one
    within it from the block before. Percentiles are (p50, p99), None where nothing was measured.
    `slowest_share` are the blocks of the stream with the fewest over the median of all."""

    blocks: int
    blocks_per_s: float
    burst_first_ms: tuple[float, float] | None
    first_ms: tuple[float, float] | None
    between_ms: tuple[float, float] | None
    slowest_share: float


def figures(load: Load, begin: float, end: float) -> LoadFigures:
    """The figures of a load within a window."""
    burst = [each for each in load.firsts() if each.arrivals]
    inside = [each for each in load.requests if begin <= each.sent < end and each.arrivals]
    of_stream = [0] * load.streams
    for each in load.requests:
        of_stream[each.stream] += sum(begin <= at < end for at in each.arrivals)
    blocks = sum(of_stream)
    later = [
        b - a for each in load.requests for a, b in pairwise(each.arrivals) if begin <= b < end
    ]
    return LoadFigures(
        blocks,
        blocks / (end - begin),
        _percentiles([each.arrivals[0] - each.sent for each in burst]),
        _percentiles([each.arrivals[0] - each.sent for each in inside]),
        _percentiles(later),
        min(of_stream) / max(1.0, median(of_stream)),
    )


@asynccontextmanager
async def running(
    targets: Sequence[str],
    method: str,
    request: bytes,
    application: str,
    streams: int,
    ahead: int,
    ramp_s: float = 0.0,
) -> AsyncIterator[Load]:
    """That many streams of a method, begun within `ramp_s` and each begun again at its end, for as
    long as the block lasts; the first `ahead` messages and the last of each are no blocks. Targets
    are taken in turn."""
    load = Load(streams)
    async with AsyncExitStack() as made:
        channels = [
            await made.enter_async_context(grpc.aio.insecure_channel(target, options=CHANNEL))
            for target in targets
        ]
        calls = [channel.unary_stream(method) for channel in channels]
        metadata = (("application", application),)

        async def keep(stream: int) -> None:
            call = calls[stream % len(calls)]
            await asyncio.sleep(ramp_s * stream / streams)
            while True:
                await _read(lambda: call(request, metadata=metadata), load, stream, ahead)

        tasks = [asyncio.create_task(keep(stream)) for stream in range(streams)]
        try:
            yield load
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def until(condition: Callable[[], bool], timeout_s: float) -> bool:
    """Waits for a condition; whether it came to hold in time."""
    deadline = time.perf_counter() + timeout_s
    while not condition():
        if time.perf_counter() > deadline:
            return False
        await asyncio.sleep(POLL_S)
    return True


async def _read(begin: Callable[[], Any], load: Load, stream: int, ahead: int) -> None:
    """One request of a stream to its end."""
    times = StreamTimes(stream, time.perf_counter())
    load.requests.append(times)
    call = begin()
    before = ahead
    try:
        async for _ in call:
            if before:
                before -= 1
            else:
                times.arrivals.append(time.perf_counter())
        # The last says that the stream is complete, which is known only now.
        times.arrivals.pop()
    except grpc.aio.AioRpcError as error:
        load.failures.append(f"{error.code().name}: {error.details()}")
        await asyncio.sleep(PAUSE_S)
    finally:
        with suppress(asyncio.CancelledError):
            call.cancel()


def _percentiles(seconds: Sequence[float]) -> tuple[float, float] | None:
    if not seconds:
        return None
    milliseconds = [1e3 * each for each in seconds]
    return percentile(milliseconds, 50), percentile(milliseconds, 99)

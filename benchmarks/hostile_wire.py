"""What all kinds of hostile requests share: their register, and connections without manners."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

HOST = "127.0.0.1"
# In which a whole request has to be answered, and for which an unfinished one is held open.
ANSWER_S, HELD_S = 30.0, 1.0
# Outcomes that are no status.
NO_ANSWER, SILENCE, CLOSED, GONE, FOREIGN = "no answer", "silence", "closed", "gone", "no HTTP"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass(frozen=True)
class Target:
    """The ports of both fronts, and the longest message that they take."""

    http_port: int
    grpc_port: int
    max_message: int


@dataclass(frozen=True)
class Kind:
    """A kind of hostile request: `send` makes one, the same for the same generator, and returns
    what came back. `weight` is how often it is drawn."""

    send: Callable[[Target, random.Random], Awaitable[str]]
    weight: float


KINDS: dict[str, Kind] = {}


def kind(
    name: str, weight: float = 1.0
) -> Callable[
    [Callable[[Target, random.Random], Awaitable[str]]],
    Callable[[Target, random.Random], Awaitable[str]],
]:
    """Registers a kind of request."""

    def register(
        send: Callable[[Target, random.Random], Awaitable[str]],
    ) -> Callable[[Target, random.Random], Awaitable[str]]:
        assert name not in KINDS, name
        KINDS[name] = Kind(send, weight)
        return send

    return register


@asynccontextmanager
async def connected(
    port: int, *, abrupt: bool = False, window: int | None = None
) -> AsyncIterator[Streams]:
    """A connection that ends with this block: by RST if `abrupt`. With a `window` of so many bytes
    hardly more is taken from the peer than is read."""
    connection = socket.socket()
    connection.setblocking(False)
    if window is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
    if abrupt:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    try:
        await asyncio.get_running_loop().sock_connect(connection, (HOST, port))
    except BaseException:
        connection.close()
        raise
    reader, writer = await asyncio.open_connection(sock=connection, limit=window or 1 << 16)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def sent(writer: asyncio.StreamWriter, data: bytes) -> bool:
    """Sends bytes; False if the peer has closed before it had them."""
    try:
        writer.write(data)
        await asyncio.wait_for(writer.drain(), ANSWER_S)
    except ConnectionError:
        return False
    return True


async def http_status(
    reader: asyncio.StreamReader, within_s: float = ANSWER_S, late: str = NO_ANSWER
) -> str:
    """The status of the next answer, CLOSED or GONE without one, `late` after `within_s`."""
    try:
        line = await asyncio.wait_for(reader.readline(), within_s)
    except TimeoutError:
        return late
    except ConnectionError:
        return GONE
    if not line:
        return CLOSED
    return line.split()[1].decode() if line.startswith(b"HTTP/1.") else FOREIGN


async def ends(reader: asyncio.StreamReader, within_s: float, late: str = SILENCE) -> str:
    """Whether the peer closes the connection in time; what it says before is not looked at."""
    try:
        async with asyncio.timeout(within_s):
            while await reader.read(1 << 16):
                pass
    except TimeoutError:
        return late
    except ConnectionError:
        return GONE
    return CLOSED

"""A service that answers as a test says, on a free port of loopback, in the test's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Reply = Callable[[dict[str, Any]], Awaitable[web.StreamResponse]]


def completion(text: str, **usage: Any) -> web.Response:
    """An answer with one choice."""
    choice = {"index": 0, "text": text, "finish_reason": "length"}
    return web.json_response({"choices": [choice], "usage": {"completion_tokens": 1, **usage}})


def failure(status: int, message: str = "said so", **headers: str) -> web.Response:
    """An error in OpenAI's shape."""
    body = {"error": {"message": message, "type": "t", "param": "p", "code": "c"}}
    return web.json_response(body, status=status, headers=headers)


class FakeService:
    """What came in, and how much of it at once. `reply` makes the answers."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.in_flight = 0
        self.most = 0
        self.port = 0
        self.last: web.Request | None = None
        self.connections: set[Any] = set()
        self._runner: web.AppRunner | None = None

    @property
    def target(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    async def start(self, port: int = 0) -> None:
        """Listens on a port, a free one if it is 0."""
        app = web.Application()
        app.router.add_post("/v1/{path:.*}", self._answer)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", port)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuses connections from now on."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        self.last = request
        self.bodies.append(await request.json())
        self.headers.append(dict(request.headers))
        self.connections.add(request.transport)
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        try:
            return await self.reply(self.bodies[-1])
        finally:
            self.in_flight -= 1


@asynccontextmanager
async def fake_service(reply: Reply) -> AsyncIterator[FakeService]:
    """A fake service for as long as the block lasts."""
    service = FakeService(reply)
    await service.start()
    try:
        yield service
    finally:
        await service.stop()


def scripted(*replies: web.Response | str) -> Reply:
    """One reply after the other, then completions; a text is a completion."""
    left = list(replies)

    async def reply(_: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0)
        said = left.pop(0) if left else "end"
        return completion(said) if isinstance(said, str) else said

    return reply

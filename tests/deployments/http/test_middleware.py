"""What a proxy of Serve lets through, and in whose words it answers."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from twotower.deployments.http.middleware import MARK, GuardedProxy, proxy_middlewares
from twotower.protos.incoming import REQUEST_VARIABLE, longest_body

LIMIT = 1000


class Behind:
    """Serve's proxy as far as it is used: gives what it was told, and notes what arrived."""

    def __init__(self) -> None:
        self.seen: list[Request] = []
        self.answer = PlainTextResponse("fine", headers={MARK: "1"})
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def route(request: Request) -> PlainTextResponse:
            self.seen.append(request)
            self.bodies.append(await request.body())
            return self.answer

        app = Starlette(routes=[Route("/{path:path}", route, methods=["GET", "POST"])])
        with suppress(ClientDisconnect):
            await app(scope, receive, send)


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
async def client(behind: Behind) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(GuardedProxy(behind, LIMIT))
    return httpx.AsyncClient(transport=transport, base_url="http://proxy")


async def test_what_the_router_says_is_passed_on(behind: Behind, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"a" * LIMIT)
    assert (answer.status_code, answer.text) == (200, "fine")
    assert behind.bodies == [b"a" * LIMIT]


async def test_long_bodies_never_reach_it(behind: Behind, client: httpx.AsyncClient) -> None:
    answer = await client.post("/v1/completions", content=b"a" * (LIMIT + 1))
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == (
        f"message: got {LIMIT + 1}, expected at most {LIMIT} bytes"
    )
    assert behind.seen == []


async def test_nor_those_that_say_no_length(behind: Behind, client: httpx.AsyncClient) -> None:
    async def parts() -> Any:
        for _ in range(100):
            yield b"a" * 100

    answer = await client.post("/v1/completions", content=parts())
    assert answer.status_code == 413
    assert behind.bodies == []


@pytest.mark.parametrize(
    ("status", "want", "text"),
    [
        (500, 503, "is gone"),
        (503, 503, "is gone"),
        (404, 404, "no such path"),
        (408, 503, "longer"),
    ],
)
async def test_what_serve_says_is_replaced(
    behind: Behind, client: httpx.AsyncClient, status: int, want: int, text: str
) -> None:
    secret = "The actor died: class_name ServeReplica, ip 10.0.0.7"
    behind.answer = PlainTextResponse(secret, status)
    # What begins like the path of a probe goes to the router as all others do.
    for path in ("/v1/models", "/-/models"):
        answer = await client.get(path)
        assert answer.status_code == want
        assert text in answer.json()["error"]["message"]
        assert "10.0.0.7" not in answer.text
    # Its own probes are its own.
    assert (await client.get("/-/healthz")).text == secret


async def test_headers_for_the_proxy_are_not_a_clients(
    behind: Behind, client: httpx.AsyncClient
) -> None:
    headers = {"x-request-disconnect-disabled": "?1", "x-request-timeout-seconds": "0.1"}
    await client.get("/v1/models", headers={**headers, "x-request-id": "mine", "x-other": "a"})
    [seen] = behind.seen
    assert not set(headers) & set(seen.headers)
    assert (seen.headers["x-request-id"], seen.headers["x-other"]) == ("mine", "a")
    for wrong in ("a b", "x" * 129):
        await client.get("/v1/models", headers={"x-request-id": wrong})
        assert "x-request-id" not in behind.seen[-1].headers


async def test_long_paths_are_refused(behind: Behind, client: httpx.AsyncClient) -> None:
    assert (await client.get("/" + "a" * 5000)).status_code == 414
    assert behind.seen == []


def test_a_proxy_process_takes_its_limit_from_its_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(REQUEST_VARIABLE, "5000")
    [middleware] = proxy_middlewares()
    assert middleware.kwargs == {"max_bytes": longest_body(5000)}

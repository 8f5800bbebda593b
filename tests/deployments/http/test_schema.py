"""Requests that schemathesis makes of the OpenAPI schema: answers are what the schema says."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.deployments.http.conftest import FrontHere

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
OPERATIONS = [
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/version"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/tokenizer_info"),
    ("GET", "/admin/stats"),
    ("GET", "/metrics"),
]
SETTINGS = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
# What there is no wrong way to ask for is asked for as it is.
ASKED = [(*operation, POSITIVE) for operation in OPERATIONS]
ASKED += [(*operation, NEGATIVE) for operation in OPERATIONS if operation[0] == "POST"]
COMPLETIONS = ("/v1/completions", "/v1/chat/completions")


class Api:
    """The front behind a real HTTP server in a thread of its own, and its schema."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()))

    def __enter__(self) -> Api:
        self._thread.start()
        assert self._up.wait(60)
        self.schema = schemathesis.openapi.from_url(f"{self.url}/openapi.json")
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join()

    def rows(self) -> int:
        """Rows that are left in the towers."""
        return self._front.handle.rows()

    async def _serve(self) -> None:
        self._front = FrontHere(self._folder, "127.0.0.1")
        self._server = uvicorn.Server(
            uvicorn.Config(self._front.app, port=0, log_level="critical", lifespan="off")
        )
        serving = asyncio.ensure_future(self._server.serve())
        while not self._server.started:
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._up.set()
        await serving


@pytest.fixture(scope="module")
def api(tiny_chat: Path) -> Iterator[Api]:
    with Api(tiny_chat) as running:
        yield running


def test_every_operation_is_asked(api: Api) -> None:
    found = [result.ok() for result in api.schema.get_all_operations()]
    assert [(each.method.upper(), each.path) for each in found] == OPERATIONS


@pytest.mark.parametrize(("method", "path", "mode"), ASKED)
def test_answers_are_those_of_the_schema(api: Api, method: str, path: str, mode: Any) -> None:
    statuses: set[int] = set()

    @SETTINGS
    @given(case=api.schema[path][method].as_strategy(generation_mode=mode))
    def conforms(case: Any) -> None:
        if mode is POSITIVE and path in COMPLETIONS:
            case.body = cheap(case.body)
        statuses.add(case.call_and_validate(base_url=api.url, checks=CHECKS).status_code)

    conforms()
    # Numbers that fit a body's types are seldom within their limits, and a name is no model's.
    wanted = 404 if "{model}" in path else 400 if mode is NEGATIVE else 200
    assert wanted in statuses
    assert api.rows() == 0


def cheap(body: dict[str, Any]) -> dict[str, Any]:
    """A body of a completion of a few tokens, without the numbers that no request may have."""
    allowed = {"prompt", "messages", "stream", "echo", "user", "ignore_eos", "provisional", "stop"}
    kept = {name: value for name, value in body.items() if name in allowed}
    return {**kept, "max_tokens": 3} if len(body) % 2 else {**body, "max_tokens": 3}

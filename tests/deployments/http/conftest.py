"""The HTTP front over a pair in this process: real towers of a tiny checkpoint, no Ray."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.pair_here import HandleHere
from twotower.deployments.completions.completions import Completions
from twotower.deployments.config import ServiceConfig
from twotower.deployments.http.app import build_http_app

MAX_CONTEXT = 256
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('a user begins') }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


class FrontHere:
    """A front with a client of it."""

    def __init__(self, folder: Path, client: str, **settings: Any) -> None:
        self.handle = HandleHere(folder, max_context=MAX_CONTEXT)
        config = ServiceConfig(model=str(folder), max_context=MAX_CONTEXT, **settings)
        self.service = Completions(config, self.handle)
        self.app = build_http_app(self.service, config, config.access())
        transport = httpx.ASGITransport(self.app, client=(client, 50000))
        self.client = httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1")

    async def complete(self, **body: Any) -> dict[str, Any]:
        """The answer of /v1/completions."""
        answer = await self.client.post("/v1/completions", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    async def chunks(self, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
        """The chunks of a stream, which has to end with DONE."""
        answer = await self.client.post(path, json={**body, "stream": True})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = [line for line in answer.text.split("\n\n") if line]
        assert events[-1] == "data: [DONE]"
        return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]

    async def refused(
        self, body: Any, path: str = "/v1/completions"
    ) -> tuple[int, str, str | None]:
        """Status, message and field of a refusal, which has to be in OpenAI's shape."""
        sent = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json"}
        answer = await self.client.post(path, headers=headers, **sent)
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error["message"], error["param"]


Fronts = Callable[..., FrontHere]


@pytest.fixture
async def fronts(tiny_text: Path) -> AsyncIterator[Fronts]:
    """Makes fronts, of the tiny checkpoint or of another `folder`, called from `client`."""
    async with AsyncExitStack() as clients:

        def make(folder: Path = tiny_text, client: str = "127.0.0.1", **settings: Any) -> FrontHere:
            front = FrontHere(folder, client, **settings)
            clients.push_async_callback(front.client.aclose)
            return front

        yield make


@pytest.fixture
async def front(fronts: Fronts) -> FrontHere:
    """A front with its default settings."""
    return fronts()


@pytest.fixture(scope="session")
def tiny_chat(tiny_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint with a chat template."""
    folder = tmp_path_factory.mktemp("tiny_chat") / "chat"
    shutil.copytree(tiny_text, folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder

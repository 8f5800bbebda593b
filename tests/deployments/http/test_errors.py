"""A client's fault is a 400 that names the field, whatever was sent."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from tests.deployments.http.conftest import MAX_CONTEXT, FrontHere, Fronts
from twotower.deployments.http import errors as front_errors
from twotower.deployments.http.bodies import MAX_MESSAGES
from twotower.deployments.http.errors import _first_fault
from twotower.towers.errors import NumericalError, QueueFullError, UnavailableError

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({}, "prompt", "missing"),
    ({"prompt": 5}, "prompt", "got 5"),
    ({"prompt": None}, "prompt", "got None"),
    ({"prompt": []}, "prompt", "at least 1 token"),
    ({"prompt": [[]]}, "prompt", "at least 1 token"),
    ({"prompt": ""}, "prompt", "at least 1 token"),
    ({"prompt": [1, "a"]}, "prompt.1", "'a'"),
    ({"prompt": [1, -1]}, "prompt[1]", "got -1"),
    ({"prompt": [512]}, "prompt[0]", "id in 0..511"),
    ({"prompt": [1] * (MAX_CONTEXT + 1)}, "prompt", f"at most {MAX_CONTEXT} tokens"),
    ({"prompt": ["a"] * 129}, "prompt", "at most 128 completions"),
    ({"prompt": "a\ud800"}, "prompt[1]", "lone surrogates"),
    ({"max_tokens": -1}, "max_tokens", "at least 0"),
    ({"max_tokens": 10**9}, "max_tokens", f"at most {MAX_CONTEXT} tokens of context"),
    ({"max_tokens": True}, "max_tokens", "got True"),
    ({"max_tokens": 1.5}, "max_tokens", "got 1.5"),
    ({"max_tokens": "5"}, "max_tokens", "got '5'"),
    ({"temperature": -1}, "temperature", "got -1"),
    ({"temperature": "hot"}, "temperature", "got 'hot'"),
    ({"top_p": 0}, "top_p", "got 0"),
    ({"top_p": 1.1}, "top_p", "got 1.1"),
    ({"top_k": 0}, "top_k", "got 0"),
    ({"min_p": 2}, "min_p", "got 2"),
    ({"seed": -1}, "seed", "got -1"),
    ({"seed": 2**63}, "seed", "expected"),
    ({"n": 0}, "n", "got 0"),
    ({"n": 129}, "n", "got 129"),
    ({"best_of": 3}, "best_of", "got 3"),
    ({"suffix": "}"}, "suffix", "got '}'"),
    ({"logprobs": 6}, "logprobs", "got 6"),
    ({"logprobs": True}, "logprobs", "got True"),
    ({"stop": ["a"] * 17}, "stop", "17 strings"),
    ({"stop": [""]}, "stop[0]", "1 to 256 characters"),
    ({"stop": [1]}, "stop.0", "got 1"),
    ({"presence_penalty": 2.5}, "presence_penalty", "got 2.5"),
    ({"frequency_penalty": -2.5}, "frequency_penalty", "got -2.5"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "got 'x'"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]", "101"),
    ({"logit_bias": {"512": 1}}, "logit_bias[512]", "512"),
    ({"logit_bias": {"5": "a"}}, "logit_bias.5", "got 'a'"),
    ({"mode": "fast"}, "mode", "got 'fast'"),
    ({"mode": 1}, "mode", "got 1"),
    ({"block_size": 257}, "block_size", "got 257"),
    ({"steps_per_block": 0}, "steps_per_block", "got 0"),
    ({"confidence_threshold": 1.5}, "confidence_threshold", "got 1.5"),
    ({"draft_steps": 0}, "draft_steps", "got 0"),
    ({"quality": "best"}, "quality", "one of ar, near, fast"),
    ({"draft_source": "none"}, "draft_source", "one of any, lookup, denoiser"),
    ({"acceptance": 1}, "acceptance", "got 1"),
    ({"mix_ratio": 1.5}, "mix_ratio", "got 1.5"),
    ({"commit_rule": ""}, "commit_rule", "one of released, leftmost, product"),
    ({"first_token": "both"}, "first_token", "one of context, denoiser"),
    ({"min_tokens": 17}, "min_tokens", "got 17"),
    ({"min_steps_per_block": 17}, "min_steps_per_block", "got 17"),
    ({"response_format": {"type": "json_schema"}}, "response_format", "unknown field"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "null without stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "unknown field"),
    ({"Prompt": "a"}, "Prompt", "unknown field"),
]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def front(tiny_text: Path) -> AsyncIterator[FrontHere]:
    """One front for all of this file: a refused request leaves nothing behind."""
    made = FrontHere(tiny_text, "127.0.0.1")
    async with made.client:
        yield made


@pytest.mark.parametrize(
    ("body", "field", "text"), WRONG, ids=[f"{field}-{text}" for _, field, text in WRONG]
)
async def test_the_field_is_named(
    front: FrontHere, body: dict[str, Any], field: str, text: str
) -> None:
    # Surrogates cannot be sent as they are, but JSON has an escape for them.
    raw = json.dumps(body if not body or "prompt" in body else {"prompt": "a", **body}).encode()
    status, message, param = await front.refused(raw)
    assert (status, param) == (400, field)
    assert text in message
    assert message.startswith(field)
    assert front.handle.rows() == 0


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"prompt"',
        b"\xff\xfe\x00",
        b'{"prompt": "\xff"}',
        b"[" * 200_000,
        b'{"a":' * 100_000,
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": Infinity}',
        b'{"prompt": "a", "temperature": 1e999}',
        b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}",
        b'{"prompt": "a", "prompt": 1}',
        b'{"prompt": [' + b"1.5," * 50_000 + b"1]}",
    ],
    ids=range(15),
)
async def test_what_is_no_request_at_all(front: FrontHere, raw: bytes) -> None:
    status, message, _ = await front.refused(raw)
    assert status == 400
    assert len(message) < 500


MANY = 30_000
ONES = b",".join([b"1"] * MANY)
NAMED = b",".join(b'"a%d": "b"' % index for index in range(MANY))
HI = b'"messages": [{"role": "user", "content": "a"}]'


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'"messages": [' + ONES + b"]", "messages.0"),
        (b'"messages": [{"role": "user", "content": [' + ONES + b"]}]", "messages.0.content.0"),
        (b'"messages": [{' + NAMED + b"}]", "messages.0.a0"),
        (HI + b', "stop": [' + ONES + b"]", "stop.0"),
        (HI + b', "logit_bias": {' + NAMED + b"}", "logit_bias"),
        (HI + b"," + NAMED, "a0"),
        (HI + b', "' + b"a" * 100_000 + b'": 1', "a" * 80),
    ],
    ids=["messages", "parts", "names in a message", "stop", "biases", "names", "a long name"],
)
async def test_of_many_faults_one_is_looked_for(
    front: FrontHere, monkeypatch: pytest.MonkeyPatch, body: bytes, field: str
) -> None:
    looked_at: list[int] = []

    def counted(errors: Sequence[Any]) -> tuple[str, str | None]:
        looked_at.append(len(errors))
        return _first_fault(errors)

    monkeypatch.setattr(front_errors, "_first_fault", counted)
    status, message, param = await front.refused(b"{" + body + b"}", CHAT)
    assert (status, param) == (400, field)
    # One for each branch of a union, and those of the fields that are missing.
    assert looked_at[0] < 10
    assert len(message) < 500


async def test_a_conversation_has_so_many_messages(front: FrontHere) -> None:
    message = {"role": "user", "content": ""}
    body = {"messages": [message] * (MAX_MESSAGES + 1)}
    status, text, param = await front.refused(body, CHAT)
    assert (status, param) == (400, "messages")
    assert f"at most {MAX_MESSAGES} items" in text


async def test_a_body_that_is_too_long(front: FrontHere) -> None:
    status, message, _ = await front.refused(b" " * 10_000_000)
    assert status == 413
    assert "got 10000000, expected at most" in message


async def test_paths_methods_and_models(front: FrontHere) -> None:
    client = front.client
    assert (await client.get("/v1/completions")).status_code == 405
    assert (await client.post("/v1/embeddings", json={})).status_code == 404
    for answer in (
        await client.get("/v1/models/gpt-4"),
        await client.post("/v1/completions", json={"prompt": "a", "model": "gpt-4"}),
        await client.post("/tokenize", json={"prompt": "a", "model": "gpt-4"}),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"
        assert answer.json()["error"]["param"] == "model"


async def test_an_ar_only_service_refuses_what_needs_a_denoiser(fronts: Fronts) -> None:
    front = fronts(placement="ar_only")
    status, message, param = await front.refused({"prompt": "a", "mode": "mask_diffusion"})
    assert (status, param) == (400, "mode")
    assert "ar, verified, auto alone" in message
    drafted = {"prompt": "a", "mode": "verified", "draft_source": "denoiser"}
    status, message, param = await front.refused(drafted)
    assert (status, param) == (400, "draft_source")
    assert "no denoiser tower" in message


FAILURES = [
    (QueueFullError("3 rows wait"), 429, "rate_limit_error", "1"),
    (UnavailableError("a tower is gone"), 503, "server_error", None),
    (NumericalError("non-finite logits"), 500, "server_error", None),
    (KeyError("/secret/path"), 500, "server_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "wait"), FAILURES)
async def test_failures_before_the_first_block_have_a_status(
    front: FrontHere,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    status: int,
    kind: str,
    wait: str | None,
    stream: bool,
) -> None:
    async def fail(*_: Any, **__: Any) -> Any:
        raise error
        yield

    monkeypatch.setattr("twotower.deployments.routing.attempts.Attempts.blocks", fail)
    answer = await front.client.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert answer.status_code == status
    assert answer.json()["error"]["type"] == kind
    assert answer.headers.get("retry-after") == wait
    assert "secret" not in answer.text


async def test_a_failure_in_a_stream_is_its_last_event(
    front: FrontHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twotower.deployments.routing.attempts import Attempts

    whole = Attempts.blocks

    async def fail_after_one(self: Attempts, *args: Any) -> Any:
        async for block in whole(self, *args):
            yield block
            raise KeyError("/secret/path")

    monkeypatch.setattr(Attempts, "blocks", fail_after_one)
    body = {"prompt": "a", "stream": True, "max_tokens": 60, "ignore_eos": True}
    answer = await front.client.post("/v1/completions", json=body)
    events = [line for line in answer.text.split("\n\n") if line]
    assert answer.status_code == 200
    assert len(events) == 2
    assert json.loads(events[1].removeprefix("data: "))["error"]["type"] == "server_error"
    assert "secret" not in answer.text
    assert front.service.stats()["router"]["running"] == 0

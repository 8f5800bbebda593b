"""POST /v1/chat/completions, with a chat template and without."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.http.conftest import MAX_CONTEXT, FrontHere, Fronts
from twotower import TwoTower

CHAT = "/v1/chat/completions"
HI = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
RENDERED = "system: be brief\nuser: hi\nassistant:"


@pytest.fixture
async def front(fronts: Fronts, tiny_chat: Path) -> FrontHere:
    return fronts(folder=tiny_chat)


async def answered(front: FrontHere, **body: Any) -> dict[str, Any]:
    answer = await front.client.post(CHAT, json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def test_a_conversation_goes_through_the_template(front: FrontHere, tiny_chat: Path) -> None:
    model = TwoTower.from_pretrained(tiny_chat)
    prompt = model.encode(RENDERED)
    eos = model.config.eos_token_id
    [want] = await asyncio.to_thread(
        lambda: model.generate([prompt], max_tokens=12, seed=1, eos_token_id=eos)
    )
    answer = await answered(front, messages=HI, max_tokens=12, seed=1, return_token_ids=True)
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": want.text, "refusal": None}
    assert choice["token_ids"] == want.token_ids
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    parts = [{"role": "system", "content": [{"type": "text", "text": "be "}]}, HI[1]]
    parts[0]["content"].append({"type": "text", "text": "brief"})  # type: ignore[union-attr]
    again = await answered(front, messages=parts, max_completion_tokens=12, seed=1)
    assert again["choices"][0]["message"]["content"] == want.text


async def test_a_stream_gives_what_an_answer_gives(front: FrontHere) -> None:
    body: dict[str, Any] = {
        "messages": HI,
        "max_tokens": 18,
        "n": 2,
        "temperature": 1.0,
        "seed": 4,
        "logprobs": True,
        "top_logprobs": 3,
    }
    await answered(front, **body)
    answer = await answered(front, **body)
    chunks = await front.chunks(CHAT, **body, stream_options={"include_usage": True})
    assert chunks[-1]["usage"] == answer["usage"]
    for choice in answer["choices"]:
        parts = [
            each
            for chunk in chunks
            for each in chunk["choices"]
            if each["index"] == choice["index"]
        ]
        assert parts[0]["delta"]["role"] == "assistant"
        content = "".join(part["delta"]["content"] for part in parts)
        assert content == choice["message"]["content"]
        logprobs = [each for part in parts for each in part["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    for each in answer["choices"][0]["logprobs"]["content"]:
        assert len(each["top_logprobs"]) == 3
        if "\ufffd" not in each["token"]:
            assert bytes(each["bytes"]).decode() == each["token"]
        values = [top["logprob"] for top in each["top_logprobs"]]
        assert values == sorted(values, reverse=True)


async def test_without_max_tokens_as_long_as_the_context_has_room(front: FrontHere) -> None:
    for mode in ("ar", "mask_diffusion"):
        answer = await answered(front, messages=HI, ignore_eos=True, mode=mode)
        usage = answer["usage"]
        room = MAX_CONTEXT - usage["prompt_tokens"]
        assert room - 16 < usage["completion_tokens"] <= room
        assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("body", "field", "text"),
    [
        ({}, "messages", "missing"),
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages.0.role", "got 'robot'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing"),
        ({"messages": HI, "top_logprobs": 2}, "top_logprobs", "null without logprobs"),
        ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs", "got 21"),
        ({"messages": HI, "tools": []}, "tools", "unknown field"),
        (
            {"messages": HI, "response_format": {"type": "json_schema"}},
            "response_format",
            "got 'json_schema'",
        ),
        ({"messages": HI, "max_tokens": 0}, "max_tokens", "got 0"),
        (
            {"messages": HI, "max_tokens": 1, "max_completion_tokens": 1},
            "max_completion_tokens",
            "null beside max_tokens",
        ),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "messages", "a user begins"),
        ({"messages": [{"role": "user", "content": "a " * 5000}]}, "messages", "at most"),
    ],
    ids=range(12),
)
async def test_the_field_is_named(
    front: FrontHere, body: dict[str, Any], field: str, text: str
) -> None:
    status, message, param = await front.refused(body, CHAT)
    assert status == 400
    assert param is not None
    assert param.startswith(field)
    assert text in message


async def test_a_model_without_a_template_says_so(fronts: Fronts) -> None:
    status, message, param = await fronts().refused({"messages": HI}, CHAT)
    assert (status, param) == (400, "messages")
    assert "chat template" in message


async def test_many_empty_messages_are_read_beside_the_event_loop(
    fronts: Fronts, tiny_chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    front = fronts(tiny_chat)
    threads: list[str] = []
    template = front.service.chat_template
    assert template is not None
    read = template.token_ids

    def noted(messages: Sequence[dict[str, str]]) -> list[int]:
        threads.append(threading.current_thread().name)
        return read(messages)

    monkeypatch.setattr(template, "token_ids", noted)
    for count in (1, 1000):
        await front.client.post(CHAT, json={"messages": [{"role": "user", "content": ""}] * count})
    assert threads[0] == threading.current_thread().name
    assert "texts" in threads[1]


async def test_a_part_of_a_character_has_no_bytes(front: FrontHere) -> None:
    tokenizer = front.service.tokenizer
    assert tokenizer is not None
    part = next(token for token in range(512) if tokenizer.decode([token]) == "\ufffd")
    body = {"messages": HI, "max_tokens": 1, "mode": "ar", "logprobs": True, "top_logprobs": 3}
    answer = await answered(front, **body, logit_bias={str(part): 100})
    [token] = answer["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["bytes"]) == ("\ufffd", None)
    for each in token["top_logprobs"]:
        whole = "\ufffd" not in each["token"]
        assert each["bytes"] == (list(each["token"].encode()) if whole else None)

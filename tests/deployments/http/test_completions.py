"""POST /v1/completions against the same model in process, and a stream against an answer."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.http.conftest import MAX_CONTEXT, FrontHere
from twotower import TwoTower
from twotower.deployments.http import completions as front_completions
from twotower.deployments.http.pieces import prompt_logprobs

PROMPT = "def test_front(self):"


@pytest.fixture(scope="module")
def model(tiny_text: Path) -> TwoTower:
    return TwoTower.from_pretrained(tiny_text)


def joined(chunks: list[dict[str, Any]], index: int) -> dict[str, Any]:
    """What the chunks of a choice add up to."""
    parts = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    whole: dict[str, Any] = dict(parts[-1])
    whole["text"] = "".join(part["text"] for part in parts)
    whole["token_ids"] = [token for part in parts for token in part["token_ids"]]
    if parts[0].get("logprobs") is not None:
        whole["logprobs"] = {
            name: [value for part in parts for value in part["logprobs"][name]]
            for name in parts[0]["logprobs"]
        }
    for name in ("twotower", "prompt_token_ids"):
        whole[name] = parts[0].get(name)
    return whole


@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"mode": "ar", "temperature": 0.9, "top_p": 0.8},
        {"mode": "verified", "draft_steps": 2, "draft_source": "denoiser"},
        {"mode": "mock_ar"},
        {"temperature": 1.0, "confidence_threshold": 0.02, "steps_per_block": 5, "block_size": 8},
        {"mode": "ar", "frequency_penalty": 1.5, "presence_penalty": 0.5, "logit_bias": {"80": 9}},
    ],
    ids=lambda knobs: "-".join(map(str, knobs.values())) or "defaults",
)
async def test_an_answer_is_what_the_model_writes(
    front: FrontHere, model: TwoTower, knobs: dict[str, Any]
) -> None:
    body = {"prompt": PROMPT, "max_tokens": 21, "seed": 7, **knobs}
    answer = await front.complete(**body, return_token_ids=True)
    here = {name: value for name, value in knobs.items() if name != "logit_bias"}
    if "logit_bias" in knobs:
        here["logit_bias"] = {int(key): bias for key, bias in knobs["logit_bias"].items()}
    eos = model.config.eos_token_id
    # The method runs a loop of its own.
    [want] = await asyncio.to_thread(
        lambda: model.generate([PROMPT], max_tokens=21, seed=7, eos_token_id=eos, **here)
    )
    [choice] = answer["choices"]
    assert choice["token_ids"] == want.token_ids
    assert choice["text"] == want.text
    assert choice["finish_reason"] == want.finish_reason
    assert choice["prompt_token_ids"] == model.encode(PROMPT)
    usage = answer["usage"]
    assert usage["completion_tokens"] == len(want.token_ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["twotower"]["nfe"] == want.nfe
    assert usage["twotower"]["accepted_tokens"] == want.accepted_tokens
    assert usage["twotower"]["lookup_drafted_tokens"] == want.lookup_drafted_tokens
    assert front.handle.rows() == 0


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "verified"])
async def test_a_stream_gives_what_an_answer_gives(front: FrontHere, mode: str) -> None:
    body: dict[str, Any] = {
        "prompt": [PROMPT, "class A:"],
        "n": 2,
        "seed": 3,
        "temperature": 0.9,
        "mode": mode,
        "draft_source": "denoiser",
        "max_tokens": 19,
        "logprobs": 2,
        "echo": True,
        "return_token_ids": True,
    }
    # Once for the prefix cache, which the second finds filled.
    await front.complete(**body)
    answer = await front.complete(**body)
    chunks = await front.chunks(**body, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == answer["usage"]
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1
    for choice in answer["choices"]:
        assert joined(chunks, choice["index"]) == choice


async def test_choices_and_prompts_are_numbered_in_order(front: FrontHere) -> None:
    body: dict[str, Any] = {"temperature": 1.0, "seed": 5, "max_tokens": 12, "mode": "ar"}
    both = await front.complete(prompt=["a b c", "class A:"], n=3, **body)
    assert [choice["index"] for choice in both["choices"]] == list(range(6))
    texts = [choice["text"] for choice in both["choices"]]
    assert len(set(texts)) == 6
    for index, choice in enumerate(both["choices"]):
        prompt = ["a b c", "class A:"][index // 3]
        alone = await front.complete(prompt=prompt, **{**body, "seed": choice["twotower"]["seed"]})
        assert alone["choices"][0]["text"] == choice["text"]


async def test_prompts_as_ids(front: FrontHere, model: TwoTower) -> None:
    ids = model.encode(PROMPT)
    text = (await front.complete(prompt=PROMPT))["choices"][0]["text"]
    assert (await front.complete(prompt=ids))["choices"][0]["text"] == text
    two = await front.complete(prompt=[ids, ids[:3]])
    assert two["choices"][0]["text"] == text
    assert two["usage"]["prompt_tokens"] == len(ids) + 3


async def test_without_max_tokens_sixteen_as_openai_does(front: FrontHere) -> None:
    answer = await front.complete(prompt=PROMPT, ignore_eos=True)
    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_null_means_the_default(front: FrontHere) -> None:
    names = (
        "max_tokens temperature top_p top_k min_p seed n stop stream stream_options logprobs echo "
        "logit_bias presence_penalty frequency_penalty best_of suffix user model mode block_size "
        "steps_per_block confidence_threshold draft_steps min_tokens ignore_eos provisional "
        "min_steps_per_block min_confidence_threshold return_token_ids quality draft_source "
        "acceptance mix_ratio commit_rule first_token"
    )
    plain = await front.complete(prompt=PROMPT)
    null = await front.complete(prompt=PROMPT, **dict.fromkeys(names.split()))
    assert null["choices"][0]["text"] == plain["choices"][0]["text"]


@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
async def test_echo_with_logprobs_scores_the_prompt(
    front: FrontHere, model: TwoTower, mode: str, max_tokens: int
) -> None:
    """What lm-eval's local-completions sends for a likelihood."""
    answer = await front.complete(
        prompt=PROMPT, max_tokens=max_tokens, echo=True, logprobs=1, seed=1234, mode=mode
    )
    [choice] = answer["choices"]
    found, ids = choice["logprobs"], model.encode(PROMPT)
    scores = await asyncio.to_thread(model.score, ids)
    assert found["token_logprobs"][0] is None
    assert found["top_logprobs"][0] is None
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(scores, abs=1e-5)
    assert len(found["tokens"]) == len(ids) + answer["usage"]["completion_tokens"]
    assert "".join(found["tokens"]) == choice["text"]
    assert choice["text"].startswith(PROMPT)
    starts = [sum(map(len, found["tokens"][:index])) for index in range(len(found["tokens"]))]
    assert found["text_offset"] == starts
    for value, top in list(zip(found["token_logprobs"], found["top_logprobs"], strict=True))[1:]:
        assert max(top.values()) >= value
        assert value in top.values() or max(top.values()) > value
        assert 1 <= len(top) <= 2


async def test_a_long_prompt_is_split_beside_the_event_loop(
    front: FrontHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*given: Any) -> Any:
        threads.append(threading.current_thread().name)
        return prompt_logprobs(*given)

    monkeypatch.setattr(front_completions, "prompt_logprobs", noted)
    for count in (3, 200):
        await front.complete(prompt=[65] * count, max_tokens=0, echo=True, logprobs=1)
    assert threads[0] == threading.current_thread().name
    assert "texts" in threads[1]


async def test_a_prompt_that_fills_the_context_can_be_scored(front: FrontHere) -> None:
    ids = [5 + index % 40 for index in range(MAX_CONTEXT)]
    answer = await front.complete(prompt=ids, max_tokens=0, echo=True, logprobs=0)
    assert len(answer["choices"][0]["logprobs"]["tokens"]) == MAX_CONTEXT
    assert front.handle.rows() == 0


async def test_logprobs_are_those_of_the_context_tower_in_ar(
    front: FrontHere, model: TwoTower
) -> None:
    answer = await front.complete(
        prompt=PROMPT, max_tokens=9, mode="ar", logprobs=5, return_token_ids=True
    )
    [choice] = answer["choices"]
    ids = model.encode(PROMPT)
    whole = await asyncio.to_thread(model.score, ids + choice["token_ids"])
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(whole[len(ids) - 1 :], abs=1e-4)
    for value, top in zip(
        choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"], strict=True
    ):
        # Greedy: the token taken is the likeliest, unless a likelier one has the same text.
        assert max(top.values()) == value
        assert sum(map(math.exp, top.values())) <= 1.0 + 1e-6


async def test_a_stop_string_ends_the_text_before_it(front: FrontHere) -> None:
    whole = (await front.complete(prompt=PROMPT, max_tokens=40))["choices"][0]["text"]
    stop = whole[len(whole) // 2 :][:3]
    for form in (stop, [stop], ["never in there", stop]):
        answer = await front.complete(prompt=PROMPT, max_tokens=40, stop=form)
        [choice] = answer["choices"]
        assert choice["text"] == whole[: whole.index(stop)]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)


async def test_drafts_come_between_blocks_if_asked_for(front: FrontHere) -> None:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 20,
        "steps_per_block": 4,
        "confidence_threshold": 1.0,
        "return_token_ids": True,
    }
    plain = joined(await front.chunks(**body), 0)
    chunks = await front.chunks(**body, provisional=True)
    assert joined(chunks, 0)["text"] == plain["text"]
    extras = [chunk["choices"][0]["twotower"] for chunk in chunks]
    drafts = [extra["provisional"] for extra in extras if extra.get("provisional")]
    blocks = [extra["block"] for extra in extras if extra.get("block")]
    assert len(blocks) == 2
    assert {block["drafted_by"] for block in blocks} == {""}
    for block in blocks:
        steps = [draft["step"] for draft in drafts if draft["start"] == block["start"]]
        # A reader that is slow gets the latest only.
        assert steps == sorted(set(steps))
        assert 1 <= len(steps) <= 3
        assert max(steps) == 2
    for draft in drafts:
        block = next(block for block in blocks if block["start"] == draft["start"])
        # The last block is cut at max_tokens, its drafts are whole.
        for place, token in enumerate(block["token_ids"]):
            if not draft["masked"][place]:
                assert token == draft["token_ids"][place]
                assert block["commit_steps"][place] <= draft["step"]


async def test_a_client_that_goes_frees_its_row(front: FrontHere) -> None:
    """In every phase: while the row is prefilled or waits, between blocks, in a block."""
    body = b'{"prompt": "x", "max_tokens": 200, "ignore_eos": true, "stream": true}'
    headers = [(b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": headers,
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }
    for sent_before in range(4):
        sent = asyncio.Semaphore(0)
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive(given: list[dict[str, Any]] = given) -> dict[str, Any]:
            if given:
                return given.pop()
            return await asyncio.get_running_loop().create_future()

        async def send(_message: Any, sent: asyncio.Semaphore = sent) -> None:
            sent.release()

        call = asyncio.ensure_future(front.app(dict(scope), receive, send))
        for _ in range(sent_before):
            await sent.acquire()
        if not sent_before:
            while not front.handle.rows():
                await asyncio.sleep(0)
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        async with asyncio.timeout(5):
            while front.handle.rows():
                await asyncio.sleep(0.01)
        counters = front.service.stats()["router"]
        assert (counters["running"], counters["waiting"]) == (0, 0)


@pytest.mark.parametrize("sent_before", range(3))
@pytest.mark.parametrize("choices", [1, 2])
async def test_a_client_that_goes_while_it_is_sent_something_frees_its_rows(
    front: FrontHere, sent_before: int, choices: int
) -> None:
    """At once, not when Python next collects what nobody can reach."""
    body = {"prompt": "x", "max_tokens": 200, "ignore_eos": True, "stream": True, "n": choices}
    given = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    left, gone = sent_before, asyncio.Event()

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(_message: Any) -> None:
        nonlocal left
        if not left:
            gone.set()
            await asyncio.Event().wait()
        left -= 1

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "headers": [(b"content-type", b"application/json")],
        "query_string": b"",
        "client": ("127.0.0.1", 1),
    }
    gc.disable()
    try:
        await front.app(scope, receive, send)
        async with asyncio.timeout(5):
            while front.handle.rows():
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
    counters = front.service.stats()["router"]
    assert (counters["running"], counters["waiting"]) == (0, 0)

"""Routes beside completions: probes, the model, its tokenizer, counters, the schema."""

from __future__ import annotations

import pytest

import twotower
from tests.deployments.http.conftest import MAX_CONTEXT, FrontHere


async def test_probes(front: FrontHere, monkeypatch: pytest.MonkeyPatch) -> None:
    client = front.client
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 200
    assert (await client.get("/version")).json() == {"version": twotower.__version__}

    async def gone() -> None:
        raise OSError

    monkeypatch.setattr(front.handle.pair, "ping", gone)
    assert (await client.get("/health")).status_code == 200
    assert (await client.get("/ready")).status_code == 503


async def test_the_model(front: FrontHere) -> None:
    listed = (await front.client.get("/v1/models")).json()
    [model] = listed["data"]
    assert listed["object"] == "list"
    assert model["max_model_len"] == MAX_CONTEXT
    assert model["modes"] == ["mask_diffusion", "ar", "mock_ar", "verified", "auto"]
    assert (await front.client.get(f"/v1/models/{model['id']}")).json() == model


async def test_texts_to_ids_and_back(front: FrontHere) -> None:
    text = "def f():\n    return 'ä'"
    found = (await front.client.post("/tokenize", json={"prompt": text})).json()
    assert found["count"] == len(found["tokens"]) > 0
    back = await front.client.post("/detokenize", json={"tokens": found["tokens"]})
    assert back.json() == {"prompt": text}
    status, message, param = await front.refused({"tokens": [512]}, "/detokenize")
    assert (status, param) == (400, "tokens[0]")
    assert "id in 0..511" in message


async def test_special_tokens(front: FrontHere) -> None:
    """As lm-eval's remote tokenizer asks for them."""
    info = (await front.client.get("/tokenizer_info")).json()
    assert info == {
        "eos_token": "<eos>",
        "bos_token": "<bos>",
        "pad_token": "<pad>",
        "chat_template": None,
    }

    async def ids(text: str) -> list[int]:
        body = {"prompt": text, "add_special_tokens": False}
        found: list[int] = (await front.client.post("/tokenize", json=body)).json()["tokens"]
        return found

    assert await ids("<eos>") == [2]
    # Spelled out within a text it is letters.
    assert 2 not in await ids("a <eos>")


async def test_counters(front: FrontHere) -> None:
    await front.complete(prompt=[5, 6, 7], max_tokens=5, ignore_eos=True)
    await front.complete(prompt=[5, 6, 7], max_tokens=4, n=2, ignore_eos=True)
    stats = (await front.client.get("/admin/stats")).json()
    router = stats["router"]
    assert router["requests_total"] == 3
    assert router["prompt_tokens_total"] == 9
    assert router["generation_tokens_total"] == 13
    assert router["nfe_total"] >= 3
    assert (router["running"], router["waiting"]) == (0, 0)


async def test_the_schema_names_what_is_taken(front: FrontHere) -> None:
    schema = (await front.client.get("/openapi.json")).json()
    assert set(schema["paths"]) >= {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
    }
    fields = schema["components"]["schemas"]["CompletionBody"]
    assert fields["additionalProperties"] is False
    assert {"prompt", "confidence_threshold", "steps_per_block"} <= set(fields["properties"])
    undescribed = [
        name
        for name, field in fields["properties"].items()
        if "description" not in field and name != "stream_options"
    ]
    assert undescribed == []

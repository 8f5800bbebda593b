"""What a router counts and measures, read as Prometheus does."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.deployments.http.conftest import FrontHere, Fronts
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.telemetry.instruments import LocalInstruments
from twotower.deployments.telemetry.names import ROUTER, sample_names
from twotower.deployments.telemetry.record import CompletionRecord
from twotower.deployments.telemetry.router_metrics import CompletionMetrics, RouterMetrics
from twotower.towers.decoding.services import Block

PROMPT = list(range(10, 42))
# Blocks of 4: three of them.
ASKED = {"prompt": PROMPT, "max_tokens": 12, "block_size": 4, "ignore_eos": True, "seed": 3}


async def series(front: FrontHere, **headers: str) -> dict[tuple[str, ...], float]:
    """The page's samples without their buckets: value by name and label values, in
    the order of the labels' names, the model's left out."""
    answer = await front.client.get("/metrics", headers=headers)
    assert answer.status_code == 200, answer.text
    found = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name.endswith(("_bucket", "_created")):
                continue
            labels = {key: each for key, each in sample.labels.items() if key != "model"}
            found[sample.name.removeprefix("twotower_"), *labels.values()] = sample.value
    return found


async def test_counts_are_those_of_the_answers(front: FrontHere) -> None:
    drawn = (await front.complete(**ASKED, mode="mask_diffusion"))["usage"]
    decoded = (await front.complete(**ASKED, mode="ar"))["usage"]
    asked = {**ASKED, "mode": "verified", "draft_source": "denoiser"}
    checked = (await front.complete(**asked))["usage"]
    found = await series(front)
    for mode, usage in (("mask_diffusion", drawn), ("ar", decoded), ("verified", checked)):
        own = usage["twotower"]
        assert found["generation_tokens_total", mode, ""] == 12
        assert found["prompt_tokens_total", mode, ""] == len(PROMPT)
        assert found["context_passes_total", mode, ""] == own["context_passes"] > 0
        assert found["request_success_total", "length", mode, ""] == 1
        assert found["num_requests_running", mode, ""] == 0
        assert found["num_requests_waiting", mode, ""] == 0
        assert found["time_to_first_token_seconds_count", mode, ""] == 1
        assert found["e2e_request_latency_seconds_count", mode, ""] == 1
        assert found["prefix_cache_queries_total", mode, ""] == len(PROMPT)
    assert found["nfe_total", "mask_diffusion", ""] == drawn["twotower"]["nfe"] > 0
    assert ("nfe_total", "ar", "") not in found
    # Two pauses between three blocks.
    assert found["block_latency_seconds_count", "mask_diffusion", ""] == 2
    assert found["inter_token_latency_seconds_count", "mask_diffusion", ""] == 2
    assert found["tokens_per_nfe_count", "mask_diffusion", ""] == 3
    whole = found["inter_token_latency_seconds_sum", "mask_diffusion", ""] * 4
    assert whole == pytest.approx(found["block_latency_seconds_sum", "mask_diffusion", ""])
    extra = checked["twotower"]
    assert extra["drafted_tokens"] > 0
    for figure in ("drafted_tokens", "accepted_tokens"):
        by_source = {
            source: found.get((f"{figure}_total", "verified", "", source), 0)
            for source in ("lookup", "denoiser")
        }
        assert sum(by_source.values()) == extra[figure]
        assert by_source["lookup"] == extra[f"lookup_{figure}"]
    assert found["requests_by_key_total", "anonymous"] == 3


def test_drafts_are_counted_by_source() -> None:
    instruments = LocalInstruments(ROUTER)
    completion = CompletionMetrics(RouterMetrics("drafts", instruments), "auto", 0.0)
    block = Block(
        *(5, (8, 9), (0, 0), (0.5, 0.25), 1),
        accepted_tokens=7,
        drafted_tokens=19,
        lookup_accepted_tokens=5,
        lookup_drafted_tokens=12,
    )
    completion.committed(block, 5, 0)
    completion.committed(replace(block, lookup_accepted_tokens=7, lookup_drafted_tokens=19), 5, 0)
    found = {
        (sample.name, sample.labels["source"]): sample.value
        for family in text_string_to_metric_families(instruments.text().decode())
        for sample in family.samples
        if "source" in sample.labels and sample.name.endswith("_total")
    }
    assert found == {
        ("twotower_drafted_tokens_total", "lookup"): 31,
        ("twotower_drafted_tokens_total", "denoiser"): 7,
        ("twotower_accepted_tokens_total", "lookup"): 12,
        ("twotower_accepted_tokens_total", "denoiser"): 2,
    }


async def test_times_add_up(front: FrontHere) -> None:
    await front.complete(**ASKED, mode="verified", draft_source="denoiser")
    found = await series(front)

    def total(name: str) -> float:
        return found[f"{name}_sum", "verified", ""]

    parts = ("request_queue_time_seconds", "prefill_seconds", "commit_latency_seconds")
    assert all(total(name) > 0 for name in parts)
    assert sum(total(name) for name in parts) < total("e2e_request_latency_seconds")
    first, later = total("time_to_first_token_seconds"), total("block_latency_seconds")
    assert first + later <= total("e2e_request_latency_seconds")
    assert total("prefill_seconds") < first


async def test_a_client_that_goes_is_an_abort(front: FrontHere) -> None:
    began = asyncio.Event()
    original = CompletionRecord.committed

    def committed(self: CompletionRecord, *args: Any) -> None:
        original(self, *args)
        began.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompletionRecord, "committed", committed)
        asked = {**ASKED, "max_tokens": 200, "mode": "ar"}
        going = asyncio.ensure_future(front.client.post("/v1/completions", json=asked))
        await began.wait()
        during = await series(front)
        going.cancel()
        await asyncio.gather(going, return_exceptions=True)
    assert during["num_requests_running", "ar", ""] == 1
    after = await series(front)
    assert after["num_requests_running", "ar", ""] == 0
    assert after["request_success_total", "abort", "ar", ""] == 1


async def test_errors_by_their_code(front: FrontHere, monkeypatch: pytest.MonkeyPatch) -> None:
    await front.refused({**ASKED, "temperature": -1})
    await front.refused({**ASKED, "surprise": 1})
    await front.refused({**ASKED, "model": "another"})

    async def broken(*_: object) -> None:
        raise ValueError("PRIVATE")

    monkeypatch.setattr(front.handle.context, "prefill", broken)
    await front.refused(ASKED)
    found = await series(front)
    assert found["request_errors_total", "INVALID_ARGUMENT"] == 2
    assert found["request_errors_total", "NOT_FOUND"] == 1
    assert found["request_errors_total", "INTERNAL"] == 1
    assert found["request_success_total", "error", "mask_diffusion", ""] == 1
    assert found["num_requests_waiting", "mask_diffusion", ""] == 0


async def test_only_admins_read_it_and_keys_are_names(fronts: Fronts) -> None:
    made = {name: new_key() for name in ("boss", "guest")}
    keys = [
        ApiKey(name=name, sha256=digest, admin=name == "boss") for name, (_, digest) in made.items()
    ]
    front = fronts(api_keys=keys)
    headers = {name: {"authorization": f"Bearer {key}"} for name, (key, _) in made.items()}
    assert (await front.client.get("/metrics")).status_code == 401
    assert (await front.client.get("/metrics", headers=headers["guest"])).status_code == 403
    answer = await front.client.post("/v1/completions", json=ASKED, headers=headers["guest"])
    assert answer.status_code == 200
    found = await series(front, **headers["boss"])
    assert found["requests_by_key_total", "guest"] == 1
    assert found["request_errors_total", "UNAUTHENTICATED"] == 1
    assert found["request_errors_total", "PERMISSION_DENIED"] == 1


def test_names_are_whole() -> None:
    for name, each in ROUTER.items():
        assert name.endswith("_total") == (each.kind == "counter"), name
        assert bool(each.boundaries) == (each.kind == "histogram"), name
        assert list(each.boundaries) == sorted(set(each.boundaries)), name
        assert each.text.endswith("."), name
    assert sample_names("tokens_per_nfe") == [
        f"twotower_tokens_per_nfe_{suffix}" for suffix in ("bucket", "count", "sum")
    ]

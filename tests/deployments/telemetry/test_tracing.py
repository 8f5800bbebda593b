"""Traces of completions, as a collector gets them."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.deployments.http.conftest import FrontHere, Fronts
from tests.support.otlp import Collector, collecting, value_of
from twotower.deployments.app import build_app
from twotower.deployments.config import ServiceConfig
from twotower.deployments.telemetry import exporter
from twotower.towers.errors import ConfigError

TRACE_ID, PARENT_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACED, UNTRACED = (f"00-{TRACE_ID}-{PARENT_ID}-{flag}" for flag in ("01", "00"))
# Blocks of 4: three of them.
ASKED = {"prompt": "def secret(): return", "max_tokens": 12, "block_size": 4, "ignore_eos": True}
# The clocks of a span and of its phases are read one after the other.
SLACK_NS = 5_000_000


@contextmanager
def traced(fronts: Fronts, **settings: Any) -> Iterator[tuple[FrontHere, Collector]]:
    """A front that has sent all it has to a collector when the block ends."""
    with collecting() as collector:
        given = {"trace_sample_ratio": 1.0, **settings}
        front = fronts(otlp_endpoint=collector.address, **given)
        yield front, collector
    assert collector.spans == [] or collector.services == {"twotower"}


async def ask(front: FrontHere, traceparent: str | None = None, **body: Any) -> dict[str, Any]:
    headers = {"x-request-id": "mine"} | ({"traceparent": traceparent} if traceparent else {})
    answer = await front.client.post("/v1/completions", json={**ASKED, **body}, headers=headers)
    found: dict[str, Any] = answer.json()
    return found


def sent(front: FrontHere) -> None:
    """Waits until every span has been sent."""
    front.service.recorder.traces.close()  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar", "mock_ar", "verified", "auto"])
async def test_a_completion_is_a_span_with_its_phases_inside(fronts: Fronts, mode: str) -> None:
    with traced(fronts) as (front, collector):
        usage = (await ask(front, TRACED, mode=mode, draft_source="denoiser"))["usage"]
        sent(front)
    [root] = [span for span in collector.spans if span.name == "completion"]
    assert root.trace_id.hex() == TRACE_ID
    assert root.parent_span_id.hex() == PARENT_ID
    assert root.kind == Span.SPAN_KIND_SERVER
    wanted = {
        "request_id": "mine",
        "mode": mode,
        "output_tokens": 12,
        "prompt_tokens": usage["prompt_tokens"],
        "nfe": usage["twotower"]["nfe"],
        "context_passes": usage["twotower"]["context_passes"],
        "finish_reason": "length",
    }
    assert {name: value_of(root, f"twotower.{name}") for name in wanted} == wanted
    phases = [span for span in collector.spans if span is not root]
    check_phases(root, phases, mode)
    assert "secret" not in str(collector.spans)


def check_phases(root: Span, phases: list[Span], mode: str) -> None:
    """Parents, nesting, order and names of the phases of an undisturbed completion."""
    for span in phases:
        assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
        assert root.start_time_unix_nano - SLACK_NS <= span.start_time_unix_nano
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= root.end_time_unix_nano + SLACK_NS
    by_name = {name: [s for s in phases if s.name == name] for name in {s.name for s in phases}}
    assert len(by_name["queue"]) == len(by_name["prefill"]) == 1
    assert by_name["queue"][0].end_time_unix_nano <= by_name["prefill"][0].start_time_unix_nano
    drawn = by_name["denoise"]
    assert len(drawn) == (3 if mode in ("mask_diffusion", "ar") else len(drawn)) > 1
    assert [value_of(span, "twotower.block") for span in drawn] == list(range(len(drawn)))
    assert sum(int(str(value_of(span, "twotower.tokens"))) for span in drawn) == 12
    for before, after in pairwise(drawn):
        assert before.end_time_unix_nano <= after.start_time_unix_nano + SLACK_NS
    assert by_name["prefill"][0].end_time_unix_nano <= drawn[0].start_time_unix_nano + SLACK_NS
    # The last block is committed to no tower; in ar none is read, and in verified and auto those
    # alone that the denoiser has drafted.
    drafted = sum(value_of(span, "twotower.nfe") != 0 for span in drawn)
    commits = {"verified": drafted, "auto": drafted, "ar": 0}.get(mode, len(drawn) - 1)
    assert len(by_name.get("commit", [])) == commits


async def test_what_is_sampled(fronts: Fronts) -> None:
    with traced(fronts, trace_sample_ratio=0.0) as (front, collector):
        await ask(front)
        await ask(front, "nonsense")
        await ask(front, UNTRACED)
        await ask(front, TRACED)
        sent(front)
    roots = [span for span in collector.spans if span.name == "completion"]
    assert [root.trace_id.hex() for root in roots] == [TRACE_ID]


async def test_without_a_parent_and_with_an_error(
    fronts: Fronts, monkeypatch: pytest.MonkeyPatch
) -> None:
    with traced(fronts) as (front, collector):

        async def broken(*_: object) -> None:
            raise ValueError("PRIVATE")

        await ask(front, n=2)
        monkeypatch.setattr(front.handle.context, "prefill", broken)
        await ask(front)
        sent(front)
    one, other, failed = (span for span in collector.spans if span.name == "completion")
    assert len({one.trace_id, other.trace_id, failed.trace_id}) == 3
    assert one.parent_span_id == other.parent_span_id == b""
    assert (failed.status.code, failed.status.message) == (Status.STATUS_CODE_ERROR, "INTERNAL")
    assert value_of(failed, "twotower.finish_reason") == "error"
    assert "PRIVATE" not in str(collector.spans)


def test_without_the_exporter_a_service_does_not_start(
    tiny_text: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporter, "find_spec", lambda _: None)
    config = ServiceConfig(model=str(tiny_text), otlp_endpoint="http://localhost:4318")
    with pytest.raises(ConfigError, match=r"otlp_endpoint: .* install twotower\[tracing\]"):
        build_app(config)
    monkeypatch.setattr(exporter, "find_spec", importlib.util.find_spec)
    build_app(config)


@pytest.mark.parametrize("given", ["localhost:4318", "ftp://x", "http://", "http://a b"])
def test_endpoints_that_are_none(given: str) -> None:
    with pytest.raises(ConfigError, match="otlp_endpoint"):
        ServiceConfig.from_settings({"otlp_endpoint": given})

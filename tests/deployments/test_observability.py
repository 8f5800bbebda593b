"""A service in real processes as its operator sees it: Prometheus and the shipped dashboard, a
collector of traces, JSON logs."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray

from tests.support.dashboard import expressions
from tests.support.otlp import Collector, collecting
from tests.support.pairs import await_true
from tests.support.prometheus import PROMETHEUS, Prometheus, scraping
from twotower.client import Client
from twotower.deployments.access.keys import ApiKey, new_key
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

MARKER = "MARKEDWORD"
MODES = ("mask_diffusion", "verified")
ASKED = {"prompt": f"def {MARKER}(): return", "max_tokens": 24, "block_size": 8, "ignore_eos": True}
# Every process hands its metrics over within this time, and a page of them is scraped.
SEEN_S = 30.0


@dataclass
class Observed:
    """A running service, its files, a key of an admin, the collector of its traces, and the tokens
    that it has given by mode."""

    service: LocalService
    folder: Path
    key: str
    collector: Collector
    http: httpx.Client
    tokens: Counter[str] = field(default_factory=Counter)

    def ask(self, **body: Any) -> None:
        """Has a prompt completed over HTTP."""
        mode = str(body["mode"])
        answer = self.http.post("/v1/completions", json={**ASKED, **body})
        assert answer.status_code == 200, answer.text
        self.tokens[mode] += answer.json()["usage"]["completion_tokens"]


@pytest.fixture(scope="module")
def observed(tiny_text: Path) -> Iterator[Observed]:
    # Short: sockets have their names in it.
    folder = Path(tempfile.mkdtemp(prefix="tt", dir="/tmp"))
    key, digest = new_key()
    with collecting() as collector:
        config = ServiceConfig(
            model=str(tiny_text),
            grpc_port=free_port(),
            http_port=free_port(),
            num_threads=1,
            health_check_period_s=1.0,
            api_keys=[ApiKey(name="operator", sha256=digest, admin=True)],
            log_format="json",
            otlp_endpoint=collector.address,
            trace_sample_ratio=1.0,
        )
        headers = {"authorization": f"Bearer {key}", "x-request-id": "observed-1"}
        url = f"http://127.0.0.1:{config.http_port}"
        with (
            LocalService(config, folder=folder) as running,
            httpx.Client(base_url=url, headers=headers, trust_env=False, timeout=60) as http,
        ):
            yield Observed(running, folder, key, collector, http)
    shutil.rmtree(folder, ignore_errors=True)


def filled_in(expression: str, job: str) -> str:
    """An expression as the dashboard asks it of everything."""
    found = expression.replace("$__rate_interval", "30s").replace("$job", job)
    return found.replace("$model", ".*").replace("$pair", ".*")


def missing(prometheus: Prometheus, job: str) -> list[str]:
    """Expressions of the dashboard that have no series."""
    asked = [each for _, each in expressions() if job == "twotower" or "node_up" not in each]
    return [each for each in asked if not prometheus.query(filled_in(each, job))]


@pytest.mark.skipif(PROMETHEUS is None, reason="needs Prometheus (Debian's package prometheus)")
def test_prometheus_has_every_series_of_the_dashboard(observed: Observed, tmp_path: Path) -> None:
    front = f"127.0.0.1:{observed.service.config.http_port}"
    agents = tmp_path / "agents.json"
    addresses = [
        f"{each['NodeManagerAddress']}:{each['MetricsExportPort']}" for each in ray.nodes()
    ]
    # As Ray's dashboard writes it, which this service does without.
    agents.write_text(json.dumps([{"labels": {"job": "ray"}, "targets": addresses}]))
    with scraping(tmp_path, front, observed.key, agents) as prometheus:
        deadline, left = time.monotonic() + SEEN_S, ["all"]
        while left and time.monotonic() < deadline:
            for mode in MODES:
                observed.ask(mode=mode)
            assert observed.http.post("/v1/completions", json={"prompt": []}).status_code == 400
            left = missing(prometheus, "twotower") + missing(prometheus, "twotower-nodes")
            time.sleep(0.5)
        assert left == []
        for job in ("twotower", "twotower-nodes"):
            for mode in MODES:
                counted = f'twotower_generation_tokens_total{{job="{job}", mode="{mode}"}}'
                given = observed.tokens[mode]
                await_true(
                    lambda asked=counted, given=given: prometheus.values(asked) == [given],
                    f"{counted} is not {given}",
                    timeout_s=SEEN_S,
                )
        [served] = prometheus.query(
            'twotower_num_requests_running{job="twotower", mode="verified"}'
        )
        assert served["metric"]["pair"] in {
            each["metric"]["pair"] for each in prometheus.query("twotower_rows")
        }
        moved = prometheus.values('twotower_state_transfer_bytes_total{job="twotower"}')
        assert len(moved) == 1
        assert moved[0] > 0
        assert prometheus.values('{__name__=~"ray_.*"}') == []


def test_the_log_names_requests_and_no_secrets(observed: Observed) -> None:
    observed.ask(mode="ar")
    with Client(observed.service.address, api_key=observed.key) as client:
        list(client.generate(f"{MARKER} by gRPC", max_tokens=8, request_id="observed-2"))

    def texts() -> dict[Path, str]:
        files = [path for path in observed.folder.rglob("*") if path.is_file()]
        return {path: path.read_text(encoding="utf-8", errors="replace") for path in files}

    def ended() -> list[dict[str, Any]]:
        lines = [line for text in texts().values() for line in text.splitlines()]
        found = [json.loads(line) for line in lines if '"completion request_id' in line]
        return [line for line in found if "observed-" in line["request_id"]]

    def both() -> bool:
        return {line["request_id"] for line in ended()} == {"observed-1", "observed-2"}

    await_true(both, "a completion has no line", timeout_s=10)
    by_grpc = next(line for line in ended() if line["request_id"] == "observed-2")
    assert (by_grpc["key"], by_grpc["code"], by_grpc["output_tokens"]) == ("operator", "OK", 8)
    assert by_grpc["replica"]
    for path, text in texts().items():
        for secret in (MARKER, observed.key):
            assert secret not in text, path


def test_the_collector_has_every_phase(observed: Observed) -> None:
    observed.ask(mode="mask_diffusion")
    phases = {"completion", "queue", "prefill", "transfer", "denoise", "commit"}
    await_true(
        lambda: {span.name for span in observed.collector.spans} == phases,
        "a phase is missing",
        timeout_s=20,
    )
    assert MARKER not in str(observed.collector.spans)

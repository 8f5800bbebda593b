"""Pipelines of Ray Data against a running service: its texts, Ray's own step, a killed caller, and
rows in flight."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import ray
from aiohttp import web
from ray.data import Dataset
from ray.data.llm import HttpRequestProcessorConfig, build_processor

from tests.data_pipeline.fake_service import FakeService, completion
from tests.support.processes import own_processes
from twotower import GenerationParams, Request, TwoTower
from twotower.data import completions
from twotower.data.bodies import checked_params, row_seed
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

HOW = GenerationParams(max_tokens=8, temperature=0.8)
ROWS = 200
CALLER = "ray::MapWorker(MapBatches(Completer))"


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    """The HTTP address of a service with the shipped model; Ray is that of the service."""
    config = ServiceConfig(
        grpc_port=free_port(), http_port=free_port(), cpus_per_tower=0.1, num_threads=1
    )
    with LocalService(config):
        ray.data.DataContext.get_current().enable_progress_bars = False
        yield f"127.0.0.1:{config.http_port}"


def prompt(number: int) -> str:
    return f"def step_{number}(path):\n"


def dataset(count: int = ROWS) -> Dataset:
    items = [{"id": number, "prompt": prompt(number)} for number in range(count)]
    return ray.data.from_items(items, override_num_blocks=4)


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """The texts of all rows, in process."""
    model = TwoTower.from_pretrained()
    requests = [
        Request(prompt(number), replace(HOW, seed=row_seed(5, str(number))))
        for number in range(ROWS)
    ]
    return [result.text for result in model.generate_requests(requests)]


def complete(target: str, callers: int, count: int = ROWS) -> Dataset:
    return completions(
        dataset(count),
        target=target,
        params=HOW,
        id_column="id",
        seed=5,
        concurrency=8,
        callers=callers,
        include=["completion_tokens", "nfe"],
    )


def texts(rows: list[dict[str, Any]]) -> list[str]:
    """In the order of ids, of which each is there once."""
    rows.sort(key=lambda row: row["id"])
    assert [row["id"] for row in rows] == list(range(len(rows)))
    assert all(row["prompt"] == prompt(row["id"]) for row in rows)
    return [row["text"] for row in rows]


def test_two_callers_give_what_the_model_gives_in_process(target: str, expected: list[str]) -> None:
    began = time.monotonic()
    rows = complete(target, 2).take_all()
    print(f"{ROWS} rows in {time.monotonic() - began:.1f} s")
    assert texts(rows) == expected
    assert all(1 <= row["completion_tokens"] <= 8 and row["nfe"] >= 1 for row in rows)
    assert len(set(expected)) > ROWS / 2


def test_a_killed_caller_loses_no_row_and_gives_none_twice(
    target: str, expected: list[str]
) -> None:
    """Ray starts it anew and does what it had not handed over once more."""
    rows, killed = [], []
    for row in complete(target, 1, 100).iter_rows():
        rows.append(row)
        if not killed and len(rows) >= 20:
            killed = own_processes(CALLER)
            assert len(killed) == 1
            os.kill(killed[0], signal.SIGKILL)
    assert killed
    assert texts(rows) == expected[:100]


def test_rays_own_http_step_gives_the_same_texts(target: str, expected: list[str]) -> None:
    config = HttpRequestProcessorConfig(
        url=f"http://{target}/v1/completions",
        batch_size=10,
        concurrency=1,
        max_retries=2,
        http_request_stage={"num_cpus": 0.1},
    )

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        seed = row_seed(5, str(row["id"]))
        body = {"model": "pystdlib", "prompt": row["prompt"], "seed": seed, **checked_params(HOW)}
        return {"payload": body, "id": row["id"], "prompt": row["prompt"]}

    def read(row: dict[str, Any]) -> dict[str, Any]:
        text = row["http_response"]["choices"][0]["text"]
        return {"id": row["id"], "prompt": row["prompt"], "text": text}

    processor = build_processor(config, preprocess=ask, postprocess=read)
    began = time.monotonic()
    rows = processor(dataset(40)).take_all()
    print(f"40 rows in {time.monotonic() - began:.1f} s")
    assert texts(rows) == expected[:40]


def test_a_row_at_fault_ends_the_pipeline_and_is_named(target: str) -> None:
    rows = ray.data.from_items([{"id": 7, "prompt": ""}])
    failing = completions(rows, target=target, id_column="id", concurrency=1, callers=1)
    with pytest.raises(ray.exceptions.RayTaskError, match="RowFailedError: row 7: status 400: "):
        failing.take_all()


class Timed:
    """Answers after exponential times; sums up how many rows were there at a time."""

    def __init__(self, rows: int, concurrency: int, mean_s: float) -> None:
        self._rows, self._concurrency, self._mean_s = rows, concurrency, mean_s
        self._draw = random.Random(7)
        self._since = 0.0
        self._held = self._seconds = 0.0
        self.service = FakeService(self.reply)

    async def reply(self, _: dict[str, Any]) -> web.StreamResponse:
        self._mark()
        await asyncio.sleep(self._draw.expovariate(1.0 / self._mean_s))
        self._mark()
        return completion("done")

    def mean(self) -> float:
        """Rows at a time, from when places may be full until the last row is sent."""
        return self._held / self._seconds

    def _mark(self) -> None:
        now, sent = time.monotonic(), len(self.service.bodies)
        if 2 * self._concurrency < sent < self._rows:
            self._held += self.service.in_flight * (now - self._since)
            self._seconds += now - self._since
        self._since = now


@contextmanager
def in_a_thread(service: FakeService) -> Iterator[None]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        asyncio.run_coroutine_threadsafe(service.start(), loop).result(timeout=10)
        yield
        asyncio.run_coroutine_threadsafe(service.stop(), loop).result(timeout=10)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@pytest.mark.usefixtures("target")
@pytest.mark.slow
def test_places_are_taken_all_the_time() -> None:
    timed = Timed(rows=ROWS, concurrency=16, mean_s=0.8)
    with in_a_thread(timed.service):
        rows = completions(
            dataset(), target=timed.service.target, concurrency=16, callers=1
        ).take_all()
    assert len(texts(rows)) == ROWS
    print(f"{timed.mean():.1f} rows of 16 in flight, at most {timed.service.most}")
    assert timed.service.most == 16
    assert timed.mean() >= 0.9 * 16

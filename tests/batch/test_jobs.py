"""Whole jobs against a running service: outputs, interruptions, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow.parquet
import pytest

from tests.support.processes import own_processes
from twotower import GenerationParams, Request, TwoTower
from twotower.batch import BatchDefaults, JobOptions, run_job
from twotower.batch.join import count_rows
from twotower.batch.journal import JobPlaces
from twotower.batch.service import SPARE_CPUS
from twotower.data.bodies import row_seed
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port
from twotower.towers.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

BODY = {"max_tokens": 8, "temperature": 0.8, "ignore_eos": True}
ROWS = 320
CALLER = "ray::MapWorker(MapBatches(Completer))"
PAIR = "ray::ServeReplica:twotower:TowerPair"


@pytest.fixture(scope="module")
def service() -> Iterator[LocalService]:
    config = ServiceConfig(
        grpc_port=free_port(), http_port=free_port(), num_threads=1, cpus_per_tower=0.1
    )
    with LocalService(config, spare_cpus=SPARE_CPUS) as running:
        yield running


@pytest.fixture(scope="module")
def target(service: LocalService) -> str:
    return f"http://127.0.0.1:{service.config.http_port}"


def prompt(number: int) -> str:
    return f"def step_{number}(path):\n"


def write_rows(path: Path, rows: int = ROWS, **more: Any) -> None:
    lines = [json.dumps({"id": f"n{i}", "prompt": prompt(i), **more}) for i in range(rows)]
    path.write_text("\n".join(lines), encoding="utf-8")


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """The text of every row in process, by its id."""
    how = {name: value for name, value in BODY.items() if name != "ignore_eos"}
    ids = [f"n{i}" for i in range(ROWS)]
    requests = [
        Request(prompt(i), GenerationParams(**how, seed=row_seed(3, own)))  # type: ignore[arg-type]
        for i, own in enumerate(ids)
    ]
    results = TwoTower.from_pretrained().generate_requests(requests)
    return {own: result.text for own, result in zip(ids, results, strict=True)}


def options(folder: Path, target: str, **changes: Any) -> JobOptions:
    settings = {
        "inputs": (str(folder / "in.jsonl"),),
        "output": str(folder / "out.jsonl"),
        "defaults": BatchDefaults(body=BODY, seed=3),
        "targets": (target,),
        "concurrency": 16,
    }
    return JobOptions(**{**settings, **changes})


def texts(path: Path) -> dict[str, str]:
    """Texts by id; no id is there twice."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    found = {line["custom_id"]: line["text"] for line in lines}
    assert len(found) == len(lines)
    return found


def tokens_written(target: str) -> int:
    stats = httpx.get(f"{target}/admin/stats", timeout=30).json()
    return int(stats["router"]["generation_tokens_total"])


def test_rows_come_in_order_with_the_texts_that_they_have_in_process(
    tmp_path: Path, target: str, expected: dict[str, str]
) -> None:
    write_rows(tmp_path / "in.jsonl", 60, source="a.py")
    seen: list[int] = []
    summary = run_job(options(tmp_path, target, ordered=True), lambda now: seen.append(now.done))
    found = texts(tmp_path / "out.jsonl")
    assert list(found.items()) == list(expected.items())[:60]
    assert (summary.rows, summary.completed, summary.errors) == (60, 60, 0)
    assert (summary.counts.tokens, seen[-1]) == (480, 60)
    assert seen == sorted(seen)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first["source"] == "a.py"
    # It is done, and says so at once; with other parameters it would be another job.
    assert run_job(options(tmp_path, target)).counts.tokens == 0
    other = options(
        tmp_path, target, defaults=BatchDefaults(body={**BODY, "max_tokens": 9}, seed=3)
    )
    with pytest.raises(ConfigError, match=r"parameters\.max_tokens was 8 and is 9"):
        run_job(other)


def test_csv_to_parquet_in_a_folder_and_failed_rows_again(
    tmp_path: Path, target: str, expected: dict[str, str]
) -> None:
    rows = [f'n{i},"{prompt(i)}"' for i in range(20)]
    source = tmp_path / "in.csv"
    # The service refuses what is longer than its context.
    source.write_text("\n".join(["id,prompt", *rows, f'n20,"{"x = 1;" * 9000}"', "n21,"]))
    job = options(tmp_path, target, inputs=(str(source),), output=str(tmp_path / "out"))
    job = JobOptions(**{**vars(job), "format": "parquet"})
    summary = run_job(job)
    assert (summary.completed, summary.errors) == (20, 2)
    tables = [pyarrow.parquet.read_table(path) for path in (tmp_path / "out").glob("*.parquet")]
    found = {row["custom_id"]: row["text"] for table in tables for row in table.to_pylist()}
    assert found == {f"n{i}": expected[f"n{i}"] for i in range(20)}
    errors = [
        json.loads(line)
        for path in (tmp_path / "out").glob("*.errors.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert {own["custom_id"]: own["error"]["param"] for own in errors} == dict.fromkeys(
        ("n20", "n21"), "prompt"
    )
    again = run_job(JobOptions(**{**vars(job), "retry_errors": True}))
    assert (again.completed, again.errors, again.counts.done - again.counts.before) == (20, 2, 2)
    assert again.counts.tokens == 0


class Job:
    """`twotower batch` as a process of its own, with a Ray of its own."""

    def __init__(self, folder: Path, target: str) -> None:
        fields = [
            word
            for name, value in BODY.items()
            for word in ("--param", f"{name}={json.dumps(value)}")
        ]
        self._log = (folder / "log").open("a")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "twotower.cli", "batch"),
                *(str(folder / "in.jsonl"), str(folder / "out.jsonl")),
                *("--target", target, "--seed", "3", "--concurrency", "16", *fields),
            ],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._places = JobPlaces.of(str(folder / "out.jsonl"), None)

    def await_rows(self, rows: int) -> None:
        deadline = time.monotonic() + 120
        while sum(count_rows(self._places.parts, self._places.checkpoints)) < rows:
            assert self.process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def end(self, signal_number: int) -> int:
        self.process.send_signal(signal_number)
        self.process.wait(60)
        self._log.close()
        return self.process.returncode

    def summary(self) -> dict[str, Any]:
        stdout, _ = self.process.communicate(timeout=300)
        self._log.close()
        assert self.process.returncode == 0
        found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return found


def kill(pids: Sequence[int]) -> None:
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def test_what_is_killed_goes_on_with_every_row_once(
    tmp_path: Path, target: str, expected: dict[str, str]
) -> None:
    """The driver twice, by SIGKILL and by Ctrl-C; then a caller and the service's only pair."""
    write_rows(tmp_path / "in.jsonl")
    before = tokens_written(target)
    first = Job(tmp_path, target)
    first.await_rows(60)
    first.end(signal.SIGKILL)
    second = Job(tmp_path, target)
    second.await_rows(120)
    assert second.end(signal.SIGINT) == 130, (tmp_path / "log").read_text()
    third = Job(tmp_path, target)
    third.await_rows(180)
    kill(own_processes(CALLER))
    third.await_rows(240)
    kill(own_processes(PAIR))
    summary = third.summary()
    assert texts(tmp_path / "out.jsonl") == expected
    assert (summary["completed"], summary["errors"]) == (ROWS, 0)
    # What was in flight, or not committed yet, is done again: 32 rows a loss at most.
    assert tokens_written(target) - before <= 8 * (ROWS + 3 * 48)

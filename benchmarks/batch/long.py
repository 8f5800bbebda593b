"""A long batch job that is killed twice: every row once, and memory that stays.

    python -m benchmarks.batch.long [--rows 100000] [--tokens 8] [--minutes 90] [--kills 2]

Rows of the shipped model, greedy `ar` if `--mode` says nothing else, against a service that goes
on running, so that its counters say what all runs of the job took together. The job's driver is
killed with SIGKILL whenever an equal share of the rows is done, and started again with the same
command. If the rows would take longer than `--minutes` by the rate of the first ones, fewer are
run, and their number is printed. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.batch.inputs import ids_of, write_requests
from benchmarks.batch.processes import JobProcess, Memory
from benchmarks.machine import machine
from twotower.batch.join import count_rows
from twotower.batch.journal import JobPlaces
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

PROBE_ROWS = 1000
WATCH_S = 0.5
FIELDS = {"temperature": 0, "ignore_eos": True}


def main() -> None:
    """Parses the arguments, runs the job, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--mode", default="ar")
    parser.add_argument("--minutes", type=float, default=90.0)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--folder", type=Path)
    args = parser.parse_args()
    config = ServiceConfig(
        model=args.model,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=32,
        max_context=512,
    )
    with LocalService(config), tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(measure(folder, config.http_port, args), indent=2))


def measure(folder: Path, port: int, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of the run."""
    body = {"max_tokens": args.tokens, "mode": args.mode, **FIELDS}
    target = f"http://127.0.0.1:{port}"
    options = ["--target", target, "--concurrency", str(args.concurrency)]
    log = folder / "job.log"
    write_requests(folder / "probe.jsonl", PROBE_ROWS, **body)
    probe = JobProcess(
        [str(folder / "probe.jsonl"), str(folder / "probe-out.jsonl"), *options], log
    )
    rate = PROBE_ROWS / float(probe.summary()["seconds"])
    rows = min(args.rows, int(rate * args.minutes * 60))
    write_requests(folder / "in.jsonl", rows, **body)
    before, memory = tokens_written(target), Memory()
    command = [str(folder / "in.jsonl"), str(folder / "out.jsonl"), *options]
    began, killed = time.monotonic(), []
    for kill in range(args.kills):
        job = JobProcess(command, log)
        await_rows(job, folder / "out.jsonl", rows * (kill + 1) // (args.kills + 1))
        job.kill()
        killed.append(round(time.monotonic() - began, 1))
    job = JobProcess(command, log)
    job.watch(float("inf"), memory)
    summary = job.summary()
    ids = ids_of(folder / "out.jsonl")
    return {
        "machine": machine(1),
        "rows": rows,
        "rows_wanted": args.rows,
        "tokens_a_row": args.tokens,
        "seconds": round(time.monotonic() - began, 1),
        "killed_after_s": killed,
        "distinct_ids": len(set(ids)),
        "lines": len(ids),
        "tokens_over_undisturbed": round(
            (tokens_written(target) - before) / (rows * args.tokens), 4
        ),
        "memory_mib": {
            kind: {"most": memory.most(kind), "second_half_over_first": memory.growth(kind)}
            for kind in memory.kinds()
        },
        "summary": summary,
    }


def await_rows(job: JobProcess, output: Path, rows: int) -> None:
    """Waits until so many rows are committed. Raises RuntimeError if the job ends before."""
    places = JobPlaces.of(str(output), None)
    while sum(count_rows(places.parts, places.checkpoints)) < rows:
        if job.process.poll() is not None:
            raise RuntimeError("the job ended before it was killed")
        time.sleep(WATCH_S)


def tokens_written(target: str) -> float:
    """Tokens that the service has committed."""
    stats = httpx.get(f"{target}/admin/stats", timeout=30).json()
    return float(stats["router"]["generation_tokens_total"])


if __name__ == "__main__":
    main()

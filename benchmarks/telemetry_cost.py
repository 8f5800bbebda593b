"""What metrics, traces and log lines cost: tokens a second with and without them.

Rows of the shipped model run through a router's completions and a pair in this process, whose only
busy thread every microsecond of telemetry is taken from. Metrics go to Ray, traces to a collector
in another process, and each run ends when all was sent. Seconds are those of this process's threads
on the CPU, so that other work on the machine does not count. Runs with and without alternate; the
figure is the median of the ratios of neighbours.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import ray

from benchmarks.machine import machine
from tests.support.pair_here import HandleHere
from twotower.deployments.completions.completions import Completions
from twotower.deployments.completions.requests import CompletionRequest
from twotower.deployments.config import ServiceConfig
from twotower.deployments.telemetry.logs import LOGGER
from twotower.deployments.telemetry.record import CompletionRecord, Origin, Recorder
from twotower.deployments.telemetry.tracing import Tracing
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.services import Block
from twotower.towers.request.modes import Mode
from twotower.towers.request.params import GenerationParams

PROMPT = list(range(10, 42))


class NoRecord(CompletionRecord):
    """Records nothing."""

    def __enter__(self) -> NoRecord:
        return self

    def committed(self, block: Block) -> None:
        """Does nothing."""

    def served_by(self, pair: str) -> None:
        """Does nothing."""

    def __exit__(self, *_: object) -> None:
        """Does nothing."""


class NoRecorder(Recorder):
    """Gives records that record nothing."""

    def completion(self, origin: Origin, mode: str, log: CommitLog) -> NoRecord:
        """Such a record."""
        return NoRecord(self, origin, mode, log)


def collect(address: Connection) -> None:
    """Takes traces and drops them; tells its port first."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    address.send(server.server_port)
    server.serve_forever()


@contextmanager
def collector() -> Iterator[str]:
    """The endpoint of a collector in a process of its own."""
    # Not forked: Ray has threads here.
    spawning = multiprocessing.get_context("spawn")
    ours, theirs = spawning.Pipe()
    process = spawning.Process(target=collect, args=(theirs,), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


async def tokens_per_second(service: Completions, mode: Mode, rows: int, tokens: int) -> float:
    """Output tokens of that many rows at once, by seconds of the CPU."""

    async def one(index: int) -> None:
        params = GenerationParams(max_tokens=tokens, mode=mode, seed=index)
        request = CompletionRequest(f"row-{index}", [*PROMPT, 50 + index], params)
        for completion in await service.admit(request):
            async for _ in completion.blocks():
                pass

    begin = time.process_time()
    await asyncio.gather(*(one(index) for index in range(rows)))
    if isinstance(service.recorder.traces, Tracing):
        service.recorder.traces.flush()
    return rows * tokens / (time.process_time() - begin)


async def compare(args: argparse.Namespace, endpoint: str) -> None:
    """Prints the table."""
    folder = resolve_checkpoint(args.model)
    handle = HandleHere(folder, max_num_seqs=args.rows, max_context=1024)
    config = ServiceConfig(model=args.model, otlp_endpoint=endpoint, trace_sample_ratio=args.traced)
    service = Completions(config, handle)
    kept = service.recorder
    none = NoRecorder(kept.metrics, kept.code_of)
    print("| mode | with, tokens per CPU second | without | ratio | worst and best pair of runs |")
    print("|---|---|---|---|---|")
    for mode in args.modes:
        await tokens_per_second(service, mode, args.rows, args.tokens)
        runs: dict[Recorder, list[float]] = {kept: [], none: []}
        for turn in range(args.runs):
            # In turns, so that neither always has the warmer machine.
            for recorder in (kept, none) if turn % 2 else (none, kept):
                service.recorder = recorder
                runs[recorder].append(
                    await tokens_per_second(service, mode, args.rows, args.tokens)
                )
        ratios = [a / b for a, b in zip(runs[kept], runs[none], strict=True)]
        on, off = statistics.median(runs[kept]), statistics.median(runs[none])
        spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
        print(f"| {mode} | {on:.0f} | {off:.0f} | {statistics.median(ratios):.3f} | {spread} |")
    if isinstance(kept.traces, Tracing):
        kept.traces.close()


def main() -> None:
    """Prints tokens a second with and without telemetry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder or hub id; by default the shipped model")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--traced", type=float, default=1.0, help="share of requests")
    parser.add_argument("--modes", nargs="+", default=["mask_diffusion", "ar"])
    args = parser.parse_args()
    print(machine(1))
    with tempfile.TemporaryDirectory(prefix="tt", dir="/tmp") as folder, collector() as endpoint:
        ray.init(
            address="local",
            num_cpus=1,
            include_dashboard=False,
            object_store_memory=100 << 20,
            logging_level=logging.ERROR,
            log_to_driver=False,
            _temp_dir=folder,
        )
        # Lines are written as a replica writes them: to a file.
        log = logging.getLogger(LOGGER)
        log.handlers[:] = [logging.FileHandler(Path(folder) / "serve.log")]
        log.setLevel(logging.INFO)
        asyncio.run(compare(args, endpoint))
        ray.shutdown()


if __name__ == "__main__":
    main()

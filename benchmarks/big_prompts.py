"""Block latency of streams beside prompts of megabytes, which cannot fit and are refused.

    python -m benchmarks.big_prompts [--model DIR] [--rows 4] [--tokens 512] [--requests 10]
                                     [--megabytes 3.9] [--max-context 1024]
                                     [--message-bytes N] [--repeats 5]

A round is a number of streams; in every other round, when each of them has a few blocks, another
process sends so many prompts of so many megabytes at once. Latencies are those between two blocks
of a stream from then on, and from the same block on in the rounds without, pooled over all rounds.
A health check runs all the time. Messages of 3.9 MB end at the proxy; `--message-bytes 4194304`
lets them through to the router, which refuses the prompt unread; `--max-context 4096 --megabytes
0.16` are prompts that the tokenizer has to read. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks.figures import median, percentile
from benchmarks.machine import machine
from benchmarks.prompts import held_out_prompts
from benchmarks.service import MAX_CONTEXT, SERVICE_THREADS, service_config
from twotower.client import Client, ServiceError
from twotower.deployments.router.router import SERVICE_NAME
from twotower.deployments.server.server import LocalService
from twotower.towers.training.corpus import read_corpus, standard_library

# Blocks that each stream has before the big prompts come.
BEFORE = 4
CHECK_EVERY_S = 0.05


@dataclass(frozen=True)
class Round:
    """Latencies of blocks and of health checks in ms, statuses of the big prompts, and the seconds
    until all of them were answered."""

    block_ms: tuple[float, ...]
    health_ms: tuple[float, ...]
    statuses: tuple[str, ...] = ()
    seconds: float = 0.0


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--rows", type=int, default=4, help="streams")
    parser.add_argument("--tokens", type=int, default=512, help="of each stream")
    parser.add_argument("--requests", type=int, default=10, help="big prompts at once")
    parser.add_argument("--megabytes", type=float, default=3.9, help="of a big prompt")
    parser.add_argument("--max-context", type=int, default=MAX_CONTEXT)
    parser.add_argument("--message-bytes", type=int, help="longest message that is taken")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--send-to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.send_to is not None:
        send_when_told(args)
        return
    prompts = held_out_prompts(read_corpus(standard_library()), args.rows)
    texts = [prompt.text for prompt in prompts]
    limits = {"max_context": args.max_context, "max_message_bytes": args.message_bytes}
    config = service_config(args.model, args.rows).model_copy(update=limits)
    with (
        LocalService(config) as service,
        Client(service.address) as client,
        sender(service.address, args) as sending,
    ):
        print(json.dumps(measure(client, service.address, sending, texts, args), indent=2))


def measure(
    client: Client,
    address: str,
    sending: subprocess.Popen[str],
    prompts: Sequence[str],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """All figures of one run."""
    one_round(client, address, None, prompts, args)
    rounds: dict[bool, list[Round]] = {False: [], True: []}
    for _ in range(args.repeats):
        for beside in (False, True):
            told = sending if beside else None
            rounds[beside].append(one_round(client, address, told, prompts, args))
    with_p99, without_p99 = (
        percentile((ms for each in rounds[beside] for ms in each.block_ms), 99)
        for beside in (True, False)
    )
    return {
        "machine": machine(SERVICE_THREADS),
        "streams": args.rows,
        "tokens": args.tokens,
        "big_prompts": args.requests,
        "megabytes": args.megabytes,
        "max_context": args.max_context,
        "answers": dict(Counter(status for each in rounds[True] for status in each.statuses)),
        "seconds_to_answer_all": median(each.seconds for each in rounds[True]),
        "without": figures(rounds[False]),
        "beside": figures(rounds[True]),
        "p99_beside_over_without": round(with_p99 / without_p99, 3),
    }


def figures(rounds: Sequence[Round]) -> dict[str, float]:
    """Percentiles of the latencies of all rounds together."""
    block = [ms for each in rounds for ms in each.block_ms]
    health = [ms for each in rounds for ms in each.health_ms]
    return {
        "blocks": len(block),
        "block_p50_ms": percentile(block, 50),
        "block_p99_ms": percentile(block, 99),
        "block_max_ms": percentile(block, 100),
        "health_p50_ms": percentile(health, 50),
        "health_max_ms": percentile(health, 100),
    }


def one_round(
    client: Client,
    address: str,
    sending: subprocess.Popen[str] | None,
    prompts: Sequence[str],
    args: argparse.Namespace,
) -> Round:
    """Reads all streams to their end; tells `sending` when each of them has its first blocks."""
    begun = threading.Barrier(args.rows + 1)

    def read(text: str) -> list[float]:
        arrivals = []
        for block in client.generate(text, max_tokens=args.tokens, ignore_eos=True):
            arrivals += [time.monotonic()] if block.token_ids else []
            if len(arrivals) == BEFORE:
                begun.wait()
        later = arrivals[BEFORE - 1 :]
        return [1e3 * (b - a) for a, b in pairwise(later)]

    answer: dict[str, Any] = {"statuses": [], "seconds": 0.0}
    with ThreadPoolExecutor(args.rows) as pool, checked(address) as health_ms:
        streams = [pool.submit(read, text) for text in prompts]
        begun.wait()
        health_ms.clear()
        if sending is not None:
            assert sending.stdin is not None
            assert sending.stdout is not None
            sending.stdin.write("now\n")
            sending.stdin.flush()
            answer = json.loads(sending.stdout.readline())
        latencies = [ms for stream in streams for ms in stream.result()]
    statuses = tuple(answer["statuses"])
    return Round(tuple(latencies), tuple(health_ms), statuses, answer["seconds"])


@contextmanager
def checked(address: str) -> Iterator[list[float]]:
    """Latencies in ms of health checks, which run as long as the `with` block."""
    latencies: list[float] = []
    over = threading.Event()

    def check() -> None:
        with grpc.insecure_channel(address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            while not over.wait(CHECK_EVERY_S):
                began = time.monotonic()
                stub.Check(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=600)
                latencies.append(1e3 * (time.monotonic() - began))

    checking = threading.Thread(target=check)
    checking.start()
    try:
        yield latencies
    finally:
        over.set()
        checking.join()


@contextmanager
def sender(address: str, args: argparse.Namespace) -> Iterator[subprocess.Popen[str]]:
    """This program in another process, which sends big prompts for each line of its stdin."""
    options = ["--requests", str(args.requests), "--megabytes", str(args.megabytes)]
    command = [sys.executable, "-m", "benchmarks.big_prompts", "--send-to", address, *options]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        # Its first line says that it is ready.
        process.stdout.readline()
        try:
            yield process
        finally:
            process.terminate()


def send_when_told(args: argparse.Namespace) -> None:
    """Sends the prompts at once for each line of stdin, and prints their statuses."""
    prompt = "a" * int(args.megabytes * 1e6)
    with Client(args.send_to) as client, ThreadPoolExecutor(args.requests) as pool:

        def ask(_: int) -> str:
            try:
                for _ in client.generate(prompt, resume=False):
                    pass
            except ServiceError as error:
                return f"{error.code.name}: {error.details}"
            return "OK"

        client.model_info()
        print("ready", flush=True)
        for _ in sys.stdin:
            began = time.monotonic()
            statuses = list(pool.map(ask, range(args.requests)))
            answer = {"statuses": statuses, "seconds": time.monotonic() - began}
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

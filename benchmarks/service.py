"""The service against the same model in process, and the overhead of the service per block.

    python -m benchmarks.service [--model DIR] [--repeats 7] [--tokens 96]

One request at a time over gRPC against the best in-process configuration with as many threads;
runs alternate, ratios are medians of pairs. Overhead per block is the latency of a block less
the time of its passes in both towers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from ray import serve

from benchmarks.demo import PROMPT
from benchmarks.figures import median
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from twotower.client import Client
from twotower.deployments.app import PAIR_DEPLOYMENT
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

THREADS_PER_TOWER = 1
# Both towers of a pair; they take turns while a single request runs.
SERVICE_THREADS = 2 * THREADS_PER_TOWER
MAX_CONTEXT = 1024


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    local = load_local(args.model, 1, MAX_CONTEXT)
    with (
        LocalService(service_config(args.model, 1)) as service,
        Client(service.address) as client,
    ):
        print(json.dumps(measure(client, local, args), indent=2))


def service_config(model: str | None, rows: int) -> ServiceConfig:
    """A service of one pair without a prefix cache: a prompt's second run costs as its first."""
    return ServiceConfig(
        model=model,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=THREADS_PER_TOWER,
        max_num_seqs=rows,
        max_context=MAX_CONTEXT,
        prefix_cache_mib=0,
    )


def measure(client: Client, local: Local, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    over_grpc(client, 32)
    in_process(local, 1, 32)
    rounds = []
    for _ in range(args.repeats):
        served = over_grpc(client, args.tokens)
        alone = {n: in_process(local, n, args.tokens) for n in range(1, SERVICE_THREADS + 1)}
        rounds.append((served, alone))
    return {
        "machine": machine(SERVICE_THREADS),
        "tokens": args.tokens,
        "service_tokens_per_s": median(served["tokens_per_s"] for served, _ in rounds),
        "in_process_tokens_per_s": {
            n: median(alone[n] for _, alone in rounds) for n in rounds[0][1]
        },
        "service_over_in_process": median(
            served["tokens_per_s"] / max(alone.values()) for served, alone in rounds
        ),
        "block_ms": median(served["block_ms"] for served, _ in rounds),
        "pass_ms_per_block": median(served["pass_ms"] for served, _ in rounds),
        "overhead_ms_per_block": median(
            served["block_ms"] - served["pass_ms"] for served, _ in rounds
        ),
    }


def over_grpc(client: Client, tokens: int) -> dict[str, float]:
    """One stream: tokens/s, latency per block, and seconds in passes of both towers per block."""
    before = pass_seconds()
    started = time.perf_counter()
    blocks = list(client.generate(PROMPT, max_tokens=tokens, ignore_eos=True))
    seconds = time.perf_counter() - started
    count = sum(1 for block in blocks if block.token_ids)
    return {
        "tokens_per_s": tokens / seconds,
        "block_ms": 1e3 * seconds / count,
        "pass_ms": 1e3 * (pass_seconds() - before) / count,
    }


def in_process(local: Local, threads: int, tokens: int) -> float:
    """Tokens/s of the same request in this process."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    local.model.generate([PROMPT], max_tokens=tokens)
    return tokens / (time.perf_counter() - started)


def pass_seconds() -> float:
    """Seconds that both towers have spent in passes."""
    return sum(tower["pass_seconds"] for tower in pair_stats().values())


def pair_stats() -> dict[str, dict[str, float]]:
    """Counters of each tower of the running service, by tower."""
    handle = serve.get_deployment_handle(PAIR_DEPLOYMENT, APP_NAME)
    stats: dict[str, dict[str, float]] = handle.stats.remote().result()
    return stats


if __name__ == "__main__":
    main()

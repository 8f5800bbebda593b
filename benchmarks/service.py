"""The service against the same model in process, and what the service adds to a block.

    python -m benchmarks.service [--model DIR] [--prompts 6] [--tokens 96]

One request at a time over gRPC against the best in-process configuration with as many threads;
runs alternate, ratios are medians of pairs. Overhead per block is the latency of a block less
the time of its passes in both towers. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from ray import serve

from benchmarks.demo import PROMPT
from twotower import TwoTower
from twotower.client import Client
from twotower.deployments.app import PAIR_DEPLOYMENT
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.server import LocalService, free_port

THREADS_PER_TOWER = 1
# Both towers of a pair; they take turns while a single request runs.
SERVICE_THREADS = 2 * THREADS_PER_TOWER


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=96)
    args = parser.parse_args()
    config = ServiceConfig(
        model=args.model,
        grpc_port=free_port(),
        http_port=free_port(),
        threads_per_tower=THREADS_PER_TOWER,
    )
    model = TwoTower.from_pretrained(args.model)
    with LocalService(config) as service, Client(service.address) as client:
        print(json.dumps(measure(client, model, args), indent=2))


def measure(client: Client, model: TwoTower, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    over_grpc(client, 32)
    in_process(model, 1, 32)
    rounds = []
    for _ in range(args.repeats):
        served = over_grpc(client, args.tokens)
        local = {n: in_process(model, n, args.tokens) for n in range(1, SERVICE_THREADS + 1)}
        rounds.append((served, local))
    best = max(local[n] for _, local in rounds for n in local)
    return {
        "threads": {"service": SERVICE_THREADS, "torch": torch.__version__},
        "tokens": args.tokens,
        "service_tokens_per_s": median(served["tokens_per_s"] for served, _ in rounds),
        "in_process_tokens_per_s": {
            n: median(local[n] for _, local in rounds) for n in rounds[0][1]
        },
        "in_process_best": round(best, 1),
        "service_over_in_process": median(
            served["tokens_per_s"] / max(local.values()) for served, local in rounds
        ),
        "block_ms": median(served["block_ms"] for served, _ in rounds),
        "pass_ms_per_block": median(served["pass_ms"] for served, _ in rounds),
        "overhead_ms_per_block": median(
            served["block_ms"] - served["pass_ms"] for served, _ in rounds
        ),
    }


def over_grpc(client: Client, tokens: int) -> dict[str, float]:
    """One stream: tokens/s, latency per block and the towers' own time per block."""
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


def in_process(model: TwoTower, threads: int, tokens: int) -> float:
    """Tokens/s of the same request in this process."""
    torch.set_num_threads(threads)
    started = time.perf_counter()
    model.generate([PROMPT], max_tokens=tokens)
    return tokens / (time.perf_counter() - started)


def pass_seconds() -> float:
    """Seconds that both towers have spent in passes."""
    handle = serve.get_deployment_handle(PAIR_DEPLOYMENT, APP_NAME)
    stats = handle.stats.remote().result()
    return sum(tower["pass_seconds"] for tower in stats.values())


def median(values: Any) -> float:
    """Rounded median."""
    return round(statistics.median(values), 3)


if __name__ == "__main__":
    main()

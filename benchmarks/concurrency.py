"""Many requests at once over gRPC against one at a time, and against the same rows in process.

    python -m benchmarks.concurrency [--model DIR] [--rows 16] [--tokens 96] [--repeats 5]

Distinct held-out prompts in mask_diffusion, greedy. In process the same requests run with one and
with two threads, and with a thread per tower; the service's two towers have a thread each. Runs
alternate, ratios are medians of rounds, latencies are pooled over all rounds. Router, replica, both
towers and the client, a thread per request, share the machine; the prefix cache is off. Prints one
JSON object.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from benchmarks.figures import median, percentile
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from benchmarks.prompts import held_out_prompts
from benchmarks.service import MAX_CONTEXT, SERVICE_THREADS, pair_stats, service_config
from twotower import Request
from twotower.client import Client
from twotower.deployments.server.server import LocalService
from twotower.towers.request.params import GenerationParams
from twotower.towers.training.corpus import read_corpus, standard_library

TOWERS = ("context", "denoiser")
Stats = Mapping[str, Mapping[str, float]]
Round = dict[str, "Window"]
# Ways to run requests in process, by name: a model with its engines, and the threads of a pass.
Ways = Mapping[str, tuple[Local, int]]


@dataclass(frozen=True)
class Stream:
    """A request's output, and the times at which it was sent and each block came, in seconds."""

    sent: float
    arrivals: tuple[float, ...]
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Window:
    """A run of all requests: its seconds, the client's processor time, and the towers' counters
    before and after. Streams have arrivals over gRPC only.
    """

    streams: tuple[Stream, ...]
    seconds: float
    client_seconds: float
    before: Stats
    after: Stats

    @property
    def tokens_per_s(self) -> float:
        return sum(len(stream.token_ids) for stream in self.streams) / self.seconds

    def grown(self, tower: str, counter: str) -> float:
        """The growth of a tower's counter."""
        return self.after[tower][counter] - self.before[tower][counter]


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--rows", type=int, default=16, help="requests at once")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    plain = load_local(args.model, args.rows, MAX_CONTEXT)
    threaded = load_local(args.model, args.rows, MAX_CONTEXT, threaded=True)
    # A worker thread keeps the number of threads that holds at its first pass, so this is first.
    ways = {
        "thread_per_tower": (threaded, 1),
        "1_thread": (plain, 1),
        "2_threads": (plain, SERVICE_THREADS),
    }
    prompts = held_out_prompts(read_corpus(standard_library()), args.rows)
    token_ids = [plain.model.encode(prompt.text) for prompt in prompts]
    with (
        LocalService(service_config(args.model, args.rows)) as service,
        Client(service.address) as client,
    ):
        print(json.dumps(measure(client, ways, token_ids, args), indent=2))


def measure(
    client: Client, ways: Ways, prompts: list[list[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one run."""
    warm_up = one_round(client, ways, prompts, 32)
    rounds = [one_round(client, ways, prompts, args.tokens) for _ in range(args.repeats)]
    config = ways["1_thread"][0].model.config
    together = [windows["together"] for windows in rounds]
    singly = [windows["singly"] for windows in rounds]
    local = {name: [windows[name] for windows in rounds] for name in ways}
    return {
        "machine": machine(SERVICE_THREADS) | {"python": platform.python_version()},
        "shape": {
            "hidden": config.hidden_size,
            "pattern": config.layer_pattern,
            "dtype": "float32",
            "rows": args.rows,
            "tokens": args.tokens,
            "prompt_tokens": sum(map(len, prompts)),
        },
        "warm_up_tokens_per_s": {name: round(run.tokens_per_s, 1) for name, run in warm_up.items()},
        "together": served(together)
        | {"overhead_ms_per_block": median(map(beside_busier, together))},
        "singly": served(singly) | {"overhead_ms_per_block": median(map(beside_both, singly))},
        "together_over_singly": median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(together, singly, strict=True)
        ),
        "in_process": {name: tower_figures(runs) for name, runs in local.items()},
        "service_over_in_process": median(
            windows["together"].tokens_per_s / max(windows[name].tokens_per_s for name in ways)
            for windows in rounds
        ),
        "equal_outputs": equal_outputs(rounds),
    }


def one_round(client: Client, ways: Ways, prompts: list[list[int]], tokens: int) -> Round:
    """Runs the requests once in every way."""
    windows = {name: in_process(*way, prompts, tokens) for name, way in ways.items()}
    windows["together"] = over_grpc(client, prompts, tokens, len(prompts))
    windows["singly"] = over_grpc(client, prompts, tokens, 1)
    return windows


def over_grpc(
    client: Client, prompts: list[list[int]], tokens: int, at_once: int, **parameters: Any
) -> Window:
    """All requests over one connection, `at_once` at a time, each read by a thread. `parameters`
    are arguments of Client.generate."""

    def stream(prompt: list[int]) -> Stream:
        sent = time.perf_counter()
        arrivals, token_ids = [], list[int]()
        for block in client.generate(prompt, max_tokens=tokens, ignore_eos=True, **parameters):
            arrivals.append(time.perf_counter())
            token_ids += block.token_ids
        return Stream(sent, tuple(arrivals), tuple(token_ids))

    with ThreadPoolExecutor(at_once) as threads:
        before, cpu, started = pair_stats(), time.process_time(), time.perf_counter()
        streams = tuple(threads.map(stream, prompts))
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        return Window(streams, seconds, cpu, before, pair_stats())


def in_process(local: Local, threads: int, prompts: list[list[int]], tokens: int) -> Window:
    """The same requests together in this process."""
    torch.set_num_threads(threads)
    requests = [Request(prompt, GenerationParams(max_tokens=tokens)) for prompt in prompts]
    before, cpu, started = local.stats(), time.process_time(), time.perf_counter()
    results = local.model.generate_requests(requests)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    streams = tuple(Stream(started, (), tuple(result.token_ids)) for result in results)
    return Window(streams, seconds, cpu, before, local.stats())


def served(windows: Sequence[Window]) -> dict[str, Any]:
    """Figures of runs over gRPC. A block's latency counts from the block before it."""
    streams = [stream for window in windows for stream in window.streams]
    first = [1e3 * (stream.arrivals[0] - stream.sent) for stream in streams]
    later = [1e3 * (b - a) for stream in streams for a, b in pairwise(stream.arrivals)]
    return tower_figures(windows) | {
        "first_block_ms": {"p50": percentile(first, 50), "p99": percentile(first, 99)},
        "block_ms": {"p50": percentile(later, 50), "p99": percentile(later, 99)},
        "client_cpu_share": median(window.client_seconds / window.seconds for window in windows),
    }


def tower_figures(windows: Sequence[Window]) -> dict[str, Any]:
    """Tokens/s, and per tower the share of time in passes, passes, rows and seconds of them."""
    return {
        "tokens_per_s": median(window.tokens_per_s for window in windows),
        "towers": {
            tower: {
                "busy_share": median(
                    window.grown(tower, "pass_seconds") / window.grown(tower, "clock_seconds")
                    for window in windows
                ),
                "passes": median(window.grown(tower, "passes") for window in windows),
                "rows_per_pass": median(
                    window.grown(tower, "pass_rows") / window.grown(tower, "passes")
                    for window in windows
                ),
                "pass_seconds": median(window.grown(tower, "pass_seconds") for window in windows),
            }
            for tower in TOWERS
        },
    }


def beside_busier(window: Window) -> float:
    """Milliseconds per block in which the busier tower ran no pass."""
    busiest = max(window.grown(tower, "pass_seconds") for tower in TOWERS)
    return 1e3 * (window.seconds - busiest) / _blocks(window)


def beside_both(window: Window) -> float:
    """Milliseconds per block outside of passes, for rows that run one at a time."""
    passes = sum(window.grown(tower, "pass_seconds") for tower in TOWERS)
    return 1e3 * (window.seconds - passes) / _blocks(window)


def equal_outputs(rounds: Sequence[Round]) -> bool:
    """True if every way of running a request gave the same tokens, in every round."""
    outputs = {
        tuple(stream.token_ids for stream in window.streams)
        for windows in rounds
        for window in windows.values()
    }
    return len(outputs) == 1


def _blocks(window: Window) -> int:
    return sum(len(stream.arrivals) for stream in window.streams)


if __name__ == "__main__":
    main()

"""Autoscaling of a real service under idle, burst, idle: pairs come and go, no stream is disturbed.

    python -m benchmarks.autoscale [--model DIR] [--pairs 3] [--clients 20] [--tokens 64]
        [--burst 200]

One pair is up. Then clients send one request after the other until all pairs work. Most end with
that; a few go on with longer requests until one pair is left, so that pairs are taken away while
rows run. Every stream must have the tokens that its prompt gave alone before the burst. Prints one
JSON object: when pairs were wanted, worked, were to go and had gone, in seconds.

A second service gets `burst` requests at once while it has one pair, and none after them: how long
the last one takes, and which share of them the new pairs have read.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.demo import PROMPT
from benchmarks.figures import median, percentile
from benchmarks.machine import machine
from tests.support.pairs import pair_states, prompt_tokens_read
from twotower.client import Client
from twotower.deployments.config import ServiceConfig
from twotower.deployments.pair.autoscaling import PairAutoscaling
from twotower.deployments.server.server import LocalService, free_port

SAMPLE_S = 0.1
PROMPTS = (PROMPT, f"{PROMPT}\n        # read")
# Clients that go on, as a share of a pair's target rows: together they want a single pair.
TAIL = 0.75
TARGET_ROWS = 8


@dataclass(frozen=True)
class Sample:
    """Pairs by state, and streams on their way, at a time in seconds."""

    at: float
    running: int
    starting: int
    stopping: int
    streams: int


@dataclass
class Streams:
    """Counts of all clients' streams, shared by their threads; `alone` has the tokens that each
    prompt gave first."""

    alone: dict[str, list[int]] = field(default_factory=dict)
    in_flight: int = 0
    seconds: list[float] = field(default_factory=list)
    wrong: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class Watch:
    """Samples the service's pairs in a thread."""

    def __init__(self, streams: Streams) -> None:
        self.samples: list[Sample] = []
        self._streams = streams
        self._started = time.monotonic()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def now(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started

    def until(self, condition: Callable[[Sample], bool], timeout_s: float) -> float:
        """Waits for a sample that fulfils a condition; returns its time. Raises TimeoutError."""
        begin = self.now()
        while self.now() - begin < timeout_s:
            if self.samples and condition(self.samples[-1]):
                return self.samples[-1].at
            time.sleep(SAMPLE_S / 2)
        raise TimeoutError(f"pairs: {self.samples[-1:]} after {timeout_s:g} s")

    def _run(self) -> None:
        while not self._stopped.wait(SAMPLE_S):
            states = pair_states()
            with self._streams.lock:
                streams = self._streams.in_flight
            counts = [states[name] for name in ("RUNNING", "STARTING", "STOPPING")]
            self.samples.append(Sample(self.now(), *counts, streams))


def scaling_config(model: str | None, pairs: int, **autoscaling: Any) -> ServiceConfig:
    """A service that scales within seconds, on shares of a CPU."""
    quick = {
        "max_pairs": pairs,
        "target_rows_per_pair": TARGET_ROWS,
        "smoothing_s": 1.0,
        "scale_down_after_s": 4.0,
        "metrics_interval_s": 0.5,
    }
    return ServiceConfig(
        model=model,
        grpc_port=free_port(),
        http_port=free_port(),
        # All pairs together get the CPU share of a single pair.
        cpus_per_tower=0.4 / pairs,
        num_threads=1,
        max_num_seqs=2 * TARGET_ROWS,
        max_context=1024,
        prefix_cache_mib=0,
        graceful_shutdown_timeout_s=120,
        autoscaling=PairAutoscaling(**{**quick, **autoscaling}),
    )


def ask(client: Client, streams: Streams, prompt: str, tokens: int) -> None:
    """Reads a stream and compares its tokens with those of the prompt's first stream."""
    with in_flight(streams):
        started = time.monotonic()
        stream = client.generate(prompt, max_tokens=tokens, ignore_eos=True, timeout=300)
        got = [token for block in stream for token in block.token_ids]
    with streams.lock:
        streams.seconds.append(time.monotonic() - started)
        streams.wrong += got != streams.alone.setdefault(prompt, got)[:tokens]


@contextmanager
def in_flight(streams: Streams) -> Iterator[None]:
    """Counts a stream while it runs."""
    with streams.lock:
        streams.in_flight += 1
    try:
        yield
    finally:
        with streams.lock:
            streams.in_flight -= 1


def scenario(
    service: LocalService, *, clients: int, tokens: int, tail_tokens: int, timeout_s: float = 300.0
) -> dict[str, Any]:
    """Idle, burst, idle. Raises ServiceError if a stream breaks, TimeoutError if pairs do not
    come or go."""
    scaling = service.config.autoscaling
    assert scaling is not None
    streams = Streams()
    with Client(service.address) as client, Watch(streams) as watch:
        for prompt in PROMPTS:
            ask(client, streams, prompt, tail_tokens)
        idle = watch.until(lambda sample: sample.running == 1 and not sample.starting, timeout_s)
        enough, alone = threading.Event(), threading.Event()

        def burst(number: int) -> None:
            prompt = PROMPTS[number % len(PROMPTS)]
            while not enough.is_set():
                ask(client, streams, prompt, tokens)
            while number < TAIL * TARGET_ROWS and not alone.is_set():
                ask(client, streams, prompt, tail_tokens)

        with ThreadPoolExecutor(clients) as pool:
            asked = [pool.submit(burst, number) for number in range(clients)]
            try:
                times = burst_times(watch, scaling.max_pairs, enough, timeout_s)
            finally:
                enough.set()
                alone.set()
            for future in asked:
                future.result()
        gone = watch.until(lambda now: now.running == 1 and not now.stopping, timeout_s)
    drained = [sample for sample in watch.samples if sample.stopping and sample.streams]
    begin, wanted, works, end, goes = times
    return {
        "machine": machine(service.config.num_threads or 1),
        "autoscaling": scaling.model_dump(),
        "pairs": levels(watch.samples),
        "idle_at_s": round(idle, 1),
        "all_wanted_after_s": round(wanted - begin, 1),
        "all_work_after_s": round(works - begin, 1),
        "one_left_after_s": round(goes - end, 1),
        "others_gone_after_s": round(gone - end, 1),
        "streams": len(streams.seconds),
        "streams_wrong": streams.wrong,
        "streams_while_pairs_went": max((sample.streams for sample in drained), default=0),
        "stream_s": {"p50": median(streams.seconds), "p99": percentile(streams.seconds, 99)},
    }


def burst_times(
    watch: Watch, most: int, enough: threading.Event, timeout_s: float
) -> tuple[float, float, float, float, float]:
    """The times of a burst that begins now: its begin, all `most` pairs are wanted, all work, it
    ends (`enough` is set), a single pair runs. Raises TimeoutError."""
    begin = watch.now()
    wanted = watch.until(lambda now: now.running + now.starting == most, timeout_s)
    works = watch.until(lambda now: now.running == most, timeout_s)
    enough.set()
    end = watch.now()
    return begin, wanted, works, end, watch.until(lambda now: now.running == 1, timeout_s)


def one_burst(
    service: LocalService, *, streams: int, tokens: int, timeout_s: float = 300.0
) -> dict[str, Any]:
    """Figures of many requests at once on a single pair, whose queue new pairs shorten only by
    taking rows from it. Raises as `scenario`."""
    scaling = service.config.autoscaling
    assert scaling is not None
    got, together = Streams(), threading.Barrier(streams + 1)

    def send(number: int) -> None:
        with Client(service.address) as client:
            together.wait(timeout_s)
            ask(client, got, PROMPTS[number % len(PROMPTS)], tokens)

    with Watch(got) as watch, ThreadPoolExecutor(streams) as pool:
        with Client(service.address) as client:
            for prompt in PROMPTS:
                ask(client, got, prompt, tokens)
        (old,) = prompt_tokens_read(1)
        asked = [pool.submit(send, number) for number in range(streams)]
        together.wait(timeout_s)
        begin = watch.now()
        works = watch.until(lambda now: now.running == scaling.max_pairs, timeout_s)
        for future in asked:
            future.result()
        seconds = watch.now() - begin
        read = prompt_tokens_read(scaling.max_pairs)
    read[0] -= old
    return {
        "streams": streams,
        "streams_wrong": got.wrong,
        "all_work_after_s": round(works - begin, 1),
        "last_stream_after_s": round(seconds, 1),
        "share_on_new_pairs": round(sum(read[1:]) / sum(read), 3),
        "shares": [round(tokens / sum(read), 3) for tokens in read],
    }


def levels(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """The samples at which a number of pairs changed."""
    shown: list[dict[str, Any]] = []
    for sample in samples:
        counts = {name: getattr(sample, name) for name in ("running", "starting", "stopping")}
        if not shown or {**shown[-1], **counts} != shown[-1]:
            shown.append({"at_s": round(sample.at, 1), **counts})
    return shown


def main() -> None:
    """Parses the arguments, runs the scenario, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--tail-tokens", type=int, default=320)
    parser.add_argument("--burst", type=int, default=200, help="requests at once; 0 = leave out")
    args = parser.parse_args()
    with LocalService(scaling_config(args.model, args.pairs)) as service:
        limits = {"tokens": args.tokens, "tail_tokens": args.tail_tokens}
        found = scenario(service, clients=args.clients, **limits)
    if args.burst:
        # No pair goes before its counters are read.
        config = scaling_config(args.model, args.pairs, scale_down_after_s=60.0)
        with LocalService(config) as service:
            found["burst"] = one_burst(service, streams=args.burst, tokens=args.tokens)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()

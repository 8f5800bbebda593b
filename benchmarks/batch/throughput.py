"""Tokens/s of a batch job over those of the same rows in process.

    python -m benchmarks.batch.throughput [--rows 160] [--tokens 96] [--in-flight 16] [--rounds 3]

The shipped model, mask_diffusion, greedy, prefix cache off, `--in-flight` rows at a time, a thread
for each tower in both. In process all rows are given to the engine at once, which holds as many at
a time. Of a job its rate between a tenth and nine tenths of its tokens counts: starting Ray,
loading the model and writing the file are no part of it, and are printed beside it. Rounds
alternate. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.batch.inputs import first_prompts, write_requests
from benchmarks.figures import median
from benchmarks.in_process import Local, load_local
from benchmarks.machine import machine
from twotower import Request
from twotower.batch import BatchDefaults, JobCounts, JobOptions, run_job
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port
from twotower.towers.request.params import GenerationParams

MAX_CONTEXT = 512
SPARE_CPUS = 4


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=160)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--in-flight", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    local = load_local(args.model, args.in_flight, MAX_CONTEXT, threaded=True)
    config = ServiceConfig(
        model=args.model,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=args.in_flight,
        max_context=MAX_CONTEXT,
        prefix_cache_mib=0,
    )
    with LocalService(config, spare_cpus=SPARE_CPUS):
        target = f"http://127.0.0.1:{config.http_port}"
        rounds = [one_round(local, target, args) for _ in range(args.rounds)]
    print(
        json.dumps(
            {
                "machine": machine(1),
                "rows": args.rows,
                "tokens_a_row": args.tokens,
                "in_flight": args.in_flight,
                "in_process_tokens_per_s": median(one["in_process"] for one in rounds),
                "batch_tokens_per_s": median(one["batch"] for one in rounds),
                "whole_job_tokens_per_s": median(one["whole"] for one in rounds),
                "batch_over_in_process": median(one["batch"] / one["in_process"] for one in rounds),
                "rounds": [
                    {name: round(value, 1) for name, value in one.items()} for one in rounds
                ],
            },
            indent=2,
        )
    )


def one_round(local: Local, target: str, args: argparse.Namespace) -> dict[str, float]:
    """Tokens/s in process, in the middle of a job, and of the whole job."""
    in_process = rate_in_process(local, args.rows, args.tokens)
    watched = Watched()
    with TemporaryDirectory() as folder:
        source = Path(folder, "in.jsonl")
        body = {"max_tokens": args.tokens, "ignore_eos": True, "temperature": 0}
        write_requests(source, args.rows, **body)
        options = JobOptions(
            inputs=(str(source),),
            output=str(Path(folder, "out.jsonl")),
            defaults=BatchDefaults(),
            targets=(target,),
            concurrency=args.in_flight,
        )
        summary = run_job(options, watched)
    whole = summary.to_dict()["tokens_per_s"]
    return {"in_process": in_process, "batch": watched.rate(), "whole": whole}


def rate_in_process(local: Local, rows: int, tokens: int) -> float:
    """Tokens/s of the same rows in this process."""
    torch.set_num_threads(1)
    params = GenerationParams(max_tokens=tokens)
    requests = [Request(prompt, params) for prompt in first_prompts(rows)]
    started = time.perf_counter()
    results = local.model.generate_requests(requests)
    return sum(len(result.token_ids) for result in results) / (time.perf_counter() - started)


class Watched:
    """Takes a job's counts; the rate of its middle."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def __call__(self, counts: JobCounts) -> None:
        if not self._seen or counts.tokens != self._seen[-1][1]:
            self._seen.append((counts.seconds, counts.tokens))

    def rate(self) -> float:
        """Tokens/s between a tenth and nine tenths of all tokens."""
        last = self._seen[-1][1]
        middle = [(at, sum_) for at, sum_ in self._seen if 0.1 * last <= sum_ <= 0.9 * last]
        (begin, first), (end, most) = middle[0], middle[-1]
        return (most - first) / (end - begin)


if __name__ == "__main__":
    main()

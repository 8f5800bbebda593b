"""Pairs that come and go under a batch job: one, as many as may be, one.

    python -m benchmarks.batch.pairs [--rows 600] [--pairs 3] [--tokens 48]

A service with one pair may have up to `--pairs`; a job asks it about all rows. Every row must have
the text that it has in process. Prints one JSON object: when pairs were wanted, worked and had
gone, in seconds since the job's begin and its end.
"""

from __future__ import annotations

import argparse
import json
import threading
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.autoscale import Streams, Watch, levels, scaling_config
from benchmarks.batch.inputs import first_prompts, write_requests
from benchmarks.batch.throughput import SPARE_CPUS
from benchmarks.machine import machine
from twotower import Request, TwoTower
from twotower.batch import BatchDefaults, JobOptions, JobSummary, run_job
from twotower.deployments.server.server import LocalService
from twotower.towers.request.params import GenerationParams

TIMEOUT_S = 600.0


def main() -> None:
    """Parses the arguments, runs the job, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=600)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=48)
    args = parser.parse_args()
    config = scaling_config(args.model, args.pairs)
    with LocalService(config, spare_cpus=SPARE_CPUS), TemporaryDirectory() as folder:
        found = measure(Path(folder), f"http://127.0.0.1:{config.http_port}", args)
    print(json.dumps({"machine": machine(1), **found}, indent=2))


def measure(folder: Path, target: str, args: argparse.Namespace) -> dict[str, Any]:
    """The job's figures, and when pairs came and went."""
    body = {"max_tokens": args.tokens, "temperature": 0, "ignore_eos": True}
    write_requests(folder / "in.jsonl", args.rows, **body)
    done: list[JobSummary] = []
    options = JobOptions(
        inputs=(str(folder / "in.jsonl"),),
        output=str(folder / "out.jsonl"),
        defaults=BatchDefaults(),
        targets=(target,),
        concurrency=16 * args.pairs,
        ordered=True,
    )
    with Watch(Streams()) as watch:
        watch.until(lambda now: now.running == 1 and not now.starting, TIMEOUT_S)
        begin = watch.now()
        job = threading.Thread(target=lambda: done.append(run_job(options)))
        job.start()
        wanted = watch.until(lambda now: now.running + now.starting == args.pairs, TIMEOUT_S)
        work = watch.until(lambda now: now.running == args.pairs, TIMEOUT_S)
        job.join()
        end = watch.now()
        left = watch.until(lambda now: now.running == 1, TIMEOUT_S)
        gone = watch.until(lambda now: now.running == 1 and not now.stopping, TIMEOUT_S)
        samples = watch.samples
    return {
        "rows": args.rows,
        "tokens_a_row": args.tokens,
        "job_s": round(end - begin, 1),
        "all_wanted_after_s": round(wanted - begin, 1),
        "all_work_after_s": round(work - begin, 1),
        "one_left_after_s": round(left - end, 1),
        "others_gone_after_s": round(gone - end, 1),
        "pairs": levels(samples),
        "rows_wrong": wrong(folder / "out.jsonl", args.rows, args.tokens),
        "summary": done[0].to_dict(),
    }


def wrong(output: Path, rows: int, tokens: int) -> int:
    """Rows whose text is not that of the same prompt in process."""
    params = GenerationParams(max_tokens=tokens)
    requests = [Request(prompt, params) for prompt in first_prompts(rows)]
    expected = [result.text for result in TwoTower.from_pretrained().generate_requests(requests)]
    lines = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    got = [line["response"]["body"]["choices"][0]["text"] for line in lines]
    return sum(a != b for a, b in zip(got, expected, strict=True))


if __name__ == "__main__":
    main()

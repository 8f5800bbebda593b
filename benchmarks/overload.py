"""More requests than a pair can complete: with floors that requests declare, and without.

    python -m benchmarks.overload [--model DIR] [--load 1.5] [--seconds 30] [--repeats 3]

Requests come at seeded random times, `--load` times as many as the service completes of such
requests when they come at once. Rounds with and without floors alternate on one service and see the
same arrivals. The cost of fewer steps is shown by the context tower's log-probability of the
output. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc

from benchmarks.figures import median
from benchmarks.machine import machine
from benchmarks.prompts import held_out_prompts
from benchmarks.service import SERVICE_THREADS, service_config
from twotower.client import Client, ServiceError
from twotower.deployments.server.server import LocalService
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.text.tokenizer import load_tokenizer
from twotower.towers.training.corpus import read_corpus, standard_library

ROWS, QUEUE = 8, 16
ALL = ROWS + QUEUE
STEPS, FLOOR = 16, 4
TOKENS = 64
# No token reaches the threshold: a pass commits as many as the number of steps asks for.
ASKED = {"steps_per_block": STEPS, "confidence_threshold": 0.95, "max_tokens": TOKENS}


@dataclass(frozen=True)
class Answer:
    """The outcome of a request: `seconds` from sending to the end, `steps` per block with which it
    was served, and its denoiser passes `nfe`; 0 of both if it was refused."""

    seconds: float
    steps: int = 0
    nfe: int = 0
    token_ids: tuple[int, ...] = ()


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument(
        "--load", type=float, default=1.5, help="arrivals over completions possible"
    )
    parser.add_argument("--seconds", type=float, default=30.0, help="length of a round's arrivals")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    tokenizer = load_tokenizer(resolve_checkpoint(args.model))
    if tokenizer is None:
        parser.error("--model: has no tokenizer")
    texts = held_out_prompts(read_corpus(standard_library()), ALL)
    prompts = [tokenizer.encode(prompt.text) for prompt in texts]
    config = service_config(args.model, ROWS).model_copy(update={"max_queued_requests": QUEUE})
    with LocalService(config) as service, Client(service.address) as client:
        print(json.dumps(measure(client, prompts, args), indent=2))


def measure(
    client: Client, prompts: Sequence[Sequence[int]], args: argparse.Namespace
) -> dict[str, Any]:
    """All figures of one run."""
    at_once = [0.0] * ALL
    one_round(client, prompts, at_once, False)
    began = time.monotonic()
    possible = len(one_round(client, prompts, at_once, False)) / (time.monotonic() - began)
    rounds: dict[bool, list[list[Answer]]] = {False: [], True: []}
    for repeat in range(args.repeats):
        arrivals = drawn_arrivals(args.load * possible, args.seconds, seed=repeat)
        for floors in (False, True):
            rounds[floors].append(one_round(client, prompts, arrivals, floors))
    return {
        "machine": machine(SERVICE_THREADS),
        "rows": ROWS,
        "queue": QUEUE,
        "asked": ASKED,
        "floor_steps": FLOOR,
        "completed_per_s_at_once": round(possible, 2),
        "load": args.load,
        "as_asked": figures(client, prompts, rounds[False]),
        "with_floors": figures(client, prompts, rounds[True]),
        "completed_with_over_without": median(
            sum(each.nfe > 0 for each in eased) / sum(each.nfe > 0 for each in plain)
            for plain, eased in zip(rounds[False], rounds[True], strict=True)
        ),
    }


def drawn_arrivals(per_s: float, seconds: float, seed: int) -> list[float]:
    """Times at which requests come, in seconds from the beginning: a Poisson process."""
    draw = random.Random(seed)
    times = [draw.expovariate(per_s)]
    while times[-1] < seconds:
        times.append(times[-1] + draw.expovariate(per_s))
    return times[:-1]


def one_round(
    client: Client, prompts: Sequence[Sequence[int]], arrivals: Sequence[float], floors: bool
) -> list[Answer]:
    """Sends a request at each time; returns the answers in that order."""
    began = time.monotonic()

    def ask(index: int) -> Answer:
        sent = time.monotonic()
        floor = {"min_steps_per_block": FLOOR} if floors else {}
        stream = client.generate(
            prompts[index % ALL], ignore_eos=True, resume=False, **floor, **ASKED
        )
        try:
            for _ in stream:
                pass
        except ServiceError as error:
            if error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                raise
            return Answer(time.monotonic() - sent)
        assert stream.usage is not None
        steps = stream.steps_per_block or STEPS
        seconds = time.monotonic() - sent
        return Answer(seconds, steps, stream.usage.nfe, tuple(stream.token_ids))

    # A thread for each request that can run at once; refused requests end at once.
    with ThreadPoolExecutor(2 * ALL) as pool:
        asked = []
        for index, at in enumerate(arrivals):
            time.sleep(max(0.0, began + at - time.monotonic()))
            asked.append(pool.submit(ask, index))
        return [future.result(timeout=600) for future in asked]


def figures(
    client: Client, prompts: Sequence[Sequence[int]], rounds: Sequence[Sequence[Answer]]
) -> dict[str, Any]:
    """Outcomes of the requests of all rounds."""
    answers = [(index, answer) for answers in rounds for index, answer in enumerate(answers)]
    complete = [(index, answer) for index, answer in answers if answer.nfe]
    log_probs = [
        sum(client.score([*prompts[index % ALL], *answer.token_ids]).log_probs[-TOKENS:])
        for index, answer in complete
    ]
    return {
        "requests": len(answers),
        "complete": len(complete),
        "refused": len(answers) - len(complete),
        "seconds_p50": median(answer.seconds for _, answer in complete),
        "tokens_per_nfe": round(
            TOKENS * len(complete) / sum(answer.nfe for _, answer in complete), 3
        ),
        "steps": dict(sorted(Counter(answer.steps for _, answer in complete).items())),
        "context_tower_log_prob_per_token": round(sum(log_probs) / (TOKENS * len(complete)), 3),
    }


if __name__ == "__main__":
    main()

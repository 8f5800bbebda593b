"""What lookup drafts cost: microseconds a round, bytes a token, milliseconds to build the index.

    python -m benchmarks.lookup_cost [--rounds 2000] [--output FILE]

A round is `match`, `draft` of 15 tokens and `extend` by 4; an index is built from a prompt and goes
on with the text that follows it. Texts: source of the standard library as the shipped tokenizer
reads it, a loop, random ids of a large vocabulary, random ids of three, and a list of ascending ids
that all follow the same token and come again and again, the worst order for a tree that is sorted
by ids. Bytes are those after the last round, spare room too.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterator
from itertools import chain, cycle, islice
from pathlib import Path

from benchmarks.machine import machine
from twotower.towers.checkpoint.weights import SHIPPED_MODEL
from twotower.towers.decoding.lookup import LookupIndex
from twotower.towers.text.tokenizer import load_tokenizer

PROMPTS = (100, 4_000, 100_000)
VOCABULARY = 131_072
DRAFT, COMMIT = 15, 4
LOOP = 50
BUILDS = 5


def main() -> None:
    """Parses the arguments, measures, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--output", type=Path, help="file that gets the JSON too")
    args = parser.parse_args()
    figures = {
        "machine": machine(1),
        "rounds": args.rounds,
        "texts": [
            measured(name, text, prompt, args.rounds)
            for name, text in texts(PROMPTS[-1] + COMMIT * args.rounds).items()
            for prompt in PROMPTS
        ],
    }
    shown = json.dumps(figures, indent=2)
    print(shown)
    if args.output:
        args.output.write_text(shown + "\n")


def texts(length: int) -> dict[str, list[int]]:
    """Texts of `length` tokens, by name."""
    draw = random.Random(0)
    followers = range(1, 20_000)
    return {
        "source": list(islice(source_tokens(), length)),
        "loop": list(islice(cycle(range(LOOP)), length)),
        "random": [draw.randrange(VOCABULARY) for _ in range(length)],
        "three ids": [draw.randrange(3) for _ in range(length)],
        "ascending": list(islice(chain.from_iterable((i, 0) for i in cycle(followers)), length)),
    }


def source_tokens() -> Iterator[int]:
    """Tokens of the standard library's files, one after the other."""
    tokenizer = load_tokenizer(SHIPPED_MODEL)
    assert tokenizer is not None, "the shipped model has a tokenizer"
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        yield from tokenizer.encode(path.read_text(encoding="utf-8"))


def measured(name: str, text: list[int], prompt: int, rounds: int) -> dict[str, str | int | float]:
    """The figures of one text and length of prompt."""
    builds = [seconds(lambda: LookupIndex(text[:prompt])) for _ in range(BUILDS)]
    index = LookupIndex(text[:prompt])
    times, accepted = [], 0
    for start in range(prompt, prompt + COMMIT * rounds, COMMIT):
        committed = text[start : start + COMMIT]
        begin = time.perf_counter_ns()
        match = index.match()
        draft = [] if match is None else index.draft(match, DRAFT)
        index.extend(committed)
        times.append((time.perf_counter_ns() - begin) / 1000)
        accepted += leading(draft, text[start : start + DRAFT])
    percentiles = statistics.quantiles(times, n=100)
    return {
        "text": name,
        "prompt": prompt,
        "round_us_p50": round(percentiles[49], 2),
        "round_us_p99": round(percentiles[98], 2),
        "round_us_mean": round(statistics.fmean(times), 2),
        "round_us_max": round(max(times), 1),
        "bytes_per_token": round(index.num_bytes / len(index), 1),
        "build_ms": round(1000 * min(builds), 2),
        "accepted_per_round": round(accepted / rounds, 2),
    }


def leading(draft: list[int], text: list[int]) -> int:
    """How many tokens of a draft are those of the text, from the first on."""
    pairs = enumerate(zip(draft, text, strict=False))
    return next((i for i, (drafted, true) in pairs if drafted != true), min(len(draft), len(text)))


def seconds(call: Callable[[], object]) -> float:
    """How long a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()

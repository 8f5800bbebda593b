"""Random and hostile requests over both fronts of a real service, beside a client with manners.

    python -m benchmarks.hostile [--requests 10000] [--seed 0] [--per-second 25] [--only PART]

Starts the service on the shipped model and sends requests of all kinds that hostile_http.py and
hostile_grpc.py have, drawn by the seed. A neighbour streams completions one after another the whole
time, and for a while before and after, when it is alone. Prints a table of the kinds with what
came back, and one of what has to hold; the exit code is 1 if any of it does not.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import hostile_grpc, hostile_http
from benchmarks.figures import median, percentile
from benchmarks.hostile_neighbour import Reading
from benchmarks.hostile_wire import KINDS, NO_ANSWER, Target
from tests.support.processes import own_processes
from twotower import TwoTower
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port

TITLES = {
    "router": "ray::ServeReplica:twotower:Router",
    "proxy": "ray::ProxyActor",
    "pair": "ray::ServeReplica:twotower:TowerPair",
    "context tower": "ray::ContextTowerActor",
    "denoiser tower": "ray::DenoiserTowerActor",
}
PROMPTS = ("def main():\n    ", "class Reader:\n", "import os\nimport sys\n")
TOKENS = 32
# Fewer than the choices of a request that is to wait.
ROWS = 8
# Of a client's fault no front may say that the service is to blame.
_BLAMED = ("INTERNAL", "UNKNOWN", "UNAVAILABLE", "DATA_LOSS", NO_ANSWER, "raised")
_BROKEN = (" without ", " in another shape")
# Reports of pairs reach the router every ten seconds.
IDLE_S = 60.0
# Fills in the first half: what grows then is the cache, and what grows later is not.
CACHE_MIB = 8
MAX_GROWTH_MIB = 16.0
MAX_SLOWER = 2.0


@dataclass
class Figures:
    """What a run has found out."""

    outcomes: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: float = 0.0
    pids: list[dict[str, list[int]]] = field(default_factory=list)
    rss_mib: list[dict[str, float]] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    alone: list[Reading] = field(default_factory=list)
    beside: list[Reading] = field(default_factory=list)


@dataclass(frozen=True)
class Requirement:
    """Something that has to hold, and what was found."""

    name: str
    holds: bool
    found: str


def main() -> int:
    """Parses the arguments, attacks, prints the tables; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--in-flight", type=int, default=16, help="hostile requests at once")
    parser.add_argument("--per-second", type=float, default=25.0, help="most that begin")
    parser.add_argument("--only", default="", help="kinds whose name contains this")
    args = parser.parse_args()
    kinds = [name for name in KINDS if args.only in name]
    if not kinds:
        parser.error(f"--only: {args.only!r} is in none of {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as scratch:
        figures = attacked(Path(scratch), kinds, args)
    held = requirements(figures)
    print(kinds_table(figures), requirements_table(held), sep="\n\n")
    return 0 if all(each.holds for each in held) else 1


def attacked(folder: Path, kinds: Sequence[str], args: argparse.Namespace) -> Figures:
    """The figures of one run of a service of its own."""
    expected = folder / "expected.json"
    expected.write_text(json.dumps(right_tokens()), encoding="utf-8")
    config = ServiceConfig(
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=ROWS,
        prefix_cache_mib=CACHE_MIB,
    )
    target = Target(config.http_port, config.grpc_port, config.message_bytes())
    with LocalService(config) as service:
        command = [sys.executable, "-m", "benchmarks.hostile_neighbour", str(expected)]
        command += [str(config.http_port), service.address]
        with neighbour(command, folder / "readings") as readings:
            figures = asyncio.run(run(target, kinds, args, readings))
        figures.left = left(target)
        figures.pids.append(processes())
    return figures


def right_tokens() -> list[dict[str, Any]]:
    """The neighbour's requests with the tokens that each brings in one process, alone."""
    model = TwoTower.from_pretrained()
    found = []
    for seed, prompt in enumerate(PROMPTS):
        options = {"max_tokens": TOKENS, "block_size": 8, "temperature": seed % 2, "seed": seed}
        [result] = model.generate([prompt], **options)
        found.append({"prompt": prompt, "options": options, "token_ids": list(result.token_ids)})
    return found


class Readings:
    """The neighbour's completions so far, as its process writes them."""

    def __init__(self, path: Path, process: subprocess.Popen[bytes]) -> None:
        self._path = path
        self._process = process

    def between(self, begin: float, end: float) -> list[Reading]:
        """Completions that began in this time. Raises RuntimeError if the neighbour has ended."""
        if self._process.poll() is not None:
            raise RuntimeError("the neighbour has ended by itself")
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        found = [Reading(**json.loads(line)) for line in lines]
        return [each for each in found if begin <= each.at < end]


@contextmanager
def neighbour(command: Sequence[str], path: Path) -> Iterator[Readings]:
    """The client with manners in a process of its own, for as long as the block lasts."""
    with path.open("wb") as output:
        process = subprocess.Popen(command, stdout=output)
    try:
        yield Readings(path, process)
    finally:
        process.terminate()
        process.wait(30)


async def run(
    target: Target, kinds: Sequence[str], args: argparse.Namespace, readings: Readings
) -> Figures:
    """The neighbour alone, then both halves of the requests beside it, then it alone again."""
    figures = Figures(outcomes={name: Counter() for name in kinds})
    alone_s = max(8.0, min(40.0, args.requests / 250))
    await warmed_up(target, kinds, args.seed)
    figures.pids.append(processes())
    figures.alone += await quiet(readings, alone_s)
    half = args.requests // 2
    begin = time.monotonic()
    for indexes in (range(half), range(half, args.requests)):
        await attack(target, figures, indexes, args)
        figures.rss_mib.append(resident())
    figures.seconds = time.monotonic() - begin
    figures.beside += readings.between(begin, time.monotonic())
    await hostile_http.close_clients()
    await hostile_grpc.close_channels()
    figures.alone += await quiet(readings, alone_s)
    return figures


async def warmed_up(target: Target, kinds: Sequence[str], seed: int) -> None:
    """One request of each kind, which are not counted: what is imported, and kernels that are
    chosen, the first time."""
    for name in kinds:
        await KINDS[name].send(target, random.Random(f"{seed}/{name}"))
    await asyncio.sleep(1.0)


async def quiet(readings: Readings, seconds: float) -> list[Reading]:
    """The neighbour's completions in a time in which it is alone."""
    begin = time.monotonic()
    await asyncio.sleep(seconds)
    return readings.between(begin, time.monotonic())


async def attack(
    target: Target, figures: Figures, indexes: Sequence[int], args: argparse.Namespace
) -> None:
    """Sends requests of these numbers, so many at a time, and counts what comes back."""
    names = tuple(figures.outcomes)
    weights = [KINDS[name].weight for name in names]
    todo = iter(indexes)
    begin = time.monotonic()

    async def take_turns() -> None:
        for index in todo:
            due = begin + (index - indexes[0]) / args.per_second
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            draw = random.Random(f"{args.seed}/{index}")
            [name] = draw.choices(names, weights)
            try:
                outcome = await KINDS[name].send(target, draw)
            except Exception as error:
                # Counted as a fault, with the number that draws the same request again.
                outcome = f"raised {type(error).__name__}: {error}"
            figures.outcomes[name][outcome] += 1
            if blamed(outcome):
                print(f"request {index}, {name}: {outcome}", file=sys.stderr, flush=True)

    await asyncio.gather(*(take_turns() for _ in range(args.in_flight)))


def blamed(outcome: str) -> bool:
    """Whether the service says that it is to blame, or says nothing that a client can use."""
    server_error = outcome[:1] == "5" and outcome[:3].isdecimal()
    broken = any(sign in outcome for sign in _BROKEN)
    return server_error or broken or outcome.startswith(_BLAMED)


def processes() -> dict[str, list[int]]:
    """The processes of the service, by what they are."""
    return {name: sorted(own_processes(title)) for name, title in TITLES.items()}


def resident() -> dict[str, float]:
    """MiB of memory of each process of the service."""
    page = os.sysconf("SC_PAGE_SIZE") / 2**20
    return {
        f"{name} {process}": int(Path(f"/proc/{process}/statm").read_text().split()[1]) * page
        for name, found in processes().items()
        for process in found
    }


def left(target: Target) -> dict[str, float]:
    """Counters of /admin/stats that should be zero once nobody asks, and are not in IDLE_S."""
    deadline = time.monotonic() + IDLE_S
    while (found := held(stats_of(target))) and time.monotonic() < deadline:
        time.sleep(0.5)
    return found


def stats_of(target: Target) -> dict[str, Any]:
    """The answer of /admin/stats."""
    with urllib.request.urlopen(f"http://127.0.0.1:{target.http_port}/admin/stats") as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def held(stats: dict[str, Any]) -> dict[str, float]:
    """Rows, slots and places that are in use; not pages, as the prefix cache has some."""
    router = {f"router {name}": stats["router"][name] for name in ("running", "waiting")}
    towers = {
        f"{tower} {name}": counters.get(name, 0)
        for pair in stats["pairs"]
        for tower, counters in pair["towers"].items()
        for name in ("rows", "slots_used", "queued_rows", "mirrors", "pending_work")
    }
    return {name: value for name, value in (router | towers).items() if value}


def requirements(figures: Figures) -> list[Requirement]:
    """What has to hold."""
    before, after = figures.pids[0], figures.pids[-1]
    faults: Counter[str] = Counter()
    for counts in figures.outcomes.values():
        faults.update({name: count for name, count in counts.items() if blamed(name)})
    first, second = figures.rss_mib
    growth = {name: second[name] - first.get(name, 0.0) for name in second}
    wrong = [each.fault for each in (*figures.alone, *figures.beside) if each.fault]
    grown = ", ".join(f"{name} {mib:+.1f}" for name, mib in growth.items())
    return [
        Requirement("every process lives on", before == after, _pids(before, after)),
        Requirement("no status that blames the service", not faults, str(dict(faults) or "none")),
        Requirement("nothing is left", not figures.left, str(figures.left or "nothing")),
        Requirement(
            f"memory of each process grows by at most {MAX_GROWTH_MIB:g} MiB in the second half",
            max(growth.values()) <= MAX_GROWTH_MIB,
            grown,
        ),
        Requirement(
            "the neighbour's tokens are right",
            not wrong and bool(figures.beside),
            f"{len(wrong)} of {len(figures.alone) + len(figures.beside)} wrong"
            + (f", first: {wrong[0]}" if wrong else ""),
        ),
        *_latencies(figures),
    ]


def _pids(before: dict[str, list[int]], after: dict[str, list[int]]) -> str:
    changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
    return str(changed) if changed else f"{sum(map(len, after.values()))} processes"


def _latencies(figures: Figures) -> Iterator[Requirement]:
    for front in ("http", "grpc"):
        for measure in ("first_s", "whole_s"):
            alone, beside = (
                [getattr(each, measure) for each in readings if each.front == front]
                for readings in (figures.alone, figures.beside)
            )
            before, during = percentile(alone, 99), percentile(beside, 99)
            what = "first block" if measure == "first_s" else "completion"
            yield Requirement(
                f"p99 of the neighbour's {what} by {front} at most doubled",
                during <= MAX_SLOWER * before,
                f"alone {before:.3f} s of {len(alone)} (median {median(alone):.3f}), "
                f"beside {during:.3f} s of {len(beside)} (median {median(beside):.3f})",
            )


def kinds_table(figures: Figures) -> str:
    """One line for each kind of request, as markdown."""
    lines = ["| kind | requests | what came back |", "|---|---|---|"]
    total: Counter[str] = Counter()
    for name, counts in figures.outcomes.items():
        total += counts
        lines.append(f"| {name} | {counts.total()} | {_counted(counts)} |")
    lines.append(f"| all, in {figures.seconds:.0f} s | {total.total()} | {_counted(total)} |")
    return "\n".join(lines)


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name[:80]} {count}" for name, count in counts.most_common())


def requirements_table(held_: Sequence[Requirement]) -> str:
    """One line for each requirement, as markdown."""
    lines = ["| what has to hold | holds | found |", "|---|---|---|"]
    lines += [f"| {each.name} | {'yes' if each.holds else 'NO'} | {each.found} |" for each in held_]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())

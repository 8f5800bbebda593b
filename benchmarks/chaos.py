"""What streams notice when something dies, hangs or slows down under them.

    python -m benchmarks.chaos                                   # all disturbances, 30 streams each
    python -m benchmarks.chaos --only "node killed" --rounds 3

A cluster of one head and three nodes on this machine, two pairs, each on a node of its own. Every
round sends streams in all modes, disturbs at a seeded random moment, and compares each stream
with what its request gives alone. Prints one JSON object a round and a table; exit code 1 if a
token is missing, wrong or double, or something is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from tests.support.chaos_cluster import ChaosCluster, chaos_cluster
from tests.support.processes import own_processes
from twotower import TwoTower
from twotower.client import Client, Usage
from twotower.cluster.topology import LinkFaults

MODES = ("mask_diffusion", "ar", "verified", "mask_diffusion", "mock_ar")
TEXTS = ("def main():\n    ", "class Reader:\n", "import os\nimport sys\n", "# the first", "x = [")
Request = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Stream:
    """What a client saw of one stream; gapless if each block began where the last had ended.

    `starts` of the blocks count from the output's first token.
    """

    token_ids: list[int]
    text: str
    starts: list[int]
    indexes: list[int]
    gapless: bool
    usage: Usage | None
    longest_pause_s: float
    resumes: int


@dataclass(frozen=True)
class Round:
    """One disturbance under many streams. `wrong` streams differ from the undisturbed ones."""

    disturbance: str
    seed: int
    streams: int
    running: int
    wrong: int
    left: float
    longest_pause_s: float
    median_pause_s: float
    seconds: float
    resumes: int


def signalled(title: str, kind: int) -> Callable[[ChaosCluster, random.Random], None]:
    """Sends a signal to one of the processes of a title."""

    def disturb(_: ChaosCluster, draw: random.Random) -> None:
        os.kill(draw.choice(sorted(own_processes(title))), kind)

    return disturb


def killed(title: str) -> Callable[[ChaosCluster, random.Random], None]:
    """Kills one of the processes of a title."""
    return signalled(title, signal.SIGKILL)


def hung(title: str) -> Callable[[ChaosCluster, random.Random], None]:
    """Stops one of the processes of a title without ending it."""
    return signalled(title, signal.SIGSTOP)


def node_killed(cluster: ChaosCluster, draw: random.Random) -> None:
    """A node with a pair is gone; another joins."""
    cluster.kill_node(draw)


def nothing(_: ChaosCluster, draw: random.Random) -> None:
    """The link's own faults are the disturbance, or there is none."""
    del draw


DISTURBANCES: dict[str, Callable[[ChaosCluster, random.Random], None]] = {
    "none": nothing,
    "context tower killed": killed("ray::ContextTowerActor"),
    "denoiser tower killed": killed("ray::DenoiserTowerActor"),
    "pair killed": killed("ray::ServeReplica:twotower:TowerPair"),
    "router killed": killed("ray::ServeReplica:twotower:Router"),
    "node killed": node_killed,
    "context tower hung": hung("ray::ContextTowerActor"),
    "denoiser tower hung": hung("ray::DenoiserTowerActor"),
    "link cut": nothing,
    "link slow": nothing,
}


def faults_of(disturbance: str, seed: int) -> LinkFaults | None:
    """What the links of a disturbance do by themselves."""
    if disturbance == "link cut":
        return LinkFaults(cut_at=random.Random(seed).randint(5, 60))
    return LinkFaults(delay_s=0.15) if disturbance == "link slow" else None


def requests_of(count: int, tokens: int) -> list[Request]:
    """Requests of all modes, every other one drawn at a temperature."""
    return [
        (
            TEXTS[index % len(TEXTS)],
            {
                "mode": MODES[index % len(MODES)],
                "max_tokens": tokens if MODES[index % len(MODES)] != "mock_ar" else tokens // 3,
                "block_size": 8,
                "temperature": float(index % 2),
                "seed": index,
            },
        )
        for index in range(count)
    ]


def alone(requests: Sequence[Request]) -> list[tuple[list[int], str]]:
    """Tokens and text of each request in one process, undisturbed."""
    model = TwoTower.from_pretrained()
    results = [model.generate([text], **options)[0] for text, options in requests]
    return [(list(result.token_ids), result.text) for result in results]


def receive(address: str, request: Request, seen: list[int], timeout_s: float = 300.0) -> Stream:
    """One stream, by a client of its own; each block's index goes into `seen` as it comes."""
    text, options = request
    with Client(address) as client:
        stream = client.generate(text, ignore_eos=True, timeout=timeout_s, **options)
        last, longest = time.monotonic(), 0.0
        blocks = []
        for block in stream:
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            blocks.append(block)
            seen.append(block.index)
        return Stream(
            stream.token_ids,
            "".join(block.text for block in blocks),
            [block.start - (stream.prompt_tokens or 0) for block in blocks],
            [block.index for block in blocks],
            all(a.start + len(a.token_ids) == b.start for a, b in pairwise(blocks)),
            stream.usage,
            longest,
            stream.resumes,
        )


def disturbed(
    address: str,
    requests: Sequence[Request],
    draw: random.Random,
    disturb: Callable[[], None],
    timeout_s: float = 300.0,
) -> tuple[list[Stream], int]:
    """The streams of all requests at once, and how many were running at the disturbance, which
    comes after a random number of blocks."""
    seen: list[int] = []
    with ThreadPoolExecutor(len(requests)) as pool:
        streams = [pool.submit(receive, address, one, seen, timeout_s) for one in requests]
        # In blocks: in seconds a fast machine would be done before.
        moment = draw.randrange(4 * len(requests))
        while len(seen) < moment and not all(stream.done() for stream in streams):
            time.sleep(0.001)
        time.sleep(draw.uniform(0.0, 0.05))
        running = sum(not stream.done() for stream in streams)
        disturb()
        return [stream.result(timeout=timeout_s) for stream in streams], running


def run_round(
    cluster: ChaosCluster,
    disturbance: str,
    requests: Sequence[Request],
    want: Sequence[tuple[list[int], str]],
    seed: int,
) -> Round:
    """All requests at once, disturbed once; what of it came out as it should."""
    draw = random.Random(f"{disturbance}/{seed}")
    begin = time.monotonic()
    disturb = partial(DISTURBANCES[disturbance], cluster, draw)
    received, running = disturbed(cluster.address, requests, draw, disturb)
    seconds = time.monotonic() - begin
    wrong = sum(
        (one.token_ids, one.text) != own or not one.gapless
        for one, own in zip(received, want, strict=True)
    )
    return Round(
        disturbance,
        seed,
        len(requests),
        running,
        wrong,
        cluster.left(),
        round(max(one.longest_pause_s for one in received), 2),
        round(statistics.median(one.longest_pause_s for one in received), 2),
        round(seconds, 1),
        sum(one.resumes for one in received),
    )


def run(
    disturbances: Sequence[str], streams: int, tokens: int, rounds: int, first_seed: int = 0
) -> list[Round]:
    """Rounds of every disturbance; those of the link get a cluster of their own each time."""
    seeds = range(first_seed, first_seed + rounds)
    requests = requests_of(streams, tokens)
    want = alone(requests)
    done = []
    # Faults of the link are there from its beginning: a cluster for each of those rounds.
    shared = [name for name in disturbances if faults_of(name, 0) is None]
    plans = [(None, [(name, seed) for name in shared for seed in seeds])] if shared else []
    plans += [
        (faults_of(name, seed), [(name, seed)])
        for name in disturbances
        if name not in shared
        for seed in seeds
    ]
    for faults, plan in plans:
        with chaos_cluster(faults) as cluster:
            for name, seed in plan:
                done.append(run_round(cluster, name, requests, want, seed))
                print(json.dumps(asdict(done[-1])), flush=True)
    return done


def table(rounds: Sequence[Round]) -> str:
    """One line per disturbance, as markdown."""
    lines = [
        "| disturbance | rounds | streams | running when it came | wrong | longest pause, s |"
        " median of the streams' longest, s | resumed by clients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(one.disturbance for one in rounds):
        own = [one for one in rounds if one.disturbance == name]
        lines.append(
            f"| {name} | {len(own)} | {sum(one.streams for one in own)} |"
            f" {min(one.running for one in own)} to {max(one.running for one in own)} |"
            f" {sum(one.wrong for one in own)} | {max(one.longest_pause_s for one in own)} |"
            f" {statistics.median(one.median_pause_s for one in own)} |"
            f" {sum(one.resumes for one in own)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Parses the arguments, disturbs, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", action="append", choices=list(DISTURBANCES))
    parser.add_argument("--streams", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a stream")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    args = parser.parse_args()
    disturbances = args.only or list(DISTURBANCES)
    rounds = run(disturbances, args.streams, args.tokens, args.rounds, args.seed)
    print(table(rounds))
    sys.exit(any(one.wrong or one.left for one in rounds))


if __name__ == "__main__":
    main()

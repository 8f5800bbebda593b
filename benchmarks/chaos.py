"""Streams of a service in which processes, nodes or links die, hang or slow down.

    python -m benchmarks.chaos                                   # all disturbances, 30 streams each
    python -m benchmarks.chaos --only "node killed" --rounds 3

A cluster of one head and three nodes on this machine, two pairs on different nodes. Every
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
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product

from tests.support.chaos_cluster import ChaosCluster, chaos_cluster
from tests.support.processes import own_processes
from tests.support.streams import Request, alone, disturbed, requests_of
from twotower import GenerationResult
from twotower.cluster.topology import LinkFaults


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
    """Kills a node that has a pair; another joins."""
    cluster.kill_node(draw)


def nothing(_: ChaosCluster, draw: random.Random) -> None:
    """No disturbance beside the faults of the links, if any."""
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
    """The faults of the links in rounds of a disturbance."""
    if disturbance == "link cut":
        return LinkFaults(cut_at=random.Random(seed).randint(5, 60))
    return LinkFaults(delay_s=0.15) if disturbance == "link slow" else None


def run_round(
    cluster: ChaosCluster,
    disturbance: str,
    requests: Sequence[Request],
    want: Sequence[GenerationResult],
    seed: int,
) -> Round:
    """Sends all requests at once, disturbs once, and compares the streams with `want`."""
    draw = random.Random(f"{disturbance}/{seed}")
    begin = time.monotonic()
    disturb = partial(DISTURBANCES[disturbance], cluster, draw)
    received, running = disturbed(cluster.address, requests, draw, disturb)
    seconds = time.monotonic() - begin
    wrong = sum(
        (stream.token_ids, stream.text) != (list(expected.token_ids), expected.text)
        or not stream.gapless
        for stream, expected in zip(received, want, strict=True)
    )
    return Round(
        disturbance,
        seed,
        len(requests),
        running,
        wrong,
        cluster.left(),
        round(max(stream.longest_pause_s for stream in received), 2),
        round(statistics.median(stream.longest_pause_s for stream in received), 2),
        round(seconds, 1),
        sum(stream.resumes for stream in received),
    )


def run(
    disturbances: Sequence[str], streams: int, tokens: int, rounds: int, first_seed: int = 0
) -> list[Round]:
    """Rounds of every disturbance, on one cluster. Pairs have the faults of a link from their
    beginning: they are replaced before and after a round that has any."""
    requests = requests_of(streams, tokens)
    want = alone(requests)
    done = []
    with chaos_cluster() as cluster:
        present: LinkFaults | None = None
        for name, seed in product(disturbances, range(first_seed, first_seed + rounds)):
            faults = faults_of(name, seed)
            if faults is not None or present is not None:
                cluster.link_with(faults)
                present = faults
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
    for name in dict.fromkeys(each.disturbance for each in rounds):
        same = [each for each in rounds if each.disturbance == name]
        lines.append(
            f"| {name} | {len(same)} | {sum(each.streams for each in same)} |"
            f" {min(each.running for each in same)} to {max(each.running for each in same)} |"
            f" {sum(each.wrong for each in same)} | {max(each.longest_pause_s for each in same)} |"
            f" {statistics.median(each.median_pause_s for each in same)} |"
            f" {sum(each.resumes for each in same)} |"
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
    sys.exit(any(each.wrong or each.left for each in rounds))


if __name__ == "__main__":
    main()

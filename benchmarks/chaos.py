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


def run_round(
    cluster: ChaosCluster,
    disturbance: str,
    requests: Sequence[Request],
    want: Sequence[GenerationResult],
    seed: int,
) -> Round:
    """All requests at once, disturbed once; what of it came out as it should."""
    draw = random.Random(f"{disturbance}/{seed}")
    begin = time.monotonic()
    disturb = partial(DISTURBANCES[disturbance], cluster, draw)
    received, running = disturbed(cluster.address, requests, draw, disturb)
    seconds = time.monotonic() - begin
    wrong = sum(
        (one.token_ids, one.text) != (list(expected.token_ids), expected.text) or not one.gapless
        for one, expected in zip(received, want, strict=True)
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

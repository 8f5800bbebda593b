"""A fleet in simulated time: the service's own routing and scaling over 1,000 pairs.

    python -m benchmarks.fleet_sim
    python -m benchmarks.fleet_sim --small
    python -m benchmarks.fleet_sim --pairs 40 --routers 10 --requests 4000 --seed 1

What chooses a pair, learns which prompts begin alike, avoids and probes pairs, moves rows that
wait, counts losses and decides on the number of pairs are the classes of the service, one set for
each router, run on a clock that is set from event to event; the look at queues is Serve's own.
Pairs, clients and the network are simulated (`benchmarks/fleet/`): a call takes no time, a pair
reports every two seconds, and its rows advance alike, the slower the more there are.

Prints one JSON object: what decisions cost at 10, 100 and 1,000 pairs (wall and CPU time of the
service's classes, which is the only thing here that depends on the machine), then for a steady
load, the loss of a pair, of a router and of a third of all pairs, and a rolling update: times to
the first block, imbalance of the pairs, tokens found in prefix caches beside what one cache of all
pairs would have had, and what went on elsewhere; and whether anything was lost. The same seed gives
the same figures, whatever the machine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from benchmarks.fleet.costs import decisions
from benchmarks.fleet.fleet import Size
from benchmarks.fleet.scenario import compare

SMALL = Size(pairs=30, routers=10, requests=1500)


def main() -> None:
    """Parses the arguments, simulates, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--routers", type=int, default=100)
    parser.add_argument("--requests", type=int, default=100_000, help="at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--small", action="store_true", help="30 pairs, 10 routers, 1,500 requests")
    parser.add_argument("--costs", type=int, default=1000, help="decisions that are timed")
    args = parser.parse_args()
    size = SMALL if args.small else Size(args.pairs, args.routers, args.requests)
    costs = {pairs: decisions(pairs, args.costs, args.seed) for pairs in (10, 100, 1000)}
    found = compare(size, replace(size, affinity=False), args.seed)
    asked = {"pairs": size.pairs, "routers": size.routers, "requests": size.requests}
    print(json.dumps({**asked, "seed": args.seed, "costs": costs, **found}, indent=2))


if __name__ == "__main__":
    main()

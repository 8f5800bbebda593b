"""Drafts over gRPC: tokens/s of verified and auto beside ar, with few and many rows in flight.

    python -m benchmarks.drafts_service [--model DIR] [--rows 1 16] [--prompts 32] [--rounds 5]

A service of one pair on this machine, without a prefix cache; router, replica, both towers with a
thread each and the client share the processor. The same held-out prompts are sent in every mode,
so many at a time; modes take turns, and the order turns by one every round. Tokens/s are all tokens
that have come over the seconds from the first request to the last token, reading the prompts
included; a ratio is the median of those to ar in the same round. The first round warms up. Prints a
table, and writes JSON to a file; the exit code is 1 if an output differs from ar's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.concurrency import Window, over_grpc
from benchmarks.figures import median
from benchmarks.in_process import load_local
from benchmarks.machine import machine
from benchmarks.service import MAX_CONTEXT, SERVICE_THREADS, service_config
from benchmarks.side_by_side import ratio, spread
from benchmarks.tables import keep, table
from benchmarks.verified import token_ids
from twotower.client import Client
from twotower.deployments.server.server import LocalService

MODES: dict[str, dict[str, str]] = {
    "ar": {"mode": "ar"},
    "verified": {"mode": "verified"},
    "auto": {"mode": "auto", "quality": "ar"},
}
TARGETS = {1: 1.7, 16: 1.3}
Windows = Mapping[str, Sequence[Window]]


def main() -> int:
    """Parses the arguments, measures, prints a table; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", help="checkpoint folder; the shipped model if left out")
    parser.add_argument("--rows", type=int, nargs="+", default=(1, 16), help="requests at once")
    parser.add_argument("--prompts", type=int, default=32, help="held-out prompts of a round")
    parser.add_argument(
        "--prompts-alone", type=int, default=8, help="those of a round with one row at a time"
    )
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="file for all figures")
    args = parser.parse_args()
    prompts = token_ids(load_local(args.model, 1, MAX_CONTEXT), args.prompts)
    with (
        LocalService(service_config(args.model, max(args.rows))) as service,
        Client(service.address) as client,
    ):
        by_rows = {
            rows: windows_of(
                client, prompts[: args.prompts_alone] if rows == 1 else prompts, rows, args
            )
            for rows in args.rows
        }
    found = {
        "machine": machine(SERVICE_THREADS),
        "tokens": args.tokens,
        "rows": {rows: figures(windows) for rows, windows in by_rows.items()},
    }
    print(shown(found["rows"]))
    keep(found, args.json)
    return 0 if all(part["equal"] for part in found["rows"].values()) else 1


def windows_of(
    client: Client, prompts: list[list[int]], rows: int, args: argparse.Namespace
) -> dict[str, list[Window]]:
    """The windows of every mode, by round, without the first."""
    found: dict[str, list[Window]] = {name: [] for name in MODES}
    names = list(MODES)
    for number in range(args.rounds + 1):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            window = over_grpc(client, prompts, args.tokens, rows, **MODES[name])
            found[name].append(window)
    return {name: windows[1:] for name, windows in found.items()}


def figures(windows: Windows) -> dict[str, Any]:
    """Tokens/s, their ratio to ar's, passes of both towers, and whether outputs are equal."""
    speeds = {name: [one.tokens_per_s for one in runs] for name, runs in windows.items()}
    outputs = {
        tuple(stream.token_ids for stream in window.streams)
        for runs in windows.values()
        for window in runs
    }
    modes = {
        name: {
            "tokens_per_s": median(speeds[name]),
            "over_ar": ratio(speeds[name], speeds["ar"]),
            "context_passes": median(run.grown("context", "passes") for run in runs),
            "denoiser_passes": median(run.grown("denoiser", "passes") for run in runs),
        }
        for name, runs in windows.items()
    }
    return {"equal": len(outputs) == 1, "modes": modes}


def shown(by_rows: Mapping[int, dict[str, Any]]) -> str:
    """The table of all numbers of rows."""
    columns = ("tokens/s", "over ar", "target", "context passes", "denoiser passes")
    lines = {}
    for rows, part in by_rows.items():
        for name, mode in part["modes"].items():
            target = TARGETS.get(rows) if name != "ar" else None
            passes = mode["context_passes"], mode["denoiser_passes"]
            cells = (mode["tokens_per_s"], spread(mode["over_ar"]), target, *passes)
            lines[f"{name}, {rows} at a time"] = cells
    return table(columns, lines)


if __name__ == "__main__":
    sys.exit(main())

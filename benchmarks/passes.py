"""Passes on a CPU, this source tree and another in turn.

    git worktree add --detach ../before COMMIT
    python -m benchmarks.passes --before ../before [--model shipped] [--avx2] [--rounds 7]

Two processes, one for each tree, load the same checkpoint and time the same passes on one thread:
`ar` steps, denoiser passes of blocks of 16 tokens, a prompt. They take turns, as machines are
shared. Prints CPU ms a pass and the median of the pairs' ratios with their range.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.random_checkpoint import MEDIUM, write_random_checkpoint
from benchmarks.tables import table
from twotower.towers.checkpoint.weights import SHIPPED_MODEL

HERE = Path(__file__).resolve().parents[1]
WORKER = HERE / "benchmarks" / "pass_worker.py"
# Passes of a turn.
COUNTS = {
    "ar, 1 row": 20,
    "ar, 16 rows": 8,
    "denoiser, 1 row": 15,
    "denoiser, 16 rows": 3,
    "prompt of 2,048": 1,
}
AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}


class Tree:
    """A worker on the source of one tree; ends with the `with` block."""

    def __init__(self, tree: Path, folder: Path, variables: dict[str, str]) -> None:
        environment = {**os.environ, **variables, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        self._worker: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, str(WORKER), str(folder)],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        # Otherwise this would compare a tree with itself.
        assert Path(self._answer()["tree"]) == tree, "the worker has another tree's package"

    def __enter__(self) -> Tree:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._worker.stdin is not None
        self._worker.stdin.close()
        self._worker.wait(30)

    def timed(self, name: str) -> float:
        """CPU milliseconds a pass."""
        assert self._worker.stdin is not None
        self._worker.stdin.write(f"{name} {COUNTS[name]}\n")
        self._worker.stdin.flush()
        return float(self._answer())

    def _answer(self) -> Any:
        assert self._worker.stdout is not None
        return json.loads(self._worker.stdout.readline())


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, required=True, help="folder of the other tree")
    parser.add_argument("--model", choices=["shipped", "medium"], default="medium")
    parser.add_argument("--avx2", action="store_true", help="as on a CPU without AVX-512")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    variables = AVX2 if args.avx2 else {}
    with tempfile.TemporaryDirectory() as made:
        folder = SHIPPED_MODEL
        if args.model == "medium":
            folder = Path(made)
            write_random_checkpoint(folder, MEDIUM)
        before = Tree(args.before.resolve(), folder, variables)
        now = Tree(HERE, folder, variables)
        with before, now:
            rows = {name: compared(before, now, name, args.rounds) for name in COUNTS}
    print(table(["before ms", "now ms", "before / now", "from", "to"], rows))


def compared(before: Tree, now: Tree, name: str, rounds: int) -> list[float]:
    """Medians of both trees, and of the ratios of their turns with the least and the most."""
    for tree in (before, now):
        tree.timed(name)
    pairs = []
    for number in range(rounds):
        order = (before, now) if number % 2 == 0 else (now, before)
        found = {tree: tree.timed(name) for tree in order}
        pairs.append((found[before], found[now]))
    ratios = [first / second for first, second in pairs]
    medians = [statistics.median(side) for side in zip(*pairs, strict=True)]
    return [*medians, statistics.median(ratios), min(ratios), max(ratios)]


if __name__ == "__main__":
    main()

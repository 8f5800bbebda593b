"""Seeds faults into a copy of the source, one at a time, and says which the tests catch.

    python -m tools.mutants                      # every fault of tools/faults.py
    python -m tools.mutants --only scheduler breaker
    python -m tools.mutants --tree ../other      # the tests and source of another checkout

A fault replaces a few characters of one source file, which is found by the text that is replaced.
Its tests run until the first failure. Prints a table; exit code 1 if a fault was not caught or a
named test fails without a fault, 2 if a fault does not apply to the source any more.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tools.faults import FAULTS, Fault

ROOT = Path(__file__).parents[1]
COPIED = ("*.toml", "kernels", "towers", "cluster", "deployments", "protos", "twotower", "tests")
COPIED += ("benchmarks", "tools")
# Many times what the slowest named tests take: a fault may make them wait without an end.
TIMEOUT_S = 120.0


class FaultError(Exception):
    """A fault does not apply to the source."""


def copy_tree(source: Path, target: Path) -> None:
    """Copies what tests need; links of `twotower/` stay links."""
    for pattern in COPIED:
        for path in source.glob(pattern):
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__")
                shutil.copytree(path, target / path.name, symlinks=True, ignore=ignored)
            else:
                shutil.copy(path, target / path.name)


def source_of(tree: Path, fault: Fault) -> Path:
    """The file below the fault's folders that has its text, once. Raises FaultError."""
    counts = {
        path: path.read_text(encoding="utf-8").count(fault.old)
        for folder in fault.folders.split()
        for path in sorted((tree / folder).rglob("*.py"))
    }
    found = [path for path, count in counts.items() if count]
    if len(found) != 1 or counts[found[0]] != 1:
        places = ", ".join(f"{path.relative_to(tree)} ({counts[path]})" for path in found)
        raise FaultError(
            f"{fault.name}: {fault.old!r} must stand once in {fault.folders}: {places or 'nowhere'}"
        )
    return found[0]


def tests_of(tree: Path, fault: Fault) -> list[Path]:
    """The test files that a fault names. Raises FaultError for a name without a file."""
    paths = []
    for name in fault.tests.split():
        found = sorted((tree / "tests").rglob(f"{name}.py"))
        if len(found) != 1:
            raise FaultError(f"{fault.name}: {len(found)} files are called {name}.py, expected 1")
        paths.append(found[0])
    return paths


def run_tests(
    tree: Path, files: Sequence[Path], timeout_s: float = TIMEOUT_S
) -> tuple[int | None, str]:
    """Exit code of pytest (None: it took too long) and its last lines."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--tb=no"]
    try:
        done = subprocess.run(
            [*command, *map(str, files)],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stdout[-2000:] + done.stderr[-2000:]


def verdict_of(tree: Path, fault: Fault) -> str:
    """Applies a fault, runs its tests and takes it back: "caught" or "missed"."""
    path = source_of(tree, fault)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")
    try:
        code, output = run_tests(tree, tests_of(tree, fault))
    finally:
        path.write_text(text, encoding="utf-8")
    if code not in (0, 1, None):
        raise FaultError(f"{fault.name}: pytest ended with {code}: {output}")
    return "missed" if code == 0 else "caught"


def run(tree: Path, faults: Sequence[Fault]) -> int:
    """Runs all faults on a tree and prints a table; returns how many were missed."""
    named = sorted({path for fault in faults for path in tests_of(tree, fault)})
    for fault in faults:
        source_of(tree, fault)
    code, output = run_tests(tree, named, len(named) * TIMEOUT_S)
    if code != 0:
        raise SystemExit(f"tests fail without a fault: {output}")
    print("| fault | file | seconds | |\n|---|---|---|---|", flush=True)
    missed = 0
    for fault in faults:
        begin = time.monotonic()
        place = source_of(tree, fault).relative_to(tree)
        verdict = verdict_of(tree, fault)
        missed += verdict == "missed"
        seconds = time.monotonic() - begin
        print(f"| {fault.name} | {place} | {seconds:.0f} | {verdict} |", flush=True)
    print(f"\n{len(faults) - missed} of {len(faults)} faults are caught")
    return missed


def main() -> None:
    """Parses the arguments, copies the tree, runs the faults."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="faults that begin with these")
    parser.add_argument("--tree", type=Path, default=ROOT, help="the checkout to copy")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if fault.name.startswith(tuple(args.only))]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder).resolve()
        copy_tree(args.tree.resolve(), tree)
        try:
            missed = run(tree, faults)
        except FaultError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()

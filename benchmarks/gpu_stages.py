"""Runs all checks and measurements of a GPU: `python -m benchmarks.gpu_stages OUT --plan h200`.

A stage is a set of processes with a time limit, so that neither an illegal access nor a hang ends
the other stages. As soon as a stage has ended, its figures are in OUT/stages.json, and as tables in
OUT/stages.md; its output is in OUT/logs. `--resume` leaves out stages that are done in OUT,
`--budget` begins no stage that might not end in time, `--dry` runs every stage at tiny shapes on a
CPU. Needs torch, triton, safetensors, tokenizers, transformers and pytest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import PLANS, Stage, stages
from benchmarks.gpu.tables import table_of

Entry = dict[str, Any]
# A stage that has less than this share of its limit left is not begun.
_WORTH = 0.4
_TAIL_LINES = 25


def main() -> int:
    args = _parser().parse_args()
    wanted = [
        stage
        for stage in stages(args.plan, dry=args.dry)
        if not args.only or stage.name in args.only
    ]
    book = Book(args.out, resume=args.resume)
    deadline = time.monotonic() + args.budget
    for stage in wanted:
        if book.has(stage.name):
            print(f"{stage.name}: done before", flush=True)
            continue
        left = deadline - time.monotonic()
        if left < _WORTH * stage.seconds:
            book.add({"stage": stage.name, "status": "left out", "reason": f"{left:.0f} s left"})
            continue
        book.add(run_stage(stage, args.out, min(stage.seconds, left)))
    return 1 if book.any_failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="folder for results and logs")
    parser.add_argument("--plan", choices=list(PLANS), default="h200")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages alone")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds for all stages")
    parser.add_argument("--resume", action="store_true", help="leave out what is done in OUT")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU")
    return parser


class Book:
    """Entries of all stages, in a JSON and a Markdown file that are written after each stage."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._json, self._table = folder / "stages.json", folder / "stages.md"
        self._entries: list[Entry] = []
        if resume and self._json.exists():
            known = json.loads(self._json.read_text(encoding="utf-8"))
            self._entries = [entry for entry in known if entry["status"] == "done"]

    def has(self, name: str) -> bool:
        """True if a stage is done."""
        return any(entry["stage"] == name for entry in self._entries)

    def add(self, entry: Entry) -> None:
        """Writes a stage's entry, and prints its table."""
        self._entries.append(entry)
        scratch = self._json.with_suffix(".part")
        scratch.write_text(json.dumps(self._entries, indent=1), encoding="utf-8")
        os.replace(scratch, self._json)
        self._table.write_text("\n".join(map(table_of, self._entries)), encoding="utf-8")
        print(table_of(entry), flush=True)

    @property
    def any_failed(self) -> bool:
        return any(entry["status"] == "failed" for entry in self._entries)


@dataclass(frozen=True)
class _Job:
    """A process of a stage, and the files for its figures and its output."""

    command: tuple[str, ...]
    out: Path
    log: Path


def run_stage(stage: Stage, folder: Path, seconds: float) -> Entry:
    """Runs a stage's processes within `seconds`; their exit codes, last lines and figures."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    jobs = [
        _Job(
            command,
            folder / f"{stage.name}-{index}.json",
            folder / "logs" / f"{stage.name}-{index}.log",
        )
        for index, command in enumerate(stage.commands)
    ]
    begun = time.monotonic()
    with ThreadPoolExecutor(stage.workers) as pool:
        runs = list(pool.map(lambda job: _run(job, begun + seconds), jobs))
    failed = any(run["exit"] != 0 for run in runs)
    return {
        "stage": stage.name,
        "status": "failed" if failed else "done",
        "seconds": round(time.monotonic() - begun, 1),
        "runs": runs,
    }


def _run(job: _Job, deadline: float) -> Entry:
    """Runs a process; `exit` in its entry is None if it was ended at the deadline."""
    job.out.unlink(missing_ok=True)
    command = [word.replace("{out}", str(job.out)) for word in job.command]
    left = deadline - time.monotonic()
    begun = time.monotonic()
    entry: Entry = {"command": command[1:], "exit": None}
    if left > 0:
        with job.log.open("w", encoding="utf-8") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": "."},
                # So that its child processes, such as compilers, can be ended with it.
                start_new_session=True,
            )
            try:
                entry["exit"] = process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        entry["tail"] = job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        entry["tail"] = entry["tail"][-_TAIL_LINES:]
    entry["seconds"] = round(time.monotonic() - begun, 1)
    entry["figures"] = _figures(job.out)
    return entry


def _figures(path: Path) -> Any:
    """The figures that a process wrote; None if it wrote none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    sys.exit(main())

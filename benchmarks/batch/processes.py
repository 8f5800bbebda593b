"""A batch job as a process of its own, watched and killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

SAMPLE_S = 5.0


@dataclass
class Memory:
    """Resident memory in MiB over a run's time, by kind of process: the largest of each kind."""

    samples: list[tuple[float, dict[str, float]]] = field(default_factory=list)

    def growth(self, kind: str) -> float | None:
        """The most of the second half over the most of the first, the start left out: what is
        loaded in the first tenth is loaded once."""
        values = [(at, sizes[kind]) for at, sizes in self.samples if kind in sizes]
        if len(values) < 8:
            return None
        begin, end = values[0][0], values[-1][0]
        middle, start = (begin + end) / 2, begin + (end - begin) / 10
        first = [size for at, size in values if start <= at < middle]
        second = [size for at, size in values if at >= middle]
        return round(max(second) / max(first), 3) if first and second else None

    def most(self, kind: str) -> float:
        """The largest size of a kind."""
        return round(max((sizes.get(kind, 0.0) for _, sizes in self.samples), default=0.0), 1)

    def kinds(self) -> list[str]:
        """All kinds that were seen."""
        return sorted({kind for _, sizes in self.samples for kind in sizes})


class JobProcess:
    """`twotower batch` in a process group of its own."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        self.began = time.monotonic()
        self._log = log.open("a", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "twotower.cli", "batch", *arguments],
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def seconds(self) -> float:
        """Seconds since its start."""
        return time.monotonic() - self.began

    def watch(self, until_s: float, memory: Memory) -> bool:
        """Samples memory until the job ends (True) or so many seconds have passed since its
        start."""
        while self.seconds() < until_s:
            if self.process.poll() is not None:
                return True
            memory.samples.append((self.seconds(), self._sizes()))
            time.sleep(SAMPLE_S)
        return self.process.poll() is not None

    def kill(self) -> None:
        """Kills the driver alone, as an operator's `kill -9` does; what it has started ends by
        itself."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def summary(self) -> dict[str, Any]:
        """The job's summary. Raises RuntimeError if it failed."""
        stdout, _ = self.process.communicate()
        self._log.close()
        if self.process.returncode != 0:
            raise RuntimeError(
                f"the job ended with {self.process.returncode}: see {self._log.name}"
            )
        found: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        return found

    def _sizes(self) -> dict[str, float]:
        sizes: dict[str, float] = {}
        for process in [psutil.Process(self.process.pid), *_children(self.process.pid)]:
            try:
                kind = _kind(process, self.process.pid)
                size = process.memory_info().rss / 2**20
            except psutil.Error:
                continue
            if kind is not None:
                sizes[kind] = max(sizes.get(kind, 0.0), size)
        return sizes


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _kind(process: psutil.Process, driver: int) -> str | None:
    """`driver`, or the name that Ray gives a worker's process; None for the rest of Ray."""
    if process.pid == driver:
        return "driver"
    name = " ".join(process.cmdline())
    if not name.startswith("ray::"):
        return None
    return "caller" if "MapBatches" in name or "MapWorker" in name else "other workers"

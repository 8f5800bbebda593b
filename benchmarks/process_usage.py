"""Processor time and memory of a service's processes, by what they are, from /proc. Linux only."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
OTHERS = "other"


@dataclass(frozen=True)
class Usage:
    """Processor seconds so far and resident bytes of one process, or of several together."""

    cpu_s: float
    rss: int

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.cpu_s + other.cpu_s, self.rss + other.rss)


# A process, and the group to which it belongs.
Usages = Mapping[int, tuple[str, Usage]]


def usages(groups: Mapping[str, str], root: int, proc: Path = PROC) -> Usages:
    """The usage of all descendants of process `root`, each in the first group with whose title its
    own begins, else in OTHERS."""
    parents = {}
    for folder in proc.iterdir():
        if folder.name.isdecimal() and (parent := parent_of(folder)) is not None:
            parents[int(folder.name)] = parent
    found = {}
    for process in parents:
        if root in _ancestors(process, parents) and (usage := usage_of(proc / str(process))):
            found[process] = (_group(proc / str(process), groups), usage)
    return found


def spent(before: Usages, after: Usages) -> dict[str, float]:
    """Processor seconds by group between two readings; a process that began in between counts from
    its beginning, one that has ended not at all."""
    seconds: defaultdict[str, float] = defaultdict(float)
    for process, (group, usage) in after.items():
        seconds[group] += usage.cpu_s - (before[process][1].cpu_s if process in before else 0.0)
    return dict(seconds)


def resident(found: Usages) -> dict[str, int]:
    """Resident bytes by group."""
    total: defaultdict[str, int] = defaultdict(int)
    for group, usage in found.values():
        total[group] += usage.rss
    return dict(total)


def parent_of(folder: Path) -> int | None:
    """The parent of the process of a folder of /proc; None if it has ended."""
    fields = _stat(folder)
    return int(fields[1]) if fields else None


def usage_of(folder: Path) -> Usage | None:
    """The usage of the process of a folder of /proc; None if it has ended."""
    fields = _stat(folder)
    if not fields:
        return None
    ticks = int(fields[11]) + int(fields[12])
    pages = int(fields[21])
    return Usage(ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE"))


def _stat(folder: Path) -> list[str]:
    """The fields of `stat` after the command, which may itself have spaces and parentheses."""
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    return text.rpartition(")")[2].split()


def _group(folder: Path, groups: Mapping[str, str]) -> str:
    try:
        title = (folder / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return OTHERS
    return next((name for name, head in groups.items() if title.startswith(head)), OTHERS)


def _ancestors(process: int, parents: Mapping[int, int]) -> set[int]:
    found: set[int] = set()
    while (process := parents.get(process, 0)) and process not in found:
        found.add(process)
    return found

"""What this process may use of its machine: CPUs by affinity and control groups, memory by those.

A container shows its host's CPUs and memory to whoever counts them, and gives a share. Groups are
nested, and the tightest of them counts: the process's own, and each above it as far as it is
visible. Both versions of control groups are read, also side by side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc/self")
# More would only be refused by the system, or take it along.
MOST_THREADS = 1024
# Without a limit: more than any machine has.
NO_LIMIT = 1 << 62


def usable_cpus(proc: Path = PROC) -> int:
    """CPUs that this process can keep busy: whole ones, at least 1.

    A share of a CPU is left out: with a thread more than the quota all of them are stopped, again
    and again.
    """
    return max(1, int(min(_allowed_cpus(), _cpu_quota(proc))))


def limit_threads() -> None:
    """Takes no more threads for arithmetic than there are CPUs to use. Fewer stay as they are."""
    most = usable_cpus()
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)


def group_bytes(proc: Path = PROC) -> int:
    """Memory that the control groups leave; without a limit, more than any machine has."""
    return min((_bytes_left(group) for group in _groups("memory", proc)), default=NO_LIMIT)


@dataclass(frozen=True)
class _Group:
    """A control group's folder; version 1 and 2 have other files in it."""

    folder: Path
    version: int

    def read(self, name: str) -> str | None:
        """A file's text; None without such a file."""
        try:
            return (self.folder / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def number(self, name: str) -> int | None:
        """A file's number; None if there is none or it says that there is no limit."""
        return _number(self.read(name) or "")


def _number(text: str) -> int | None:
    """A number of at least 0: `max`, or -1 in version 1, is no limit."""
    return int(text) if text.isdecimal() and text.isascii() else None


def _allowed_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(proc: Path) -> float:
    """CPUs' time that the tightest group gives, in CPUs."""
    return min((_quota_of(group) for group in _groups("cpu", proc)), default=float(NO_LIMIT))


def _quota_of(group: _Group) -> float:
    if group.version == 2:
        first, _, second = (group.read("cpu.max") or "").partition(" ")
        quota, period = _number(first), _number(second or "100000")
    else:
        quota, period = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    return quota / period if quota and period else float(NO_LIMIT)


def _bytes_left(group: _Group) -> int:
    """A limit less what is used. Cached files that nobody has asked for lately do not count: they
    make way, and after a checkpoint was read they may be most of it."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }
    limit_file, used_file, cached_name = names[group.version]
    limit, used = group.number(limit_file), group.number(used_file)
    if limit is None or used is None:
        return NO_LIMIT
    cached = re.search(rf"^{cached_name} (\d+)$", group.read("memory.stat") or "", re.MULTILINE)
    used -= min(used, int(cached[1])) if cached else 0
    return min(NO_LIMIT, max(0, limit - used))


def _groups(controller: str, proc: Path) -> Iterator[_Group]:
    """The groups that this process is in for a controller, from its own upwards."""
    paths = _paths_by_controller(proc)
    for version, root, mount, controllers in _mounts(proc):
        if version == 1 and controller not in controllers:
            continue
        path = paths.get("" if version == 2 else controller)
        if path is None:
            continue
        folder = mount / _below(path, root)
        while True:
            yield _Group(folder, version)
            if folder == mount:
                break
            folder = folder.parent


def _paths_by_controller(proc: Path) -> dict[str, str]:
    """The process's group by controller; version 2 has one for all, here by an empty name."""
    lines = _lines(proc / "cgroup")
    fields = (line.split(":", 2) for line in lines if line.count(":") >= 2)
    return {name: path for _, names, path in fields for name in names.split(",")}


def _mounts(proc: Path) -> Iterator[tuple[int, str, Path, list[str]]]:
    """Version, root, mount point and controllers of each mount of control groups."""
    for line in _lines(proc / "mountinfo"):
        own, _, kind = line.partition(" - ")
        own_fields, kind_fields = own.split(" "), kind.split(" ")
        if len(own_fields) < 5 or kind_fields[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind_fields[0] == "cgroup2" else 1
        yield version, own_fields[3], Path(_plain(own_fields[4])), kind_fields[-1].split(",")


def _below(path: str, root: str) -> str:
    """A group's path below a mount's root. A container may see its own group as the root while
    its path is the host's: then the mount itself is its group."""
    top = root.rstrip("/") + "/"
    if ".." in path or not path.startswith(top):
        return ""
    return path.removeprefix(top)


def _plain(text: str) -> str:
    """A path of mountinfo, in which blanks and the like are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []

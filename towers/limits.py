"""Limits of this process: CPUs by affinity and control groups, memory by control groups.

In a container the operating system reports the CPUs and memory of the host, of which the process
gets a share. Control groups are nested and the tightest limit counts: that of the process's group,
and of each group above it that is visible. Versions 1 and 2 are read, also side by side.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

PROC = Path("/proc/self")
# Most threads that a user may ask for: the system could refuse more, or run out of memory.
MOST_THREADS = 1024
# Bytes, or CPUs, where there is no limit: more than any machine has.
NO_LIMIT = 1 << 62


def usable_cpus(proc: Path = PROC) -> int:
    """Number of CPUs that this process can keep busy, at least 1.

    A quota is rounded down: with a thread more than the quota, the system stops all threads of the
    process again and again.
    """
    return max(1, int(min(_allowed_cpus(), _cpu_quota(proc))))


def limit_threads() -> None:
    """Sets torch's threads to `usable_cpus` if there are more; fewer stay as they are."""
    most = usable_cpus()
    if torch.get_num_threads() > most:
        torch.set_num_threads(most)


def group_bytes(proc: Path = PROC) -> int:
    """Bytes of memory that the control groups leave free; NO_LIMIT without a limit."""
    return min((_bytes_left(group) for group in _groups("memory", proc)), default=NO_LIMIT)


@dataclass(frozen=True)
class _Group:
    """The folder of a control group, and its version (1 or 2), by which its files are named."""

    folder: Path
    version: int

    def read(self, name: str) -> str | None:
        """The text of a file; None if it cannot be read."""
        try:
            return (self.folder / name).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError):
            return None

    def number(self, name: str) -> int | None:
        """The number in a file; None without the file, and if it means no limit."""
        return _number(self.read(name) or "")


def _number(text: str) -> int | None:
    """A number of at least 0; None for `max`, or -1 in version 1, which mean no limit."""
    return int(text) if text.isdecimal() and text.isascii() else None


def _allowed_cpus() -> int:
    """CPUs in the process's affinity mask, or all where the system has none."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_quota(proc: Path) -> float:
    """CPU time per wall-clock time that the tightest group allows, in CPUs."""
    return min((_quota_of(group) for group in _groups("cpu", proc)), default=float(NO_LIMIT))


def _quota_of(group: _Group) -> float:
    """The group's CPU quota over its period, in CPUs; NO_LIMIT without a quota."""
    if group.version == 2:
        first, _, second = (group.read("cpu.max") or "").partition(" ")
        quota, period = _number(first), _number(second or "100000")
    else:
        quota, period = group.number("cpu.cfs_quota_us"), group.number("cpu.cfs_period_us")
    return quota / period if quota and period else float(NO_LIMIT)


def _bytes_left(group: _Group) -> int:
    """Bytes of the group's memory limit that are not in use.

    Inactive cached files count as free: the system drops them when memory is needed, and after a
    checkpoint was read they may be most of what is used.
    """
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
    """The groups that limit `controller` for this process, from its group upwards."""
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
    """The path of the process's group by controller; version 2 has a single group for all, under
    the empty name."""
    lines = _lines(proc / "cgroup")
    fields = (line.split(":", 2) for line in lines if line.count(":") >= 2)
    return {name: path for _, names, path in fields for name in names.split(",")}


def _mounts(proc: Path) -> Iterator[tuple[int, str, Path, list[str]]]:
    """Version, root, mount point and controllers of each mount of control groups."""
    for line in _lines(proc / "mountinfo"):
        mount, _, filesystem = line.partition(" - ")
        fields, kind = mount.split(" "), filesystem.split(" ")
        if len(fields) < 5 or kind[0] not in ("cgroup", "cgroup2"):
            continue
        version = 2 if kind[0] == "cgroup2" else 1
        yield version, fields[3], Path(_plain(fields[4])), kind[-1].split(",")


def _below(path: str, root: str) -> str:
    """A group's path relative to a mount's root. In a container the mount may show the container's
    group as the root while the path is that of the host: then the mount itself is the group."""
    top = root.rstrip("/") + "/"
    if ".." in path or not path.startswith(top):
        return ""
    return path.removeprefix(top)


def _plain(text: str) -> str:
    """A path of mountinfo, with octal escapes (of blanks and the like) replaced."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []

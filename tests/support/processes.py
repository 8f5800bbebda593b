"""Finds processes that this one has started."""

from __future__ import annotations

import os
from pathlib import Path


def own_processes(title: str) -> list[int]:
    """Process ids of that title among this process's descendants."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and title in _read(entry / "cmdline"):
            process = int(entry.name)
            if os.getpid() in ancestors(process):
                found.append(process)
    return found


def ancestors(process: int) -> list[int]:
    """The process ids of a process's parent, its parent's parent and so on."""
    found = []
    while process > 1:
        fields = _read(Path(f"/proc/{process}/stat")).rpartition(")")[2].split()
        process = int(fields[1]) if fields else 0
        found.append(process)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

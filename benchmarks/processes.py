"""Finds processes that this one has started."""

from __future__ import annotations

import os
from pathlib import Path


def own_processes(title: str) -> list[int]:
    """Process ids of that title among this process's descendants."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and title in _read(entry / "cmdline"):
            parent = int(entry.name)
            while parent > 1 and parent != os.getpid():
                fields = _read(Path(f"/proc/{parent}/stat")).rpartition(")")[2].split()
                parent = int(fields[1]) if fields else 0
            if parent == os.getpid():
                found.append(int(entry.name))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""

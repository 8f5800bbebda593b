"""Freed frames stay with the process: the next ones need no new pages."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# Eight updates' worth of frames, freed at once as `apply` frees them; page faults of later rounds.
ROUNDS = """
import resource, sys
from twotower.cluster.channel.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for number in range(6):
    if number == 2:
        before = faults()
    frames = [b"x" * (1 << 20) for _ in range(40)]
    del frames
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_frames_are_used_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", ROUNDS, how]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
        )
        return int(done.stdout)

    # Four rounds of 40 MiB are 40960 pages of 4 KiB.
    assert faults("kept") < 1000 < faults("left alone")

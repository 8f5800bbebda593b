"""Readings of a folder that looks like /proc, and of this process."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.process_usage import OTHERS, Usage, resident, spent, usage_of, usages

TICK = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")
GROUPS = {"router": "ray::Replica:Router", "pair": "ray::Replica:Pair"}


def process(proc: Path, number: int, parent: int, title: str, ticks: int, pages: int) -> None:
    """Writes what the kernel says of a process: half of its time is the system's."""
    folder = proc / str(number)
    folder.mkdir(exist_ok=True)
    fields = ["S", str(parent), *["0"] * 9, str(ticks // 2), str(ticks - ticks // 2), *["0"] * 8]
    command = f"{number} (odd) name) "
    (folder / "stat").write_text(command + " ".join([*fields, str(pages), "0"]), encoding="utf-8")
    (folder / "cmdline").write_bytes(title.encode() + b"\0")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    process(tmp_path, 10, 1, "python", 700, 9)
    process(tmp_path, 11, 10, "raylet", 100, 1)
    process(tmp_path, 12, 11, "ray::Replica:Router.handle", 30, 4)
    process(tmp_path, 13, 11, "ray::Replica:Pair", 50, 5)
    process(tmp_path, 14, 11, "ray::Replica:Pair", 7, 6)
    process(tmp_path, 20, 1, "ray::Replica:Pair", 9000, 9)
    (tmp_path / "meminfo").write_text("", encoding="utf-8")
    return tmp_path


def test_descendants_alone_are_read_by_the_heads_of_their_titles(proc: Path) -> None:
    found = usages(GROUPS, 10, proc)
    assert {number: group for number, (group, _) in found.items()} == {
        11: OTHERS,
        12: "router",
        13: "pair",
        14: "pair",
    }
    assert found[13][1] == Usage(50 / TICK, 5 * PAGE)
    assert resident(found) == {OTHERS: PAGE, "router": 4 * PAGE, "pair": 11 * PAGE}


def test_what_was_spent_between_two_readings(proc: Path) -> None:
    """A process that began counts from its beginning, one that ended is left out."""
    before = usages(GROUPS, 10, proc)
    process(proc, 12, 11, "ray::Replica:Router", 42, 4)
    process(proc, 15, 11, "ray::Replica:Pair", 5, 4)
    (proc / "14" / "stat").unlink()
    assert spent(before, usages(GROUPS, 10, proc)) == pytest.approx(
        {OTHERS: 0.0, "router": 12 / TICK, "pair": 5 / TICK}
    )


def test_this_process_as_the_kernel_sees_it() -> None:
    before, begin = usage_of(Path("/proc/self")), time.process_time()
    while time.process_time() - begin < 0.1:
        pass
    after = usage_of(Path("/proc/self"))
    assert before is not None
    assert after is not None
    # In ticks of 10 ms.
    assert 0.08 <= after.cpu_s - before.cpu_s <= 0.2
    assert after.rss > 1 << 20
    assert usage_of(Path("/proc/0")) is None

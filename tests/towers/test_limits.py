"""CPUs and memory that control groups and affinity allow, read from folders that imitate /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twotower.towers import limits
from twotower.towers.limits import NO_LIMIT, group_bytes, usable_cpus

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class Machine:
    """A folder that imitates /proc/self as far as control groups go, and the groups."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "proc").mkdir()
        self.proc = folder / "proc"
        self._groups: list[str] = []
        self._mounts: list[str] = ["22 1 0:20 / /proc rw - proc proc rw"]

    def group(self, controllers: str, path: str) -> None:
        """Puts the process into a group of these controllers; version 2 names none."""
        self._groups.append(f"{len(self._groups)}:{controllers}:{path}")
        (self.proc / "cgroup").write_text("\n".join(self._groups) + "\n")

    def mount(self, kind: str, name: str, root: str = "/", options: str = "rw") -> Path:
        """Mounts the groups from `root` down; returns the folder of the mount."""
        point = self.folder / "sys" / name
        point.mkdir(parents=True)
        shown = str(point).replace(" ", "\\040")
        self._mounts.append(
            f"31 23 0:28 {root} {shown} rw,relatime shared:9 - {kind} {kind} {options}"
        )
        (self.proc / "mountinfo").write_text("\n".join(self._mounts) + "\n")
        return point


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    monkeypatch.setattr(limits, "_allowed_cpus", lambda: 32)
    return Machine(tmp_path)


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_without_groups_all_counts(machine: Machine) -> None:
    assert usable_cpus(machine.proc) == 32
    assert group_bytes(machine.proc) == NO_LIMIT


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [
        ("200000 100000", 2),
        ("max 100000", 32),
        ("250000 100000", 2),
        ("50000 100000", 1),
        ("6400000 100000", 32),
        ("150000 50000", 3),
        ("300000", 3),
    ],
)
def test_a_quota_of_version_2(machine: Machine, quota: str, cpus: int) -> None:
    machine.group("", "/")
    write(machine.mount("cgroup2", "fs"), cpu__max=quota)
    assert usable_cpus(machine.proc) == cpus


def test_the_tightest_of_nested_groups_counts(machine: Machine) -> None:
    machine.group("", "/kubepods/pod7/main")
    point = machine.mount("cgroup2", "fs with blank")
    group, pod = point / "kubepods/pod7/main", point / "kubepods/pod7"
    write(group, cpu__max="max 100000", memory__max="max", memory__current=f"{100 * MIB}")
    write(pod, cpu__max="400000 100000", memory__max=f"{900 * MIB}", memory__current=f"{400 * MIB}")
    write(pod.parent, cpu__max="800000 100000")
    # Somebody else's group.
    write(point / "kubepods/pod8", cpu__max="100000 100000", memory__max="1", memory__current="1")
    assert usable_cpus(machine.proc) == 4
    assert group_bytes(machine.proc) == 500 * MIB
    write(group, cpu__max="300000 100000", memory__max=f"{300 * MIB}")
    assert usable_cpus(machine.proc) == 3
    assert group_bytes(machine.proc) == 200 * MIB


def test_files_in_memory_make_way(machine: Machine) -> None:
    machine.group("", "/")
    point = machine.mount("cgroup2", "fs")
    write(point, memory__max=f"{1000 * MIB}", memory__current=f"{990 * MIB}")
    assert group_bytes(machine.proc) == 10 * MIB
    write(point, memory__stat=f"anon 5\nactive_file 7\ninactive_file {600 * MIB}\nslab 3")
    assert group_bytes(machine.proc) == 610 * MIB
    write(point, memory__max=f"{100 * MIB}")
    assert group_bytes(machine.proc) == 0


def test_version_1_has_a_tree_for_each_controller(machine: Machine) -> None:
    machine.group("name=systemd", "/other")
    machine.group("cpu,cpuacct", "/docker/a")
    machine.group("memory", "/docker/b")
    cpu = machine.mount("cgroup", "cpu,cpuacct", options="rw,cpu,cpuacct")
    memory = machine.mount("cgroup", "memory", options="rw,memory")
    write(cpu, cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    write(cpu / "docker/a", cpu__cfs_quota_us="250000", cpu__cfs_period_us="50000")
    write(memory, memory__limit_in_bytes="9223372036854771712", memory__usage_in_bytes="5")
    assert usable_cpus(machine.proc) == 5
    assert group_bytes(machine.proc) == NO_LIMIT
    group = memory / "docker/b"
    write(group, memory__limit_in_bytes=f"{64 * MIB}", memory__usage_in_bytes=f"{60 * MIB}")
    write(group, memory__stat=f"inactive_file 1\ntotal_inactive_file {MIB}")
    assert group_bytes(machine.proc) == 5 * MIB
    write(cpu, cpu__cfs_quota_us="300000")
    assert usable_cpus(machine.proc) == 3


def test_a_container_sees_its_own_group_as_the_mount(machine: Machine) -> None:
    # Version 1 in a container: the path is the host's, the mount begins at the container's group.
    machine.group("cpu", "/docker/abc")
    machine.group("memory", "/docker/abc/inner")
    write(
        machine.mount("cgroup", "cpu", "/docker/abc", "rw,cpu"),
        cpu__cfs_quota_us="200000",
        cpu__cfs_period_us="100000",
    )
    memory = machine.mount("cgroup", "memory", "/docker/abc", "rw,memory")
    write(memory / "inner", memory__limit_in_bytes="700", memory__usage_in_bytes="100")
    assert usable_cpus(machine.proc) == 2
    assert group_bytes(machine.proc) == 600


@pytest.mark.parametrize("path", ["/../..", "/elsewhere"])
def test_a_group_outside_of_what_is_seen(machine: Machine, path: str) -> None:
    machine.group("", path)
    point = machine.mount("cgroup2", "fs", "/" if path.startswith("/..") else "/docker/abc")
    write(point, cpu__max="700000 100000")
    assert usable_cpus(machine.proc) == 7


def test_both_versions_side_by_side(machine: Machine) -> None:
    machine.group("cpu", "/")
    machine.group("", "/")
    write(
        machine.mount("cgroup", "cpu", options="rw,cpu"),
        cpu__cfs_quota_us="-1",
        cpu__cfs_period_us="100000",
    )
    unified = machine.mount("cgroup2", "unified")
    assert usable_cpus(machine.proc) == 32
    write(unified, cpu__max="900000 100000")
    assert usable_cpus(machine.proc) == 9


@pytest.mark.parametrize("text", ["", "garbage", "max max max", "-5 100000", "100000 0", "é"])
def test_what_is_no_quota_limits_nothing(machine: Machine, text: str) -> None:
    machine.group("", "/")
    write(machine.mount("cgroup2", "fs"), cpu__max=text, memory__max=text, memory__current=text)
    assert usable_cpus(machine.proc) == 32
    assert group_bytes(machine.proc) == NO_LIMIT


PROGRAM = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from twotower.towers.limits import limit_threads, usable_cpus
torch.set_num_threads(7)
limit_threads()
print(usable_cpus(), torch.get_num_threads())
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity here")
def test_a_process_on_one_cpu_takes_one_thread() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["1", "1"]


def test_fewer_threads_than_cpus_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("torch.get_num_threads", lambda: 3)
    monkeypatch.setattr("torch.set_num_threads", asked.append)
    monkeypatch.setattr(limits, "usable_cpus", lambda: 4)
    limits.limit_threads()
    assert asked == []
    monkeypatch.setattr(limits, "usable_cpus", lambda: 2)
    limits.limit_threads()
    assert asked == [2]


def test_this_process_has_limits_that_make_sense() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    assert group_bytes() > 0

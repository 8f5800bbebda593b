"""Threads of a tower's process: what was asked for, or half of the CPUs that it may use."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest

from tests.cluster.test_topology import PAIR
from twotower.cluster.services import loading
from twotower.cluster.services.loading import prepare_process


@pytest.mark.parametrize(
    ("asked", "usable", "threads"), [(3, 32, 3), (None, 32, 16), (None, 3, 1), (None, 1, 1)]
)
def test_threads_of_a_tower(
    asked: int | None, usable: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    monkeypatch.setattr("torch.set_num_threads", taken.append)
    monkeypatch.setattr(loading, "usable_cpus", lambda: usable)
    before = sys.getswitchinterval()
    try:
        prepare_process(replace(PAIR, num_threads=asked))
    finally:
        sys.setswitchinterval(before)
    assert taken == [threads]

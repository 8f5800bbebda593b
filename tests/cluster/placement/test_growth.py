"""Clusters to which nodes come by themselves, told by what Ray's monitor reports."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest

from twotower.cluster.placement import growth
from twotower.cluster.placement.growth import autoscaler_runs, may_grow

BY_HAND = f"node_{'5b5f24' * 8}"


def report(**kinds: Any) -> bytes:
    return json.dumps({"time": 1.0, "autoscaler_report": kinds}).encode()


@pytest.mark.parametrize(
    ("status", "runs"),
    [
        (None, False),
        (b"{}", False),
        (json.dumps({"autoscaler_report": None}).encode(), False),
        (report(active_nodes={BY_HAND: 1}, pending_launches={}), False),
        (report(active_nodes={"ray.head.default": 1}, pending_launches=None), True),
        (report(active_nodes={"headgroup": 1, "pairs": 2}), True),
        (report(active_nodes={}, pending_launches={"pairs": 1}), True),
    ],
)
def test_an_autoscaler_has_types_of_nodes(status: bytes | None, runs: bool) -> None:
    assert autoscaler_runs(status) is runs


def test_three_ways_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    config: list[Any] = [None]
    monkeypatch.setattr(growth, "state", SimpleNamespace(get_cluster_config=lambda: config[0]))
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: report(active_nodes={BY_HAND: 1}))
    assert not may_grow({"PATH": "/bin"})
    assert may_grow({"RAY_CLUSTER_NAME": "pairs"})
    config[0] = SimpleNamespace(node_group_configs=[])
    assert not may_grow({})
    config[0] = SimpleNamespace(node_group_configs=["pairs"])
    assert may_grow({})
    config[0] = None
    monkeypatch.setattr(growth, "_internal_kv_get", lambda _: report(active_nodes={"pairs": 1}))
    assert may_grow({})

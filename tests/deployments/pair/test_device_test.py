"""A tower whose device fails its self-test does not come up, and says why."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.test_topology import PAIR
from tests.support.actors import Actor
from twotower.cluster.placement import start
from twotower.cluster.services import loading
from twotower.cluster.topology import PairTopology
from twotower.deployments.pair.tower_pair import TowerPair
from twotower.kernels import dispatch
from twotower.towers.errors import DeviceError


@pytest.fixture
async def started(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[list[Any]]:
    """Actors of pairs in this process and without Ray, in the order in which they start."""
    made: list[Any] = []

    def actor(kind: type, topology: PairTopology, *_: Any) -> Actor:
        made.append(kind(topology))
        return Actor(made[-1])

    monkeypatch.setattr(start, "_actor", actor)
    monkeypatch.setattr(start.ray.util, "get_current_placement_group", lambda: None)
    monkeypatch.setattr(loading, "prepare_process", lambda _: None)
    yield made
    for one in made:
        await one.close()


def pair(folder: Path, **changes: Any) -> TowerPair:
    topology = replace(PAIR, model_path=str(folder), **changes)
    return TowerPair(lambda: start.start_towers(topology))


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("placement", ["separate", "colocated", "ar_only"])
async def test_a_pair_on_a_device_that_fails_is_not_ready(
    placement: str,
    tiny_a: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    attention = dispatch.attention.reference
    monkeypatch.setattr(dispatch.attention, "reference", lambda *args: attention(*args) * 0.9)
    failing = pair(tiny_a, placement=placement, self_test=True)
    said = "the self-test of device cpu in float32 failed, so that no tower serves there: "
    with pytest.raises(DeviceError, match=said) as caught:
        await failing.check_health()
    assert await failing.record_routing_stats() == {}
    assert str(caught.value) in caplog.text


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("placement", ["separate", "colocated", "ar_only"])
async def test_a_pair_on_a_device_that_passes_is_ready(placement: str, tiny_a: Path) -> None:
    working = pair(tiny_a, placement=placement, self_test=True)
    await working.check_health()
    stats = await working.stats()
    assert all(not tower["rows"] and not tower.get("slots_used") for tower in stats.values())


async def test_on_a_cpu_nothing_is_tested_unless_it_is_asked_for(
    started: list[Any], tiny_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch.attention, "reference", None)
    await pair(tiny_a, placement="ar_only").check_health()
    assert len(started) == 1

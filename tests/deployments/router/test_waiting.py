"""Lines about pairs that wait for resources, while they wait."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.util import placement_group, remove_placement_group

from tests.support.nodes import local_cluster
from tests.support.pairs import await_whole
from twotower.deployments.app import build_app_from_settings
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.router import waiting
from twotower.deployments.router.waiting import WaitingPairs, waiting_groups, waiting_line
from twotower.deployments.server.server import free_port, start_serve
from twotower.towers.errors import ConfigError

TINY = Path(__file__).parents[2] / "golden" / "tiny_a"
PAIR = {0: {"CPU": 0.1}, 1: {"CPU": 0.4, "GPU": 1.0}, 2: {"CPU": 0.4, "GPU": 1.0}}


def group(state: str, name: str = "SERVE_REPLICA::twotower#TowerPair#ab12") -> dict[str, Any]:
    return {"state": state, "name": name, "bundles": PAIR}


def test_pairs_without_a_place_are_found_in_rays_table() -> None:
    table = {
        "a": group("CREATED"),
        "b": group("PENDING"),
        "c": group("RESCHEDULING"),
        "d": group("REMOVED"),
        "e": group("PENDING", "somebody's"),
        "f": group("PENDING", "SERVE_REPLICA::other#TowerPair#1"),
    }
    assert list(waiting_groups(table)) == ["b", "c"]
    assert waiting_groups(table)["b"] == list(PAIR.values())


def test_the_line_has_the_arithmetic() -> None:
    pair = list(PAIR.values())
    free = {"CPU": 3.5000000001, "memory": 1e9}
    assert waiting_line([], free) is None
    assert waiting_line([pair], free) == (
        "1 pair waits for 0.9 CPU and 2 GPU each; free now: 3.5 CPU, 0 GPU"
    )
    assert waiting_line([[{"CPU": 0.5}], [{"CPU": 0.5}]], {}) == (
        "2 pairs wait for 0.5 CPU each; free now: 0 CPU"
    )


def test_it_is_said_for_as_long_as_a_pair_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"a": group("PENDING")}
    said: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(waiting, "placement_group_table", lambda: dict(table))
    with WaitingPairs(said.append, every_s=0.01):
        _until(lambda: len(said) >= 3)
        table.clear()
        time.sleep(0.1)
        count = len(said)
        time.sleep(0.1)
        assert len(said) == count
    assert set(said) == {"1 pair waits for 0.9 CPU and 2 GPU each; free now: 1 CPU, 0 GPU"}


def test_a_place_that_comes_at_once_is_not_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def table() -> dict[str, Any]:
        looks.append(1)
        return {f"group-{len(looks)}": group("PENDING")}

    said: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.available_resources", dict)
    monkeypatch.setattr(waiting, "placement_group_table", table)
    with WaitingPairs(said.append, every_s=0.01):
        _until(lambda: len(looks) >= 4)
    assert said == []


def test_ray_may_be_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Any] = [RuntimeError("not connected"), ConnectionError("gone")]

    def table() -> dict[str, Any]:
        if answers:
            raise answers.pop()
        return {"a": group("PENDING")}

    said: list[str] = []
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.available_resources", dict)
    monkeypatch.setattr(waiting, "placement_group_table", table)
    with WaitingPairs(said.append, every_s=0.01):
        _until(lambda: said)


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_cluster_without_room_and_one_that_is_taken() -> None:
    settings = {"model": str(TINY), "num_threads": 1, "max_num_seqs": 4}
    ports = {"grpc_port": free_port(), "http_port": free_port()}
    with local_cluster():
        with pytest.raises(ConfigError, match=r"^no room for num_pairs = 2: .*has 1 CPU$"):
            build_app_from_settings({**settings, "num_pairs": 2})
        taken = placement_group([{"CPU": 0.5}])
        ray.get(taken.ready(), timeout=30)
        start_serve(ServiceConfig.from_settings({**settings, **ports}), proxy_location="HeadOnly")
        said: list[str] = []
        target = serve.RunTarget(build_app_from_settings(settings), name=APP_NAME)
        serve.run_many([target], wait_for_applications_running=False)
        with WaitingPairs(said.append, every_s=0.5):
            _until(lambda: len(said) >= 2, 60)
            remove_placement_group(taken)
            await_whole(1, 60)
            time.sleep(1)
            count = len(said)
            time.sleep(1)
            assert len(said) == count
        # The router has its tenth of a CPU by then, or has not; the last line may be of the moment
        # between room and place.
        assert set(said) <= {
            f"1 pair waits for 0.9 CPU each; free now: {free} CPU" for free in ("0.4", "0.5", "0.9")
        }


def _until(condition: Any, limit_s: float = 10) -> None:
    until = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < until, "nothing was said"
        time.sleep(0.005)

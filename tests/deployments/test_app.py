"""A service that can never have its pairs is refused before anything waits for it."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path
from typing import Any

import pytest

from twotower.cluster.placement.room import Host
from twotower.deployments import app
from twotower.deployments.app import build_app_from_settings, check_room, this_machine
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import LocalService, free_port
from twotower.towers.errors import ConfigError

TINY = Path(__file__).parents[1] / "golden" / "tiny_a"
TWO_CORES = [Host("this machine", {"CPU": 2.0, "GPU": 0.0})]


def config(**settings: Any) -> ServiceConfig:
    return ServiceConfig.from_settings({"model": str(TINY), **settings})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"device": "cuda"}, "num_pairs = 1: 1 pair x 2 GPU = 2 GPU, this machine has 0 GPU"),
        (
            {"device": "cuda", "denoisers_per_context": 3},
            "num_pairs = 1: 1 pair x 4 GPU = 4 GPU, this machine has 0 GPU",
        ),
        (
            {"device": "cuda", "placement": "colocated"},
            "num_pairs = 1: 1 pair x 1 GPU = 1 GPU, this machine has 0 GPU",
        ),
        (
            {"num_pairs": 4},
            "num_pairs = 4: 4 pairs x 0.9 CPU + 1 router x 0.1 CPU = 3.7 CPU, "
            "this machine has 2 CPU",
        ),
        (
            {"autoscaling": {"min_pairs": 3, "max_pairs": 9}, "num_routers": 2},
            "autoscaling.min_pairs = 3: 3 pairs x 0.9 CPU + 2 routers x 0.1 CPU = 2.9 CPU, "
            "this machine has 2 CPU",
        ),
        (
            {"autoscaling": {"min_pairs": 0, "max_pairs": 9}, "cpus_per_tower": 4},
            "autoscaling.min_pairs = 1: 1 pair x 8.1 CPU + 1 router x 0.1 CPU = 8.2 CPU, "
            "this machine has 2 CPU",
        ),
    ],
)
def test_no_room_is_said_with_the_arithmetic(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^no room for {re.escape(said)}$"):
        check_room(config(**settings), TWO_CORES, "this machine")


@pytest.mark.parametrize(
    "settings",
    [{}, {"num_pairs": 2}, {"autoscaling": {"min_pairs": 0, "max_pairs": 64}}],
)
def test_what_fits_is_let_in(settings: dict[str, Any]) -> None:
    check_room(config(**settings), TWO_CORES)


def test_a_cluster_that_grows_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        try:
            check_room(config(num_pairs=4), TWO_CORES, growing=True)
        finally:
            logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert "the cluster has 2 CPU; waiting for the cluster to grow" in caplog.text


def test_serve_on_this_machine_refuses_before_it_starts_anything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(app, "usable_cpus", lambda: 8)
    asked = config(device="cuda", grpc_port=free_port(), http_port=free_port())
    service = LocalService(asked)
    monkeypatch.setattr(service, "_start_ray", lambda: pytest.fail("Ray was started"))
    began = time.monotonic()
    said = r"^no room .* 1 pair x 2 GPU = 2 GPU, this machine has 1 GPU$"
    with pytest.raises(ConfigError, match=said), service:
        pass
    assert time.monotonic() - began < 5


def test_a_service_counts_on_what_the_machine_lets_it_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    for usable, cpus in ((1, 2), (5, 5)):
        monkeypatch.setattr(app, "usable_cpus", lambda usable=usable: usable)
        assert this_machine().resources == {"CPU": cpus, "GPU": 3}


@pytest.mark.parametrize("growing", [False, True])
def test_a_cluster_is_asked_what_it_has(growing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"Alive": True, "NodeManagerAddress": "10.0.0.1", "Resources": {"CPU": 2.0}}
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.nodes", lambda: [node])
    monkeypatch.setattr(app, "may_grow", lambda: growing)
    settings = {"model": str(TINY), "num_pairs": 4}
    if growing:
        assert build_app_from_settings(settings) is not None
    else:
        with pytest.raises(ConfigError, match=r"= 3\.7 CPU, the cluster has 2 CPU$"):
            build_app_from_settings(settings)
    assert build_app_from_settings({**settings, "num_pairs": 2}) is not None

"""What Ray's processes are told before they start."""

from __future__ import annotations

import pytest
import ray

from twotower.deployments.server import local_ray


@pytest.mark.parametrize(
    ("given", "want"),
    [
        ({}, ""),
        ({"no_proxy": "a.example"}, "a.example,"),
        ({"no_grpc_proxy": "b.example", "no_proxy": "a.example"}, "b.example,"),
    ],
)
def test_replicas_of_this_machine_are_called_without_a_proxy(
    given: dict[str, str], want: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_grpc_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "192.0.2.7")
    assert local_ray._called_directly() == f"{want}192.0.2.7,127.0.0.1,localhost"

"""What Ray's processes are told before they start."""

from __future__ import annotations

import pytest
import ray

from twotower.deployments.config import ServiceConfig
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


def test_routers_that_listen_have_a_port_each() -> None:
    config = ServiceConfig(ingress="direct", num_routers=3, grpc_port=9000, http_port=8000)
    told = local_ray.direct_ingress(config)
    # Serve gives away the ports from MIN up to, and without, MAX.
    for side, port in (("GRPC", 9000), ("HTTP", 8000)):
        prefix = "RAY_SERVE_DIRECT_INGRESS"
        ends = (told[f"{prefix}_MIN_{side}_PORT"], told[f"{prefix}_MAX_{side}_PORT"])
        assert ends == (str(port), str(port + 3))
    assert told["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "1"
    # One that has gone is replaced on its port, not beside it.
    assert told["RAY_SERVE_PORT_QUARANTINE_S"] == "0"


def test_a_service_with_a_proxy_forgets_the_ingress_of_the_one_before() -> None:
    assert local_ray.ENVIRONMENT["RAY_SERVE_ENABLE_DIRECT_INGRESS"] == "0"

"""A pair on the hosts that carry a label, and on no others."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.nodes import add_node, deploy, local_cluster, raylet_of
from tests.support.processes import ancestors, own_processes
from twotower import TwoTower
from twotower.client import Client
from twotower.deployments.app import build_app
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import (
    LocalService,
    free_port,
)
from twotower.towers.errors import ConfigError

LABEL = "example.com/gpu-domain"
# With pretended GPUs: the host of the wrong domain could hold the whole pair.
NODES = [
    {"num_gpus": gpus, "labels": {LABEL: domain}}
    for gpus, domain in ((2, "north"), (1, "south"), (1, "south"))
]


@pytest.mark.cluster
@pytest.mark.filterwarnings("default")
def test_a_pair_spans_the_hosts_of_its_domain(tiny_text: Path) -> None:
    config = ServiceConfig(
        model=str(tiny_text),
        pack="domain",
        label_selector={LABEL: "south"},
        gpus_per_tower=1.0,
        cpus_per_tower=0.1,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=4,
    )
    address = f"127.0.0.1:{config.grpc_port}"
    with local_cluster() as cluster:
        _, *south = [raylet_of(add_node(cluster, node)) for node in NODES]
        deploy(config)
        (context,) = own_processes("ray::ContextTowerActor")
        (denoiser,) = own_processes("ray::DenoiserTowerActor")
        hosts = [
            [raylet for raylet in south if raylet in ancestors(tower)]
            for tower in (context, denoiser)
        ]
        assert sorted(hosts) == sorted([raylet] for raylet in south)
        with Client(address) as client:
            stream = client.generate([5, 6, 7], max_tokens=48, seed=1, ignore_eos=True)
            got = [token for block in stream for token in block.token_ids]
        want = TwoTower.from_pretrained(tiny_text).generate([[5, 6, 7]], max_tokens=48, seed=1)
        assert got == list(want[0].token_ids)


def test_a_label_that_ray_would_not_take_is_refused_at_once(tiny_text: Path) -> None:
    config = ServiceConfig(model=str(tiny_text), label_selector={"a b": "c"})
    with pytest.raises(ConfigError, match=r"^label_selector: .*a b"):
        build_app(config)


def test_a_service_on_this_machine_would_wait_for_labels_without_an_end(tiny_text: Path) -> None:
    config = ServiceConfig(model=str(tiny_text), label_selector={LABEL: "south"})
    with pytest.raises(ConfigError, match=r"^label_selector: "), LocalService(config):
        pass

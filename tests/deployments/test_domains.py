"""A pair on the hosts that carry a label, and on no others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.processes import ancestors, own_processes
from twotower import TwoTower
from twotower.client import Client
from twotower.deployments.app import build_app
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.server import (
    ENVIRONMENT,
    OBJECT_STORE_BYTES,
    LocalService,
    await_proxy,
    free_port,
    start_serve,
)
from twotower.towers.errors import ConfigError

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

# Pretended GPUs and label of each node: a host of the wrong domain could hold the whole pair.
NODES = [(2, "north"), (1, "south"), (1, "south")]
LABEL = "example.com/gpu-domain"


@contextmanager
def cluster_of(nodes: list[tuple[int, str]]) -> Iterator[list[int]]:
    """A head and these nodes on this machine; yields the nodes' raylets, as process ids."""
    os.environ.update(ENVIRONMENT)
    memory = {"object_store_memory": OBJECT_STORE_BYTES}
    head = {"num_cpus": 1, "num_gpus": 0, "include_dashboard": False, **memory}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        started = [
            cluster.add_node(num_cpus=1, num_gpus=gpus, labels={LABEL: domain}, **memory)
            for gpus, domain in nodes
        ]
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield [node.all_processes["raylet"][0].process.pid for node in started]
    finally:
        if ray.is_initialized():
            serve.delete(APP_NAME)
            ray.shutdown()
        cluster.shutdown()


def test_a_pair_spans_the_hosts_of_its_domain(tiny_text: Path) -> None:
    config = ServiceConfig(
        model=str(tiny_text),
        pack="domain",
        label_selector={LABEL: "south"},
        gpus_per_tower=1.0,
        cpus_per_tower=0.1,
        grpc_port=free_port(),
        http_port=free_port(),
        threads_per_tower=1,
        max_num_seqs=4,
    )
    address = f"127.0.0.1:{config.grpc_port}"
    with cluster_of(NODES) as (_, *south):
        start_serve(config, proxy_location="HeadOnly")
        serve.run(build_app(config), name=APP_NAME, route_prefix="/")
        await_proxy(address)
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

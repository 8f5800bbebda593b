"""A Ray cluster of several nodes, all on this machine, and the service on it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from twotower.cluster.topology import PairTopology
from twotower.deployments.app import build_app
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.server.local_ray import ENVIRONMENT, OBJECT_STORE_BYTES
from twotower.deployments.server.server import await_proxy, start_serve


@contextmanager
def local_cluster() -> Iterator[Cluster]:
    """A head without GPUs, which this process joins; all that was started ends with the `with`
    block, nodes that were added too."""
    os.environ.update(ENVIRONMENT)
    head = {
        "num_cpus": 1,
        "num_gpus": 0,
        "include_dashboard": False,
        "object_store_memory": OBJECT_STORE_BYTES,
    }
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        if ray.is_initialized():
            serve.delete(APP_NAME)
            ray.shutdown()
        cluster.shutdown()


def add_node(cluster: Cluster, options: Mapping[str, Any]) -> Any:
    """Another node, with one CPU."""
    return cluster.add_node(num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, **options)


def deploy(config: ServiceConfig, topology: PairTopology | None = None) -> None:
    """Starts the service on the cluster that this process has joined, its proxy on the head."""
    start_serve(config, proxy_location="HeadOnly")
    redeploy(config, topology)
    await_proxy(f"127.0.0.1:{config.grpc_port}")


def redeploy(config: ServiceConfig, topology: PairTopology | None = None) -> None:
    """Replaces routers and pairs one after the other, under requests; Serve keeps its ports."""
    serve.run(build_app(config, topology), name=APP_NAME, route_prefix="/")


def deploy_anew(config: ServiceConfig, topology: PairTopology | None = None) -> None:
    """Ends all routers and pairs, then starts others: saves a test the start of Ray and Serve."""
    serve.delete(APP_NAME)
    redeploy(config, topology)


def raylet_of(node: Any) -> int:
    """The process id of a node's raylet, from which all its processes descend."""
    pid: int = node.all_processes["raylet"][0].process.pid
    return pid

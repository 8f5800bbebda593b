"""The service on a cluster of several nodes, all on this machine, with pretended GPUs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from ray.cluster_utils import Cluster

from tests.support.nodes import add_node, deploy, deploy_anew, local_cluster, raylet_of
from tests.support.pairs import await_whole, left_over
from tests.support.processes import ancestors, own_processes
from twotower.cluster.topology import LinkFaults
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.server import free_port

PAIRS = 2
NODES = 3
NODE = {"num_gpus": 2}
WHOLE_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class ChaosCluster:
    """A head, and nodes with two pretended GPUs each, so that each holds one pair."""

    config: ServiceConfig
    cluster: Cluster

    @property
    def address(self) -> str:
        """The service's gRPC target."""
        return f"127.0.0.1:{self.config.grpc_port}"

    def link_with(self, faults: LinkFaults | None) -> None:
        """Replaces all pairs by pairs whose links have these faults from their beginning."""
        deploy_anew(self.config, replace(self.config.topology(), faults=faults))
        await_whole(PAIRS, WHOLE_TIMEOUT_S)

    def kill_node(self, draw: random.Random) -> None:
        """Kills a node that has a pair, with all its processes; a fresh one joins."""
        raylets = {
            raylet
            for tower in own_processes("ray::ContextTowerActor")
            for raylet in ancestors(tower)
        }
        own = [node for node in self.cluster.worker_nodes if raylet_of(node) in raylets]
        self.cluster.remove_node(draw.choice(own), allow_graceful=False)
        add_node(self.cluster, NODE)

    def left(self) -> float:
        """Rows, slots and mirrors that the pairs still hold once all are up again."""
        return left_over(PAIRS, WHOLE_TIMEOUT_S)


@contextmanager
def chaos_cluster() -> Iterator[ChaosCluster]:
    """The service with all pairs up, for as long as a `with` block lasts."""
    config = ServiceConfig(
        num_pairs=PAIRS,
        gpus_per_tower=1.0,
        cpus_per_tower=0.1,
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=16,
        health_check_period_s=1.0,
        health_check_timeout_s=30.0,
    )
    with local_cluster() as cluster:
        for _ in range(NODES):
            add_node(cluster, NODE)
        deploy(config)
        await_whole(PAIRS, WHOLE_TIMEOUT_S)
        yield ChaosCluster(config, cluster)

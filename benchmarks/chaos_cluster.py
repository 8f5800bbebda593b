"""The service on a cluster of several nodes, all on this machine, with pretended GPUs."""

from __future__ import annotations

import os
import random
import time
from dataclasses import replace
from types import TracebackType
from typing import Any

import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.processes import ancestors, own_processes
from twotower.cluster.faults import LinkFaults
from twotower.deployments.app import build_app
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.server import (
    ENVIRONMENT,
    OBJECT_STORE_BYTES,
    await_proxy,
    free_port,
    start_serve,
)

PAIRS = 2
NODES = 3
WHOLE_TIMEOUT_S = 120.0


class ChaosCluster:
    """A head, and nodes with two pretended GPUs each, so that each holds one pair; for as long as
    a `with` block lasts. `address` is the service's gRPC target."""

    def __init__(self, faults: LinkFaults | None = None) -> None:
        self.config = ServiceConfig(
            num_pairs=PAIRS,
            gpus_per_tower=1.0,
            cpus_per_tower=0.1,
            grpc_port=free_port(),
            http_port=free_port(),
            threads_per_tower=1,
            max_num_seqs=16,
            health_check_period_s=1.0,
            health_check_timeout_s=30.0,
        )
        self.address = f"127.0.0.1:{self.config.grpc_port}"
        self._faults = faults
        self._cluster: Cluster | None = None

    def __enter__(self) -> ChaosCluster:
        os.environ.update(ENVIRONMENT)
        head = {
            "num_cpus": 1,
            "num_gpus": 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        try:
            for _ in range(NODES):
                self._add_node()
            ray.init(address=self._cluster.address, log_to_driver=False, logging_level="ERROR")
            self._deploy()
            self.await_whole()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends everything that was started."""
        if ray.is_initialized():
            serve.delete(APP_NAME)
            ray.shutdown()
        if self._cluster is not None:
            self._cluster.shutdown()
            self._cluster = None

    def kill_node(self, draw: random.Random) -> None:
        """Kills a node that has a pair, with all its processes; a fresh one joins."""
        assert self._cluster is not None
        towers = own_processes("ray::ContextTowerActor")
        own = [node for node in self._cluster.worker_nodes if _has_one_of(node, towers)]
        self._cluster.remove_node(draw.choice(own), allow_graceful=False)
        self._add_node()

    def left(self) -> float:
        """Rows, slots and mirrors that the pairs still hold once all are up again."""
        self.await_whole()
        deadline = time.monotonic() + 10.0
        while (left := held()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def await_whole(self) -> None:
        """Waits until all pairs are up. Raises TimeoutError."""
        deadline = time.monotonic() + WHOLE_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                states = serve.status().applications[APP_NAME].deployments["TowerPair"]
                if dict(states.replica_states) == {"RUNNING": PAIRS} and held() >= 0.0:
                    return
            except Exception as error:  # a pair or a controller that has just gone
                print(f"not whole yet: {type(error).__name__}")
            time.sleep(0.2)
        raise TimeoutError(f"not whole after {WHOLE_TIMEOUT_S:g} s: {serve.status()}")

    def _add_node(self) -> None:
        assert self._cluster is not None
        self._cluster.add_node(num_cpus=1, num_gpus=2, object_store_memory=OBJECT_STORE_BYTES)

    def _deploy(self) -> None:
        start_serve(self.config, proxy_location="HeadOnly")
        topology = replace(self.config.topology(), faults=self._faults)
        serve.run(build_app(self.config, topology), name=APP_NAME, route_prefix="/")
        await_proxy(self.address)


def held() -> float:
    """Rows, slots and mirrors of the pairs that answer; each is asked, as Serve spreads calls."""
    handle = serve.get_deployment_handle("TowerPair", APP_NAME)
    found = 0.0
    for answer in [handle.stats.remote() for _ in range(4 * PAIRS)]:
        for tower in answer.result(timeout_s=60).values():
            found += sum(tower.get(name, 0.0) for name in ("rows", "slots_used", "mirrors"))
    return found


def _has_one_of(node: Any, processes: list[int]) -> bool:
    """Whether a node of the cluster has started one of these processes."""
    raylet = node.all_processes["raylet"][0].process.pid
    return any(raylet in ancestors(process) for process in processes)

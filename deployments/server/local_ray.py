"""Ray on this machine, for a service or for a job beside one."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

import ray

from twotower.cluster.placement.surroundings import runtime_folder, shared_memory
from twotower.deployments.app import this_machine
from twotower.deployments.config import ServiceConfig
from twotower.deployments.http.middleware import PROXY_CALLBACK, PROXY_VARIABLE
from twotower.deployments.telemetry.logs import LogFormat, worker_logging
from twotower.protos.incoming import MAX_MESSAGE_BYTES, MESSAGE_VARIABLE, MOST_MESSAGE_BYTES

OBJECT_STORE_BYTES = 200 * 1024 * 1024
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # The library's own telemetry aside, its workers otherwise take every core for arithmetic.
    "OMP_NUM_THREADS": "1",
    # By default a proxy that is not up within 5 s is killed and started anew, which on a machine
    # with other work on it only makes the start fail.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # What runs in front of Serve's own HTTP proxy.
    PROXY_VARIABLE: PROXY_CALLBACK,
    # Metrics are handed over every 10 s by default: here somebody looks on.
    "RAY_metrics_report_interval_ms": "2000",
    # By default Serve takes messages of 2 GiB.
    MESSAGE_VARIABLE: str(MAX_MESSAGE_BYTES),
    # Proxies call routers over gRPC, as routers call pairs (`routing/attempts.py`). What they carry
    # was within the limits of its front before; by default these calls have one of 4 MiB.
    "RAY_SERVE_PROXY_USE_GRPC": "1",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(MOST_MESSAGE_BYTES),
    # Of a service before this one in the same process.
    "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0",
}


# Hosts that gRPC calls without the proxy that `http_proxy` and the like name; where it is set,
# gRPC does not look at `no_proxy`.
_DIRECT = "no_grpc_proxy"


def start_ray(
    made: ExitStack,
    *,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
    spare_cpus: int = 0,
    log_format: LogFormat = "text",
    verbose: bool = False,
) -> None:
    """Starts Ray with this machine's CPUs and GPUs, and `spare_cpus` places for work that needs no
    core. Its files go to `folder`, an existing one in a prepared environment, or to a new one that
    `made` removes. `variables` are set beside ENVIRONMENT."""
    os.environ.update(ENVIRONMENT | dict(variables or {}))
    os.environ[_DIRECT] = _called_directly()
    folder = folder or made.enter_context(runtime_folder(os.environ))
    resources = this_machine().resources
    ray.init(
        address="local",
        num_cpus=int(resources["CPU"]) + spare_cpus,
        num_gpus=int(resources["GPU"]),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        log_to_driver=verbose,
        logging_level=logging.INFO if verbose else logging.ERROR,
        _temp_dir=str(folder),
        _plasma_directory=shared_memory(folder),
        **worker_logging(log_format),
    )


def direct_ingress(config: ServiceConfig) -> dict[str, str]:
    """Variables with which routers listen themselves, on the config's ports and those after them.

    On one machine nobody balances between routers: none has to stay up for that when it stops, and
    the port of one that has gone is its successor's at once.
    """
    ranges = {
        f"RAY_SERVE_DIRECT_INGRESS_{end}_{side}_PORT": str(port + count)
        for side, port in (("GRPC", config.grpc_port), ("HTTP", config.http_port))
        for end, count in (("MIN", 0), ("MAX", config.num_routers))
    }
    return ranges | {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
    }


def _called_directly() -> str:
    """The hosts that are called without a proxy so far, and this machine: its replicas call each
    other by its address, which a proxy elsewhere cannot reach."""
    so_far = os.environ.get(_DIRECT) or os.environ.get("no_proxy")
    own = (ray.util.get_node_ip_address(), "127.0.0.1", "localhost")
    return ",".join(filter(None, (so_far, *own)))

"""The Serve application of a config; no other file names replicas and resources."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import ray
import torch
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import RequestRouterConfig

from twotower.cluster.placement.growth import may_grow
from twotower.cluster.placement.room import Host, Need, hosts_of, lack_of_room
from twotower.cluster.placement.start import start_towers
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.deployments.config import MOST_COUNT, ServiceConfig
from twotower.deployments.pair.autoscaling import serve_settings
from twotower.deployments.pair.metrics import PairMetrics
from twotower.deployments.pair.tower_pair import TowerPair
from twotower.deployments.router.router import Router
from twotower.deployments.router.waiting import WatchedRouter
from twotower.deployments.telemetry.exporter import check_exporter
from twotower.deployments.telemetry.logs import serve_logging
from twotower.towers.errors import ConfigError
from twotower.towers.limits import usable_cpus

logger = logging.getLogger("ray.serve")

PAIR_DEPLOYMENT = "TowerPair"
PAIR_CHOOSER = "twotower.deployments.routing.attempts.PairChooser"
# Rows wait in the pair, in order; the router holds a stream for each of them, of all pairs.
ROUTER_ONGOING = 4096
# A replica that is told to stop looks this often whether its last stream has ended.
DRAIN_POLL_S = 0.25
# How often pairs tell the routers of their load, for those who ask.
REPORT_S = 2.0
# Room for health questions, and for requests that are about to be refused, in a full pair.
WATCH_CALLS = 64
# A tower that does not load now will not load later; a lost node gets another chance.
START_ATTEMPTS = 2
ROUTER_CPUS = 0.1
# Router, replica, two towers: what a pair on CPU shares must find, whatever the machine counts.
_LEAST_CPUS = 2


def build_app(
    config: ServiceConfig,
    topology: PairTopology | None = None,
    router_class: type[Router] = Router,
    start: Callable[[PairTopology], Awaitable[PairServices]] = start_towers,
) -> Application:
    """The application of a config; `topology` replaces that of the config. `start` brings the
    towers of a pair up, in its placement group.

    Raises CheckpointError if the checkpoint cannot be served, ConfigError for labels that Ray does
    not take.
    """
    config.checkpoint()
    if config.otlp_endpoint is not None:
        check_exporter()
    topology = topology or config.topology()
    pair = _placed(serve.deployment(TowerPair), config, topology).options(
        name=PAIR_DEPLOYMENT,
        max_ongoing_requests=_pair_requests(config),
        logging_config=serve_logging(config.log_format),
        max_constructor_retry_count=START_ATTEMPTS,
        request_router_config=RequestRouterConfig(
            request_router_class=PAIR_CHOOSER,
            request_router_kwargs={"num_routers": config.num_routers},
            request_routing_stats_period_s=REPORT_S,
        ),
        **_watching(config),
        **_scaling(config),
    )
    router = serve.deployment(serve.ingress()(router_class)).options(
        name="Router",
        ray_actor_options={"num_cpus": ROUTER_CPUS, "resources": _router_resources(config)},
        num_replicas=config.num_routers,
        max_ongoing_requests=ROUTER_ONGOING,
        logging_config=serve_logging(config.log_format),
        **_watching(config),
    )
    metrics = partial(PairMetrics.of_replica, config.shown_name())
    towers = pair.bind(partial(start, topology), metrics, config.dial())
    return router.bind(config, towers)


def build_app_from_settings(settings: dict[str, Any]) -> Application:
    """Entry for Serve's own config files: `args` of the application are ServiceConfig's fields.

    Raises ConfigError for wrong fields, and for pairs that the cluster can never have room for.
    """
    config = ServiceConfig.from_settings(settings)
    app = build_app(config, router_class=WatchedRouter)
    if ray.is_initialized():
        check_room(config, hosts_of(ray.nodes()), growing=may_grow())
    return app


def check_room(
    config: ServiceConfig,
    hosts: list[Host],
    where: str = "the cluster",
    *,
    growing: bool = False,
) -> None:
    """Compares what the service needs with what the hosts have, before Ray waits for the rest.

    Raises ConfigError with the arithmetic; where hosts may come, it is only said.
    """
    lack = lack_of_room(_need(config), hosts, where)
    if lack is None:
        return
    if not growing:
        raise ConfigError(lack)
    logger.warning("%s; waiting for the cluster to grow", lack)


def this_machine() -> Host:
    """This machine's CPUs and GPUs, for a service in processes started here."""
    resources = {"CPU": max(usable_cpus(), _LEAST_CPUS), "GPU": torch.cuda.device_count()}
    return Host("this machine", resources)


def _need(config: ServiceConfig) -> Need:
    scaling = config.autoscaling
    # A service that begins without a pair starts a pair as soon as a request comes.
    pairs = config.num_pairs if scaling is None else max(1, scaling.min_pairs)
    return Need(
        setting="num_pairs" if scaling is None else "autoscaling.min_pairs",
        pairs=pairs,
        bundles=config.topology().bundles(),
        routers=config.num_routers,
        router={"CPU": ROUTER_CPUS} | _router_resources(config),
        one_host=config.pack == "host",
        labels=config.label_selector,
    )


def _router_resources(config: ServiceConfig) -> dict[str, float]:
    return {} if config.router_resource is None else {config.router_resource: 1.0}


def _placed(pair: Deployment, config: ServiceConfig, topology: PairTopology) -> Deployment:
    """The deployment with the placement of a pair's replica and towers."""
    bundles = topology.bundles()
    try:
        return pair.options(
            placement_group_bundles=bundles,
            placement_group_strategy="STRICT_PACK" if config.pack == "host" else "PACK",
            placement_group_bundle_label_selector=[config.label_selector] * len(bundles),
            ray_actor_options={"num_cpus": bundles[0]["CPU"]},
        )
    except ValueError as error:
        # Bundles are made here; what may be wrong is what was given.
        raise ConfigError(f"label_selector: {error}") from None


def _watching(config: ServiceConfig) -> dict[str, float]:
    """Serve's periods of health checks, and the time for a replica to end its streams."""
    return {
        "health_check_period_s": config.health_check_period_s,
        "health_check_timeout_s": config.health_check_timeout_s,
        "graceful_shutdown_timeout_s": config.graceful_shutdown_timeout_s,
        "graceful_shutdown_wait_loop_s": DRAIN_POLL_S,
    }


def _pair_requests(config: ServiceConfig) -> int:
    """Calls that a pair takes: its rows, those that wait for it, and the room beside them."""
    if config.max_queued_requests < 0:
        return ROUTER_ONGOING
    return config.max_num_seqs + config.max_queued_requests + WATCH_CALLS


def _scaling(config: ServiceConfig) -> dict[str, Any]:
    options = config.scaling()
    if config.autoscaling is None or options is None:
        return {"num_replicas": config.num_pairs}
    waiting = config.autoscaling.cold_start_queue or options.max_pairs * _pair_requests(config)
    waiting = min(waiting, MOST_COUNT)
    # Serve's own queue in each router, the only one there is without a pair; endless by default.
    return {"autoscaling_config": serve_settings(options), "max_queued_requests": waiting}

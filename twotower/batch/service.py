"""The service that a batch job asks: one that runs already, or one of the job's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import ray

from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.local_ray import start_ray
from twotower.deployments.server.server import LocalService, free_port
from twotower.deployments.settings_file import read_settings
from twotower.towers.errors import InvalidRequestError, UnavailableError

# Ray Data's tasks wait for connections, and read and write files: they need a place and no core.
SPARE_CPUS = 4
_TIMEOUT_S = 30.0


@dataclass(frozen=True)
class AskedService:
    """Base URLs of a service, and the model that all of them serve; `max_rows` rows fit into it at
    a time, None if that is not known."""

    targets: tuple[str, ...]
    model: str
    fingerprint: str
    max_rows: int | None = None


@contextmanager
def own_service(
    settings: Mapping[str, Any], phase: Callable[[str], None]
) -> Iterator[AskedService]:
    """A service on this machine for as long as the block runs, in the Ray that runs the job."""
    ports = {"http_port": free_port(), "grpc_port": free_port()}
    config = ServiceConfig.from_settings({**ports, **settings})
    with LocalService(config, spare_cpus=SPARE_CPUS, phase=phase):
        target = f"http://127.0.0.1:{config.http_port}"
        scaling = config.autoscaling
        pairs = scaling.max_pairs if scaling is not None else config.num_pairs
        yield asked_service([target], None, pairs * config.max_num_seqs)


@contextmanager
def job_ray() -> Iterator[None]:
    """Ray for a job that asks a running service: that of this process if it has one, the cluster
    that RAY_ADDRESS names, or processes on this machine."""
    if ray.is_initialized():
        yield
        return
    with ExitStack() as made:
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            start_ray(made, spare_cpus=SPARE_CPUS)
        made.callback(ray.shutdown)
        yield


def asked_service(
    targets: Sequence[str], api_key: str | None, max_rows: int | None = None
) -> AskedService:
    """Asks every target for its model. Raises UnavailableError if one does not answer,
    InvalidRequestError if they serve different models."""
    found = [_model_of(target, api_key) for target in targets]
    if len(set(found)) > 1:
        names = ", ".join(f"{name} ({mark[:8]})" for name, mark in sorted(set(found)))
        raise InvalidRequestError("target", names, "services of one model")
    name, fingerprint = found[0]
    return AskedService(tuple(targets), name, fingerprint, max_rows)


def _model_of(target: str, api_key: str | None) -> tuple[str, str]:
    """Name and fingerprint of the model of a service."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        answer = httpx.get(f"{target}/v1/models", headers=headers, timeout=_TIMEOUT_S)
        answer.raise_for_status()
        model = answer.json()["data"][0]
        return model["id"], model["fingerprint"]
    except httpx.HTTPStatusError as error:
        raise UnavailableError(f"{target}: answered {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"{target}: no answer ({type(error).__name__})") from None
    except (ValueError, LookupError, TypeError):
        raise UnavailableError(f"{target}: is no service of this version") from None


def file_settings(path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a service: a file's, and in their place those that are given."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {**(read_settings(path) if path is not None else {}), **given}

"""The service that a batch job asks: one that runs already, or one of the job's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import httpx
import ray

from twotower.client.keys import authorization
from twotower.deployments.config import ServiceConfig
from twotower.deployments.server.local_ray import start_ray
from twotower.deployments.server.server import LocalService, free_port
from twotower.deployments.settings_file import read_settings
from twotower.towers.checkpoint.fingerprint import fingerprint
from twotower.towers.checkpoint.weights import resolve_checkpoint
from twotower.towers.errors import ConfigError, InvalidRequestError, UnavailableError

# Ray Data's tasks wait for connections, and read and write files: they need a place and no core.
SPARE_CPUS = 4
_TIMEOUT_S = 30.0
# One excludes the other.
_NUMBERS_OF_PAIRS = {"num_pairs", "autoscaling"}
# Ray's own processes otherwise write hints for its developers between a job's lines.
_QUIET = {"RAY_BACKEND_LOG_LEVEL": "fatal"}


@dataclass(frozen=True)
class ServedModel:
    """The name and the fingerprint of the model that rows are asked of."""

    name: str
    fingerprint: str


@dataclass(frozen=True)
class OwnService:
    """A service that a job starts on this machine, for as long as it needs it, in the Ray that runs
    the job."""

    config: ServiceConfig

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> OwnService:
        """With free ports, unless the settings name them. Raises ConfigError."""
        ports = {"http_port": free_port(), "grpc_port": free_port()}
        # Nobody but the job asks it.
        inside = {"http_host": "127.0.0.1", "api_keys": [], "ingress": "proxy"}
        return cls(ServiceConfig.from_settings({**ports, **settings, **inside}))

    def model(self) -> ServedModel:
        """What it will serve. Raises CheckpointError."""
        folder = resolve_checkpoint(self.config.model)
        return ServedModel(self.config.shown_name(), fingerprint(folder))

    @property
    def max_rows(self) -> int:
        """Rows that it works on at once, at most."""
        scaling = self.config.autoscaling
        pairs = scaling.max_pairs if scaling is not None else self.config.num_pairs
        return pairs * self.config.max_num_seqs

    @contextmanager
    def running(self, phase: Callable[[str], None]) -> Iterator[tuple[str, ...]]:
        """The URLs of the service while it runs. Raises UnavailableError, and ConfigError in a
        process that uses Ray already."""
        if ray.is_initialized():
            raise ConfigError("service: this process uses Ray already; name the job's targets")
        os.environ.update(_QUIET)
        with LocalService(self.config, spare_cpus=SPARE_CPUS, phase=phase):
            yield (f"http://127.0.0.1:{self.config.http_port}",)


@dataclass(frozen=True)
class RunningServices:
    """Services that run already; all serve one model."""

    targets: tuple[str, ...]
    api_key: str | None = field(default=None, repr=False)
    # What they have room for is not known.
    max_rows: ClassVar[int | None] = None

    def model(self) -> ServedModel:
        """What they serve. Raises UnavailableError if one does not answer, InvalidRequestError if
        they serve different models."""
        found = {_model_of(target, self.api_key) for target in self.targets}
        if len(found) > 1:
            names = ", ".join(sorted(f"{own.name} ({own.fingerprint[:8]})" for own in found))
            raise InvalidRequestError("target", names, "services of one model")
        return found.pop()

    @contextmanager
    def running(self, phase: Callable[[str], None]) -> Iterator[tuple[str, ...]]:
        """Their URLs, with a Ray for the job."""
        phase("starting Ray")
        with job_ray():
            yield self.targets


Service = OwnService | RunningServices


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
            start_ray(made, variables=_QUIET, spare_cpus=SPARE_CPUS)
        made.callback(ray.shutdown)
        yield


def _model_of(target: str, api_key: str | None) -> ServedModel:
    """Name and fingerprint of the model of a service."""
    headers = {} if api_key is None else authorization(api_key)
    try:
        # Not through a proxy, as the job's callers: it would see the key.
        with httpx.Client(timeout=_TIMEOUT_S, trust_env=False) as client:
            answer = client.get(f"{target}/v1/models", headers=headers)
        answer.raise_for_status()
        model = answer.json()["data"][0]
        return ServedModel(model["id"], model["fingerprint"])
    except httpx.HTTPStatusError as error:
        raise UnavailableError(f"{target}: answered {error.response.status_code}") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise UnavailableError(f"{target}: no answer ({type(error).__name__})") from None
    except (ValueError, LookupError, TypeError):
        raise UnavailableError(f"{target}: is no service of this version") from None


def file_settings(path: Path | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a service: a file's, and in their place those that are given."""
    given = {name: value for name, value in settings.items() if value is not None}
    settings = read_settings(path) if path is not None else {}
    if given.keys() & _NUMBERS_OF_PAIRS:
        settings = {name: settings[name] for name in settings.keys() - _NUMBERS_OF_PAIRS}
    return {**settings, **given}

"""Ray, Serve and the application on this machine, for as long as a `with` block lasts."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import grpc
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.exceptions import RayServeException

from twotower.deployments.app import build_app, check_room, this_machine
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.router.ingress import SERVICER_FUNCTIONS
from twotower.deployments.server.local_ray import direct_ingress, start_ray
from twotower.deployments.telemetry.logs import serve_logging
from twotower.protos.incoming import message_variables
from twotower.towers.errors import ConfigError, TwoTowerError, UnavailableError

# Where Serve's gRPC side listens.
EVERYWHERE = "0.0.0.0"
PROXY_TIMEOUT_S = 30.0
NO_PROXY = [("grpc.enable_http_proxy", 0)]
_OWN_ERRORS = TwoTowerError.__module__


class LocalService:
    """A service in new processes on this machine.

    `address` is its gRPC target. Ray's files go to `folder`, an existing one in a prepared
    environment, or to a new one; it has `spare_cpus` places beside the towers'. `phase` is told
    what is next while it starts. Entering raises CheckpointError or ConfigError before anything is
    started, UnavailableError if the towers do not come up.
    """

    def __init__(
        self,
        config: ServiceConfig,
        *,
        verbose: bool = False,
        folder: Path | None = None,
        spare_cpus: int = 0,
        phase: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.config = config
        self.address = f"127.0.0.1:{config.grpc_port}"
        self._verbose = verbose
        self._folder = folder
        self._spare_cpus = spare_cpus
        self._phase = phase
        self._made = ExitStack()

    def __enter__(self) -> LocalService:
        if self.config.label_selector:
            raise ConfigError("label_selector: a service on one machine has no labelled nodes")
        app = build_app(self.config)
        machine = this_machine()
        check_room(self.config, [machine], machine.name)
        for number in range(self.config.num_routers if self._direct else 1):
            _check_free(self.config.grpc_port + number, EVERYWHERE)
            _check_free(self.config.http_port + number, self.config.http_host)
        try:
            self._phase("Ray")
            self._start_ray()
            self._phase("loading the towers and warming them up")
            serve.run(app, name=APP_NAME, route_prefix="/")
            self._phase("opening the ports")
            await_proxy(self.address)
        except (RuntimeError, OSError, RayError) as error:
            reason = _reason() or _first_line(error)
            self.stop()
            raise UnavailableError(f"the service did not start: {reason}") from None
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
        """Ends the application and every process of it; safe to call again."""
        if ray.is_initialized():
            # Drains the streams; the rest of Serve ends with Ray, which was started for it.
            serve.delete(APP_NAME)
            ray.shutdown()
        self._made.close()

    @property
    def _direct(self) -> bool:
        return self.config.ingress == "direct"

    def _start_ray(self) -> None:
        logging.getLogger("ray.serve").setLevel(logging.INFO if self._verbose else logging.ERROR)
        start_ray(
            self._made,
            folder=self._folder,
            variables=message_variables(self.config.message_bytes(), self.config.max_context)
            | (direct_ingress(self.config) if self._direct else {}),
            spare_cpus=self._spare_cpus,
            log_format=self.config.log_format,
            verbose=self._verbose,
        )
        start_serve(self.config)


def start_serve(
    config: ServiceConfig, *, functions: Sequence[str] = SERVICER_FUNCTIONS, **options: Any
) -> None:
    """Serve with the config's ports and HTTP address, and the gRPC services that `functions` add;
    `options` as of `serve.start`. Where routers have the ports, Serve's proxy is given others."""
    grpc_port, http_port = config.grpc_port, config.http_port
    if config.ingress == "direct":
        grpc_port, http_port = free_port(), free_port()
    serve.start(
        http_options=HTTPOptions(host=config.http_host, port=http_port),
        grpc_options=gRPCOptions(port=grpc_port, grpc_servicer_functions=list(functions)),
        logging_config=serve_logging(config.log_format),
        **options,
    )


def await_proxy(address: str) -> None:
    """Serve reports an application before its proxy listens. Raises UnavailableError."""
    with grpc.insecure_channel(address, options=NO_PROXY) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=PROXY_TIMEOUT_S)
        except grpc.FutureTimeoutError:
            raise UnavailableError(f"nothing answers on {address}") from None


def free_port() -> int:
    """A TCP port that is free right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _check_free(port: int, host: str) -> None:
    """Serve shares a port that is in use, silently; here that is an error."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "errno", None)
        if reason == errno.EADDRNOTAVAIL or isinstance(error, (socket.gaierror, UnicodeError)):
            wanted = "expected an address of this machine"
            raise ConfigError(f"http_host: got {host!r}, {wanted}") from None
        what = "in use" if reason == errno.EADDRINUSE else "not available"
        raise ConfigError(f"port: {port} is {what}, expected a free one") from None


def _reason() -> str:
    """The towers' own error out of Serve's report, which wraps it in traces; empty if none."""
    try:
        application = serve.status().applications.get(APP_NAME)
    except (RuntimeError, OSError, RayError, RayServeException):
        # There is no Serve to ask: its start, or Ray's, is what has failed.
        return ""
    deployments = application.deployments.values() if application is not None else ()
    lines = [line for deployment in deployments for line in deployment.message.splitlines()]
    found = [line.strip() for line in lines if line.strip().startswith(_OWN_ERRORS)]
    return found[-1].partition(": ")[2] if found else ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__

"""HTTP services of this process on free ports of loopback, with real towers and without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from tests.support.pair_here import HandleHere
from twotower.deployments.completions.completions import Completions
from twotower.deployments.config import ServiceConfig
from twotower.deployments.http.app import build_http_app


@dataclass(frozen=True)
class ServicesHere:
    """Where each service is, and the pair that all of them use."""

    urls: Sequence[str]
    handle: HandleHere


@contextmanager
def services_here(folder: Path, configs: Sequence[ServiceConfig]) -> Iterator[ServicesHere]:
    """A service for each config, over one pair of the model in `folder`, in a thread of its own.
    All have the `max_context` of the first."""
    started: list[ServicesHere] = []
    ready, stop = threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    def run() -> None:
        try:
            loop.run_until_complete(_serve(folder, configs, started, ready, stop))
        finally:
            ready.set()
            loop.close()

    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        ready.wait()
        assert started, "the service has not started"
        yield started[0]
    finally:
        if not loop.is_closed():
            loop.call_soon_threadsafe(stop.set)
        thread.join()


async def _serve(
    folder: Path,
    configs: Sequence[ServiceConfig],
    started: list[ServicesHere],
    ready: threading.Event,
    stop: asyncio.Event,
) -> None:
    handle = HandleHere(folder, max_context=configs[0].max_context)
    servers = [_server(handle, config) for config in configs]
    tasks = [asyncio.create_task(server.serve()) for server in servers]
    while not all(server.started for server in servers):
        await asyncio.sleep(0.01)
    ports = [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    started.append(ServicesHere([f"http://127.0.0.1:{port}" for port in ports], handle))
    ready.set()
    await stop.wait()
    for server in servers:
        server.should_exit = True
    await asyncio.gather(*tasks)


def _server(handle: HandleHere, config: ServiceConfig) -> uvicorn.Server:
    app = build_http_app(Completions(config, handle), config, config.access())
    options = uvicorn.Config(
        app, host="127.0.0.1", port=0, ws="none", log_level="warning", timeout_graceful_shutdown=5
    )
    return uvicorn.Server(options)

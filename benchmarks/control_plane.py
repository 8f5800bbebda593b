"""What a block costs between its pair and the client: a service whose towers compute nothing.

    python -m benchmarks.control_plane [--streams 1 8 64 256] [--routers 1] [--pairs 1]
                                       [--pass-ms 0] [--towers actor] [--ingress proxy] [--out FILE]

Serve's gRPC proxy, router, pair and a tower actor are those of a service, on the shipped model's
tokenizer; only the engines are replaced (`fixed_towers`). That many streams begin at once, each
begins again at its end, and once all have a block a window of time is measured: blocks a second,
processor time by process from /proc, time to blocks. A stream that a client leaves must free its
row. Then as many streams of the same messages run over a bare Serve deployment with a gRPC stream,
the floor. The client shares the machine, and its share is printed. Prints a table, and JSON to
--out.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc
import ray
from ray import serve

from benchmarks.fixed_towers import StartFixed
from benchmarks.machine import machine
from benchmarks.process_usage import resident, spent, usages
from benchmarks.stream_load import CHANNEL, LoadFigures, figures, running, until
from benchmarks.tables import Cell, keep, table
from twotower.deployments.app import PAIR_DEPLOYMENT, build_app
from twotower.deployments.config import APP_NAME, ServiceConfig
from twotower.deployments.router.ingress import SERVICER_FUNCTIONS
from twotower.deployments.router.router import Router
from twotower.deployments.routing import attempts
from twotower.deployments.server.local_ray import direct_ingress, start_ray
from twotower.deployments.server.server import await_proxy, free_port, start_serve
from twotower.protos.incoming import message_variables
from twotower.protos.v1 import generation_pb2 as pb

FLOOR_APP = "floor"
GENERATE = "/twotower.v1.Generation/Generate"
FLOOR_SERVICE = "twotower.benchmarks.Floor"
FLOOR = f"/{FLOOR_SERVICE}/Generate"
# Heads of the titles of processes.
GROUPS = {
    "proxy": "ray::ProxyActor",
    "router": f"ray::ServeReplica:{APP_NAME}:Router",
    "pair": f"ray::ServeReplica:{APP_NAME}:{PAIR_DEPLOYMENT}",
    "towers": "ray::FixedTowers",
    "floor": f"ray::ServeReplica:{FLOOR_APP}:",
}
# What lies between towers and client, in the service and in the floor.
HOPS, FLOOR_HOPS = ("proxy", "router", "pair"), ("proxy", "floor")
# Beside those with which a service starts: for calls as Serve makes them by default.
HOP_VARIABLES: dict[str, dict[str, str]] = {
    "grpc": {},
    "actor": {"RAY_SERVE_PROXY_USE_GRPC": "0"},
}
PROMPT = list(range(300, 332))
BLOCK = 16
MAX_CONTEXT = 4096
SETTLE_S = 0.5
FREE_S = 20.0


@dataclass(frozen=True)
class Measured:
    """One number of streams: its load, processor milliseconds a block by group of processes, the
    client among them, growth of resident KiB a stream, failed requests, and rows that were left
    after the clients had gone."""

    streams: int
    all_begun: bool
    load: LoadFigures
    cpu_ms: Mapping[str, float]
    rss_kib: Mapping[str, float]
    failures: Sequence[str]
    rows_left: float = 0.0

    def hops(self, groups: Sequence[str]) -> float:
        """Processor milliseconds a block of several groups."""
        return sum(self.cpu_ms.get(group, 0.0) for group in groups)


class ByActorCalls(Router):
    """A router to which blocks come as results of a pair's task."""

    def __init__(self, config: ServiceConfig, pairs: Any) -> None:
        attempts.BLOCK_STREAM.clear()
        super().__init__(config, pairs)


class Bare:
    """Streams given messages and does nothing else."""

    def __init__(self, messages: Sequence[bytes], pass_s: float) -> None:
        self._messages = [pb.GenerateResponse.FromString(message) for message in messages]
        self._pass_s = pass_s

    async def Generate(  # noqa: N802
        self, _request: pb.GenerateRequest
    ) -> AsyncIterator[pb.GenerateResponse]:
        """All of them."""
        for message in self._messages:
            if self._pass_s:
                await asyncio.sleep(self._pass_s)
            yield message


def add_floor(servicer: Any, server: Any) -> None:
    """Registers the floor's service with Serve's proxy, without what the ingress adds."""
    handler = grpc.unary_stream_rpc_method_handler(
        servicer.Generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(FLOOR_SERVICE, {"Generate": handler}),)
    )


def main() -> None:
    """Parses the arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--routers", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--pass-ms", type=float, default=0.0, help="time that a block takes")
    parser.add_argument("--blocks", type=int, default=64, help="blocks a request")
    parser.add_argument("--ramp-s", type=float, default=0.0, help="time in which streams begin")
    parser.add_argument("--seconds", type=float, default=6.0, help="of each window")
    parser.add_argument("--begin-s", type=float, default=40.0, help="most time for first blocks")
    parser.add_argument(
        "--towers", choices=["actor", "pair"], default="actor", help="process of the towers"
    )
    parser.add_argument(
        "--hops", choices=list(HOP_VARIABLES), default="grpc", help="how replicas call each other"
    )
    parser.add_argument(
        "--ingress", choices=["proxy", "direct"], default="proxy", help="whose gRPC port is called"
    )
    parser.add_argument(
        "--calls", choices=["stream", "task"], default="stream", help="how a pair calls its towers"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help="variables of Ray's processes"
    )
    parser.add_argument("--no-floor", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with fixed_service(args) as config:
        found = asyncio.run(measure(config, args))
    print(show(found["service"], found["floor"]))
    keep(found | {"service": as_json(found["service"]), "floor": as_json(found["floor"])}, args.out)


@contextmanager
def fixed_service(args: argparse.Namespace) -> Iterator[ServiceConfig]:
    """A service on fixed towers in new processes, for as long as the block lasts."""
    config = ServiceConfig(
        **dict(zip(("grpc_port", "http_port"), free_ports(2 * args.routers), strict=True)),
        num_pairs=args.pairs,
        num_routers=args.routers,
        num_threads=1,
        cpus_per_tower=0.1,
        placement="colocated",
        max_num_seqs=max(args.streams),
        max_context=MAX_CONTEXT,
        ingress=args.ingress,
    )
    start = StartFixed(args.towers, args.pass_ms / 1e3, tasks=args.calls == "task")
    router = ByActorCalls if args.hops == "actor" else Router
    app = build_app(config, router_class=router, start=start)
    given = dict(pair.split("=", 1) for pair in args.set)
    # Replicas of the floor have ports as well.
    both = config.model_copy(update={"num_routers": 2 * args.routers})
    with ExitStack() as made:
        start_ray(
            made,
            variables=message_variables(config.message_bytes(), config.max_context)
            | (direct_ingress(both) if args.ingress == "direct" else {})
            | HOP_VARIABLES[args.hops]
            | given,
            spare_cpus=1,
        )
        made.callback(ray.shutdown)

        start_serve(config, functions=[*SERVICER_FUNCTIONS, f"{__spec__.name}.add_floor"])
        serve.run(app, name=APP_NAME, route_prefix="/")
        await_proxy(targets_of(config)[0])
        yield config


def free_ports(count: int) -> tuple[int, int]:
    """The first of so many free ports in a row, twice."""
    while True:
        first = free_port()
        try:
            for port in range(first, first + 2 * count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first, first + count


def targets_of(config: ServiceConfig, *, floor: bool = False) -> list[str]:
    """The gRPC targets of the service, or of the floor, which is started after it."""
    if config.ingress == "proxy":
        return [f"127.0.0.1:{config.grpc_port}"]
    first = config.grpc_port + floor * config.num_routers
    return [f"127.0.0.1:{first + number}" for number in range(config.num_routers)]


async def measure(config: ServiceConfig, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one run."""
    targets, request = targets_of(config), request_of(args.blocks)
    served, floor = list[Measured](), list[Measured]()
    for count in args.streams:
        served.append(await window(targets, (GENERATE, APP_NAME), request, count, args))
    if not args.no_floor:
        messages = await one_answer(targets[0], request)
        bare = serve.deployment(Bare).options(
            num_replicas=args.routers,
            max_ongoing_requests=2 * max(args.streams),
            ray_actor_options={"num_cpus": 0.1},
        )
        app = bare.bind(messages, args.pass_ms / 1e3)
        await asyncio.to_thread(serve.run, app, name=FLOOR_APP, route_prefix="/floor")
        targets = targets_of(config, floor=True)
        for count in args.streams:
            floor.append(await window(targets, (FLOOR, FLOOR_APP), request, count, args))
    given = {name: value for name, value in vars(args).items() if name != "out"}
    return {"machine": machine(1), "arguments": given, "service": served, "floor": floor}


def request_of(blocks: int) -> bytes:
    """A request of so many blocks."""
    request = pb.GenerateRequest()
    request.tokens.ids.extend(PROMPT)
    request.sampling_params.max_tokens = BLOCK * blocks
    request.sampling_params.block_size = BLOCK
    request.sampling_params.ignore_eos = True
    return request.SerializeToString()


async def one_answer(target: str, request: bytes) -> list[bytes]:
    """The messages of a request."""
    async with grpc.aio.insecure_channel(target, options=CHANNEL) as channel:
        call = channel.unary_stream(GENERATE)
        return [m async for m in call(request, metadata=(("application", APP_NAME),))]


async def window(
    targets: Sequence[str],
    called: tuple[str, str],
    request: bytes,
    streams: int,
    args: argparse.Namespace,
) -> Measured:
    """A number of streams of a method and application: a window of time once all have begun."""
    method, application = called
    root = os.getpid()
    idle = resident(usages(GROUPS, root))
    async with running(targets, method, request, application, streams, 1, args.ramp_s) as load:
        begun = await until(lambda: load.begun == streams, args.begin_s)
        await asyncio.sleep(SETTLE_S)
        before, client, begin = usages(GROUPS, root), time.process_time(), time.perf_counter()
        await asyncio.sleep(args.seconds)
        end, client = time.perf_counter(), time.process_time() - client
        after = usages(GROUPS, root)
        found = figures(load, begin, end)
        failures = list(load.failures)
    cpu = spent(before, after) | {"client": client}
    grown = {name: size - idle.get(name, 0) for name, size in resident(after).items()}
    return Measured(
        streams,
        begun,
        found,
        {name: 1e3 * seconds / max(1, found.blocks) for name, seconds in cpu.items()},
        {name: size / 1024 / streams for name, size in grown.items()},
        failures,
        await rows_left() if application == APP_NAME else 0.0,
    )


async def rows_left() -> float:
    """Rows of the pair that Serve asks, once they are gone or FREE_S have passed."""
    handle = serve.get_deployment_handle(PAIR_DEPLOYMENT, APP_NAME)
    deadline = time.perf_counter() + FREE_S
    while True:
        stats = await handle.stats.remote()
        left = sum(float(tower["rows"]) for tower in stats.values())
        if not left or time.perf_counter() > deadline:
            return left
        await asyncio.sleep(SETTLE_S)


def show(served: Sequence[Measured], floor: Sequence[Measured]) -> str:
    """The tables of the service and of the floor."""
    parts = [
        "CPU ms a block, by process; times in ms, p50 and p99:",
        table(
            [
                "blocks/s",
                *HOPS,
                "these three",
                "towers",
                "rest of Ray",
                "client",
                "burst first",
                "first",
                "between",
                "slowest / median",
                "router KiB/stream",
                "failed",
                "rows left",
            ],
            {f"{each.streams} streams": service_row(each) for each in served},
        ),
    ]
    if floor:
        columns = ["messages/s", "proxy", "replica", "both", "share of the service", "between"]
        rows = {
            f"floor, {bare.streams}": floor_row(bare, each)
            for bare, each in zip(floor, served, strict=True)
        }
        parts += ["", table(columns, rows)]
    return "\n".join(parts)


def service_row(each: Measured) -> list[Cell]:
    """The cells of a number of streams."""
    cpu = each.cpu_ms
    return [
        each.load.blocks_per_s,
        *(cpu.get(group, 0.0) for group in HOPS),
        each.hops(HOPS),
        cpu.get("towers", 0.0),
        cpu.get("other", 0.0),
        cpu["client"],
        _two(each.load.burst_first_ms) if each.all_begun else "not all began",
        _two(each.load.first_ms),
        _two(each.load.between_ms),
        each.load.slowest_share,
        each.rss_kib.get("router", 0.0),
        float(len(each.failures)),
        each.rows_left,
    ]


def floor_row(bare: Measured, served: Measured) -> list[Cell]:
    """The cells of the floor beside the service with as many streams."""
    hops = bare.hops(FLOOR_HOPS)
    return [
        bare.load.blocks_per_s,
        bare.cpu_ms.get("proxy", 0.0),
        bare.cpu_ms.get("floor", 0.0),
        hops,
        hops / served.hops(HOPS),
        _two(bare.load.between_ms),
    ]


def as_json(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Figures by number of streams, with the first failure in place of all."""
    return [
        asdict(each) | {"failures": len(each.failures), "failure": each.failures[:1]}
        for each in found
    ]


def _two(values: tuple[float, float] | None) -> str:
    return "" if values is None else f"{values[0]:.1f}, {values[1]:.1f}"


if __name__ == "__main__":
    main()

"""A sending and a receiving side of the state channel, joined by any transport."""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from weakref import ReferenceType, WeakSet, ref

import grpc
import pytest
import torch
from torch import Tensor

from tests.support.random_model import small_config
from twotower.cluster.channel.assembly import Assembly
from twotower.cluster.channel.grpc import METHOD, TOKEN_KEY, TRANSPORT_KEY, GrpcStateLink, LinkSpec
from twotower.cluster.channel.receiver import StateReceiver
from twotower.cluster.channel.tls import new_identity
from twotower.protos.v1 import state_pb2
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.state.update import StateUpdate, UpdatePlan

# "grpc_tls" is the wire grpc over TLS.
TRANSPORTS = ("in_process", "grpc", "grpc_tls", "gloo")
# One process drives both GPUs here; the link does not know.
NCCL = pytest.param(
    "nccl",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(
            torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each side, two in all"
        ),
    ],
)
TOKEN = "a" * 32
MAX_BYTES = 8 << 20
TIMEOUT_S = 10.0
# Two layers of each kind; a token's K/V are 1 KiB a layer, so that kilotokens make megabytes.
CONFIG = small_config(layer_pattern="M*M*", head_dim=64, num_key_value_heads=1)
DTYPE = torch.float32
WEIGHTS = {"a_log": torch.arange(8.0).reshape(2, 4), "dt_bias": torch.ones(2, 4)}


def device_of(transport: str, *, sender: bool) -> torch.device:
    """Where one side of a link has its bytes."""
    return torch.device("cuda", int(sender)) if transport == "nccl" else torch.device("cpu")


class Recorder:
    """Stands in for a denoiser engine: keeps what arrives, refuses gaps as a mirror does."""

    def __init__(self) -> None:
        self.tower = SimpleNamespace(device=torch.device("cpu"))
        self.updates: list[tuple[str, StateUpdate]] = []
        self.positions: dict[str, int] = {}
        self.weights: list[Mapping[str, Tensor]] = []

    def follow(self, tensors: Mapping[str, Tensor]) -> None:
        if "a_log" not in tensors:
            raise ValueError("replay weights: no a_log")
        self.weights.append(tensors)

    def receive(self, row_id: str, update: StateUpdate) -> None:
        if update.plan.start != self.positions.get(row_id, 0):
            raise ValueError("gap")
        self.positions[row_id] = update.plan.position
        self.updates.append((row_id, update))

    def of(self, row_id: str) -> list[StateUpdate]:
        return [update for row, update in self.updates if row == row_id]


class WatchedAssembly(Assembly):
    """An assembly that `num_unfinished` counts for as long as anything holds it."""

    def __init__(self, header: state_pb2.StateHeader, *, keep: bool) -> None:
        super().__init__(header, keep=keep)
        LIVE.add(self)


LIVE: WeakSet[WatchedAssembly] = WeakSet()


def num_unfinished() -> int:
    """Updates of rows of which a receiver holds a part."""
    return sum(one.keep and bool(one.header.row_id) for one in LIVE)


class Channel:
    """A receiver in front of a recorder, and links to it."""

    def __init__(self, transport: str, recorder: Any, timeout_s: float = TIMEOUT_S) -> None:
        self.identity = new_identity() if transport == "grpc_tls" else None
        self.transport: Any = transport.removesuffix("_tls")
        self.recorder = recorder
        self.address = ""
        self.receiver: StateReceiver | None = None
        self._timeout = timeout_s
        self._links: list[GrpcStateLink] = []

    async def start(self) -> None:
        if self.transport != "in_process":
            self.receiver = StateReceiver(
                self.recorder.receive,
                self.recorder.follow,
                TOKEN,
                MAX_BYTES,
                transport=self.transport,
                device=device_of(self.transport, sender=False),
                timeout_s=self._timeout,
                identity=self.identity,
            )
            self.address = await self.receiver.start("127.0.0.1")

    @property
    def certificate(self) -> bytes | None:
        return None if self.identity is None else self.identity.certificate

    def link(
        self,
        *rows: str,
        epoch: int = 1,
        token: str = TOKEN,
        weights: Mapping[str, Tensor] = WEIGHTS,
        config: Any = CONFIG,
    ) -> Any:
        """A link that carries these rows, which the receiver follows already."""
        if self.transport == "in_process":
            tower = SimpleNamespace(config=config, dtype=DTYPE, replay_tensors=lambda: weights)
            made: Any = LocalLink(tower, self.recorder, shared=False)
        else:
            spec = LinkSpec(self.address, token, epoch, self.transport, self.certificate)
            made = GrpcStateLink(
                spec,
                config,
                DTYPE,
                weights,
                device=device_of(self.transport, sender=True),
                receipt_timeout_s=self._timeout,
            )
            self._links.append(made)
        for row in rows:
            made.open(row)
        return made

    def open(self, *rows: str) -> None:
        for row in rows:
            if self.receiver is not None:
                self.receiver.open(row)

    async def raw(self, *frames: bytes, receipts: int = 1) -> list[int]:
        """Writes frames as they are; outcomes of so many receipts. Raises grpc.RpcError."""
        metadata = ((TOKEN_KEY, TOKEN), (TRANSPORT_KEY, self.transport))
        with grpc.insecure_channel(self.address) as channel:
            publish = channel.stream_stream(
                METHOD, response_deserializer=state_pb2.StateReceipt.FromString
            )

            # Not grpc.aio: there a write that meets the end of the stream hides its status.
            def exchange() -> list[int]:
                call = publish(iter(frames), metadata=metadata, timeout=self._timeout)
                return [next(call).outcome for _ in range(receipts)]

            return await asyncio.to_thread(exchange)

    async def close(self) -> None:
        for link in self._links:
            await link.close()
        if self.receiver is not None:
            await self.receiver.stop()


def shares_of(plan: UpdatePlan, seed: int) -> list[tuple[str, int, Tensor]]:
    """Random shares of an update in the order in which layers compute them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = plan.shapes(CONFIG)
    return [
        (name, layer, torch.randn(shape[1:], generator=generator))
        for layer in range(2)
        for name, shape in shapes.items()
    ]


def references(shares: Sequence[tuple[str, int, Tensor]]) -> list[ReferenceType[Tensor]]:
    """Weak references to the tensors of shares; see `is_let_go`."""
    return [ref(tensor) for _, _, tensor in shares]


def is_let_go(references: Sequence[ReferenceType[Tensor]]) -> bool:
    """True once nothing holds any of the tensors."""
    gc.collect()
    return all(reference() is None for reference in references)


def assert_holds(update: StateUpdate, shares: Sequence[tuple[str, int, Tensor]]) -> None:
    """Every share arrived, bit by bit."""
    assert sum(share.nbytes for _, _, share in shares) == update.num_bytes
    for name, layer, share in shares:
        got = update.tensors[name][layer].cpu()
        assert torch.equal(got.view(torch.int32), share.view(torch.int32)), (name, layer)


async def send(link: Any, row: str, plan: UpdatePlan, seed: int = 0) -> None:
    """One whole update of random shares."""
    writer = link.begin(row, None, plan)
    for share in shares_of(plan, seed):
        writer.put(*share)
    await writer.finish()


async def until(condition: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Waits for something that no call announces."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


def some_plans(count: int, chooser: random.Random, most: int = 40) -> list[UpdatePlan]:
    """A snapshot and then deltas and K/V updates of random lengths."""
    plans, place = [], 0
    for number in range(count):
        kind = "snapshot" if number == 0 else chooser.choice(("delta", "kv"))
        end = place + chooser.randint(1, most)
        plans.append(UpdatePlan(kind, place, end))
        place = end
    return plans

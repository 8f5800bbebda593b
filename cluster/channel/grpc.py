"""The sending side of the state channel, beside the context tower.

One bidirectional gRPC stream per link carries frames of many rows' updates, written by one task in
turn, some frames of each at a time. A row has at most one update on the way and HTTP/2 flow control
holds the writer back, which bounds what a slow receiver makes the sender hold. A stream that broke
stays broken: the pair replaces the link whole.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
import torch
from torch import Tensor

from twotower.cluster.channel import framing, process_group
from twotower.cluster.channel.allocator import keep_freed_memory
from twotower.cluster.channel.carrier import BesideFrame, Carrier, CarrierError, InFrame
from twotower.cluster.channel.faults import FaultyCarrier
from twotower.cluster.channel.outgoing import Outgoing, ShareQueue
from twotower.cluster.channel.peers import channel_to, retrieve
from twotower.cluster.channel.self_test import (
    SELF_TEST_PLANS,
    SELF_TEST_ROW,
    SELF_TEST_TIMEOUT_S,
    known_shares,
)
from twotower.cluster.channel.transfers import Transfers
from twotower.cluster.topology import GroupFault, Transport
from twotower.protos.v1 import state_pb2
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.update import UpdateBuilder, UpdatePlan

METHOD = "/twotower.v1.StateChannel/Publish"
TOKEN_KEY = "twotower-link-token"
TRANSPORT_KEY = "twotower-link-transport"
ADMITTED_KEY = "twotower-link-admitted"
STORE_PORT_KEY = "twotower-link-store-port"
RECEIPT_TIMEOUT_S = 30.0
TURN_BYTES = 8 * framing.CHUNK_BYTES
CPU = torch.device("cpu")
OPTIONS = [
    ("grpc.max_send_message_length", 4 * framing.CHUNK_BYTES),
    ("grpc.max_receive_message_length", 4 * framing.CHUNK_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
]
_WEIGHTS_SEQUENCE = 0
_Broken = (grpc.aio.AioRpcError, asyncio.InvalidStateError, CarrierError, UnavailableError)


@dataclass(frozen=True)
class LinkSpec:
    """The peer of a link (`host:port`), the pair's secret, the link's epoch, and the transport of
    the bytes. The port of a process group's store comes with the receiver's admission.
    `certificate` is the receiver's (PEM), for a stream over TLS; None: over plain TCP. `place` is
    where the receiver's tower is, in an operator's words."""

    address: str
    token: str = field(repr=False)
    epoch: int
    transport: Transport = "grpc"
    certificate: bytes | None = field(default=None, repr=False)
    place: str = ""


class GrpcStateLink:
    """The sending side; fulfils `StateLink`. Use it from one event loop only.

    Updates leave from `device` (that of the tower for NCCL, otherwise the CPU) as `dtype`, the
    tower's; shares that are there already are read where they stand. `replay_tensors` are the
    context tower's, sent when the stream opens: with them the receiver replays deltas. What was
    carried is counted in `transfers`. A process group may have a `fault`, on purpose.
    """

    def __init__(
        self,
        spec: LinkSpec,
        config: TwoTowerConfig,
        dtype: torch.dtype,
        replay_tensors: Mapping[str, Tensor],
        *,
        device: torch.device = CPU,
        receipt_timeout_s: float = RECEIPT_TIMEOUT_S,
        transfers: Transfers | None = None,
        fault: GroupFault | None = None,
    ) -> None:
        self.transport: Transport = spec.transport
        self._fault = fault
        self._spec = spec
        self._config = config
        self._dtype = dtype
        self._replay_tensors = replay_tensors
        self._device = device
        self._timeout = receipt_timeout_s
        self.transfers = transfers or Transfers()
        self._next_index: dict[str, int] = {}
        self._on_the_way: dict[str, Outgoing] = {}
        self._unsent: dict[int, Outgoing] = {}
        self._unanswered: dict[int, Outgoing] = {}
        self._sequence = _WEIGHTS_SEQUENCE
        self._wake = asyncio.Event()
        self._idle = False
        self._loop: asyncio.AbstractEventLoop
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._carrier: Carrier = InFrame()
        self._tasks: list[asyncio.Task[None]] = []
        self._broken: str | None = None

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        self._next_index[row_id] = 0

    def forget(self, row_id: str) -> None:
        """Stops to carry a row and gives up an unfinished update; an unknown row is fine."""
        self._next_index.pop(row_id, None)
        if row_id in self._on_the_way:
            self.abort(self._on_the_way[row_id])

    def check(self) -> None:
        """Raises UnavailableError once the link is broken."""
        if self._broken is not None:
            raise UnavailableError(f"the state link is broken: {self._broken}")

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:  # noqa: ARG002
        """Starts the row's next update; that of a row that is not open is dropped.

        Raises ValueError if the update before has not finished, UnavailableError on a broken link.
        """
        return self._begin(row_id, plan)

    async def self_test(self, timeout_s: float = SELF_TEST_TIMEOUT_S) -> None:
        """Sends known updates from the link's device, which the receiver compares bit for bit; no
        row of them is left. Raises UnavailableError with what went wrong."""
        self.open(SELF_TEST_ROW)
        try:
            async with asyncio.timeout(timeout_s):
                for number in range(len(SELF_TEST_PLANS)):
                    await self._send_known(number)
        except TimeoutError:
            raise UnavailableError(f"known updates took more than {timeout_s:g} s") from None
        finally:
            self.forget(SELF_TEST_ROW)

    async def _send_known(self, number: int) -> None:
        plan = SELF_TEST_PLANS[number]
        writer = self._begin(SELF_TEST_ROW, plan)
        known = known_shares(self._config, number, self._dtype, self._device)
        # Millions of numbers: not in the loop that serves rows.
        for share in await asyncio.to_thread(list, known):
            writer.put(*share)
        try:
            await writer.finish()
        except UnavailableError:
            self.check()
            raise UnavailableError(
                f"the known update {number} ({plan.kind}) arrived with other bytes"
            ) from None

    def _begin(self, row_id: str, plan: UpdatePlan) -> UpdateWriter:
        self.check()
        if row_id in self._on_the_way:
            raise ValueError(f"row {row_id!r}: got a new update before the last one has finished")
        builder = UpdateBuilder(self._config, plan, self._device, self._dtype, copy=False)
        self._sequence += 1
        header = framing.make_header(
            plan,
            builder.layout,
            row_id=row_id,
            epoch=self._spec.epoch,
            block_index=self._next_index.get(row_id, 0),
        )
        update = Outgoing(self._sequence, header, builder, self._wake_from_thread)
        if row_id in self._next_index:
            self._on_the_way[row_id] = self._unsent[update.sequence] = update
            self._unanswered[update.sequence] = update
            self._start()
        else:
            update.drop()
        return _Writer(self, update)

    def abort(self, update: Outgoing) -> None:
        """Gives an update up unless it has finished."""
        if update.finished:
            return
        update.drop()
        if not update.begun:
            self._unsent.pop(update.sequence, None)
        self._settled(update)
        self._wake.set()

    async def finish(self, update: Outgoing) -> None:
        """Sends the rest of an update and waits for its receipt. Raises UnavailableError."""
        self.check()
        if update.dropped:
            return
        if not update.complete:
            raise ValueError(f"row {update.header.row_id!r}: got an update that lacks shares")
        update.finished = True
        self._wake.set()
        # Shielded: the update goes on to the mirror even if its waiter was cancelled.
        task = asyncio.ensure_future(self._receipt(update))
        task.add_done_callback(retrieve)
        outcome = await asyncio.shield(task)
        if outcome == state_pb2.StateReceipt.OUTCOME_STALE:
            self._break("another link has taken its place")
            self.check()
        if outcome == state_pb2.StateReceipt.OUTCOME_REFUSED:
            raise UnavailableError("the denoiser tower refused an update of the row")

    async def close(self) -> None:
        """Ends the stream; updates on the way fail."""
        self._break("closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._carrier.close()
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def _receipt(self, update: Outgoing) -> int:
        finished = time.monotonic_ns()
        try:
            # Without a limit as a whole: the writer gives up when nothing moves any more.
            await update.written
            async with asyncio.timeout(self._timeout):
                outcome = await update.receipt
        except TimeoutError:
            self._break(f"no receipt within {self._timeout:g} s")
            raise UnavailableError("the denoiser tower does not answer") from None
        finally:
            self._settled(update)
        row_id = update.header.row_id
        if outcome == state_pb2.StateReceipt.OUTCOME_APPLIED and row_id != SELF_TEST_ROW:
            self.transfers.took(update.num_bytes, time.monotonic_ns() - finished)
        if outcome != state_pb2.StateReceipt.OUTCOME_REFUSED and row_id in self._next_index:
            self._next_index[row_id] = update.header.block_index + 1
        return outcome

    def _settled(self, update: Outgoing) -> None:
        self._unanswered.pop(update.sequence, None)
        if self._on_the_way.get(update.header.row_id) is update:
            del self._on_the_way[update.header.row_id]

    def _wake_from_thread(self) -> None:
        # A busy sender looks again by itself.
        if self._idle:
            self._loop.call_soon_threadsafe(self._wake.set)

    def _start(self) -> None:
        if not self._tasks:
            self._loop = asyncio.get_running_loop()
            task = asyncio.create_task(self._send())
            task.add_done_callback(self._ended)
            self._tasks.append(task)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self._break(f"{type(error).__name__}: {error}")

    async def _send(self) -> None:
        try:
            await self._connect()
            await self._send_weights()
            while True:
                # Idle before the last look: a share put in between still wakes.
                self._idle = True
                if not (ready := [update for update in self._unsent.values() if update.ready]):
                    await self._wake.wait()
                self._wake.clear()
                self._idle = False
                for update in ready:
                    await self._send_turn(update)
        except TimeoutError:
            self._break(f"nothing moved within {self._timeout:g} s")
        except _Broken as error:
            self._break(await self._reason(error))

    async def _send_turn(self, update: Outgoing) -> None:
        # Several frames at once: a block's delta arrives before the next begins, and the receiver
        # holds one rather than a part of each. A long update still lets the others in between.
        sent = 0
        while sent < TURN_BYTES and update.ready and update.sequence in self._unsent:
            before = update.sent_bytes
            await self._send_frame(update)
            sent += update.sent_bytes - before

    async def _send_frame(self, update: Outgoing) -> None:
        if update.dropped:
            if self._unsent.pop(update.sequence, None) and update.begun:
                await self._write(framing.encode(update.sequence, aborted=True))
            return
        pieces, slices = update.take(self._carrier.frame_bytes)
        header = None if update.begun else update.header
        update.begun, last = True, update.sent
        if last:
            del self._unsent[update.sequence]
        payload = self._carrier.payload(slices)
        await self._write(framing.encode(update.sequence, pieces, payload, header, finished=last))
        await self._carrier.send(slices)
        if last and not update.written.done():
            update.written.set_result(None)

    async def _send_weights(self) -> None:
        if not self._replay_tensors:
            return
        tensors = {
            name: tensor.detach().contiguous().to(self._device)
            for name, tensor in self._replay_tensors.items()
        }
        queue = ShareQueue()
        for index, tensor in enumerate(tensors.values()):
            queue.put(index, 0, tensor)
        header: state_pb2.StateHeader | None
        header = framing.make_weights_header(tensors, self._spec.epoch)
        while (taken := queue.take(self._carrier.frame_bytes))[0]:
            pieces, slices = taken
            payload = self._carrier.payload(slices)
            await self._write(framing.encode(_WEIGHTS_SEQUENCE, pieces, payload, header))
            await self._carrier.send(slices)
            header = None
        await self._write(framing.encode(_WEIGHTS_SEQUENCE, header=header, finished=True))

    async def _write(self, frame: bytes) -> None:
        async with asyncio.timeout(self._timeout):
            await self._call.write(frame)

    async def _connect(self) -> None:
        keep_freed_memory()
        self._channel = channel_to(self._spec.address, self._spec.certificate, OPTIONS)
        # Frames are serialized by `framing`.
        publish: Any = self._channel.stream_stream(
            METHOD, request_serializer=None, response_deserializer=state_pb2.StateReceipt.FromString
        )
        self._call = publish(
            metadata=(
                (TOKEN_KEY, self._spec.token),
                (TRANSPORT_KEY, self._spec.transport),
            )
        )
        metadata = await self._admission()
        if self._spec.transport != "grpc":
            self._carrier = await self._join(int(metadata[STORE_PORT_KEY]))
        self._tasks.append(asyncio.create_task(self._read()))

    async def _admission(self) -> dict[str, Any]:
        async with asyncio.timeout(self._timeout):
            metadata = dict(await self._call.initial_metadata() or ())
            if ADMITTED_KEY not in metadata:
                code, details = await self._call.code(), await self._call.details()
                self._break(f"{code.name}: {details}")
        self.check()
        return metadata

    async def _join(self, port: int) -> Carrier:
        host = self._spec.address.rpartition(":")[0]
        spec = self._spec
        if self._fault == "absent":
            raise UnavailableError("no process group: kept from forming, on purpose")
        end = await process_group.join(spec.transport, host, port, self._device, self._timeout)
        carrier = BesideFrame(end, self._break)
        return carrier if self._fault is None else FaultyCarrier(carrier, self._fault)

    async def _read(self) -> None:
        try:
            async for receipt in self._call:
                waiting = self._unanswered.get(receipt.sequence)
                if waiting is not None and not waiting.receipt.done():
                    waiting.receipt.set_result(receipt.outcome)
            self._break("closed by the receiver")
        except grpc.aio.AioRpcError as error:
            self._break(await self._reason(error))

    async def _reason(self, error: BaseException) -> str:
        if isinstance(error, asyncio.InvalidStateError) and self._call.done():
            # The write met an ended stream; why it has ended is in the call.
            return f"{(await self._call.code()).name}: {await self._call.details()}"
        if isinstance(error, grpc.aio.AioRpcError):
            return f"{error.code().name}: {error.details()}"
        return str(error) or "the stream has ended"

    def _break(self, reason: str) -> None:
        if self._broken is not None:
            return
        self._broken = reason
        for update in self._unanswered.values():
            update.drop()
            update.fail(UnavailableError(f"the state link is broken: {reason}"))
        self._unsent.clear()
        if self._call is not None:
            self._call.cancel()
        self._carrier.close()


class _Writer:
    """The engine's end of an update; fulfils `UpdateWriter`."""

    takes_shares = True

    def __init__(self, link: GrpcStateLink, outgoing: Outgoing) -> None:
        self._link = link
        self._outgoing = outgoing

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self._outgoing.put(name, layer, tensor)

    async def finish(self) -> None:
        await self._link.finish(self._outgoing)

    def abort(self) -> None:
        self._link.abort(self._outgoing)

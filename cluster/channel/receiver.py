"""The receiving side of the state channel, beside the denoiser tower."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import grpc
import grpc.aio
import torch
from torch import Tensor

from twotower.cluster.channel import framing
from twotower.cluster.channel.allocator import keep_freed_memory
from twotower.cluster.channel.assembly import Assembly
from twotower.cluster.channel.carrier import BesideFrame, Carrier, CarrierError, InFrame
from twotower.cluster.channel.grpc import (
    ADMITTED_KEY,
    CPU,
    METHOD,
    OPTIONS,
    RECEIPT_TIMEOUT_S,
    STORE_PORT_KEY,
    TOKEN_KEY,
    TRANSPORT_KEY,
)
from twotower.cluster.channel.mirrors import Mirrors
from twotower.cluster.channel.peers import add_port, shows
from twotower.cluster.channel.process_group import Rendezvous
from twotower.cluster.channel.self_test import SELF_TEST_ROW, has_known_values
from twotower.cluster.channel.tls import Identity
from twotower.cluster.topology import Transport
from twotower.protos.v1 import state_pb2
from twotower.towers.state.update import StateUpdate

MAX_UNFINISHED = 4096
Context = grpc.aio.ServicerContext[Any, Any]


class StateReceiver:
    """A gRPC server that hands complete updates to `apply`.

    `apply(row_id, update)` raises ValueError for an update that does not continue the row,
    `follow(tensors)` for replay weights of another model. Only rows that were opened are followed,
    so a late update of a released row leaves nothing behind. The updates of a link's self-test are
    compared and dropped. A link has `transport`, or gRPC alone, to which a pair falls back.
    `device` is where NCCL receives; otherwise the CPU. A group's calls end within `timeout_s`. With
    an `identity` streams are taken over TLS only.
    """

    def __init__(
        self,
        apply: Callable[[str, StateUpdate], None],
        follow: Callable[[Mapping[str, Tensor]], None],
        token: str,
        max_update_bytes: int,
        *,
        transport: Transport = "grpc",
        device: torch.device = CPU,
        timeout_s: float = RECEIPT_TIMEOUT_S,
        identity: Identity | None = None,
    ) -> None:
        self._follow = follow
        self._token = token.encode()
        self._max_update_bytes = max_update_bytes
        self._transport = transport
        self._device = device
        self._timeout = timeout_s
        self._identity = identity
        self._host = ""
        self._mirrors = Mirrors(apply)
        self._server: grpc.aio.Server | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows that are followed."""
        return len(self._mirrors)

    def open(self, row_id: str) -> None:
        """Starts to follow a row."""
        self._mirrors.open(row_id)

    def forget(self, row_id: str) -> None:
        """Stops to follow a row; an unknown row is fine."""
        self._mirrors.forget(row_id)

    async def start(self, host: str) -> str:
        """Listens on a free port of `host`; returns `host:port`."""
        keep_freed_memory()
        self._server = grpc.aio.server(options=OPTIONS)
        service, method = METHOD.strip("/").split("/")
        # Frames arrive as bytes: `framing` reads them without copying their payloads.
        handler = grpc.stream_stream_rpc_method_handler(
            self._publish, response_serializer=state_pb2.StateReceipt.SerializeToString
        )
        handlers = grpc.method_handlers_generic_handler(service, {method: handler})
        self._server.add_generic_rpc_handlers((handlers,))
        address = add_port(self._server, host, self._identity)
        self._host = address.rpartition(":")[0]
        await self._server.start()
        return address

    async def stop(self) -> None:
        """Ends all streams and stops to listen."""
        if self._server is not None:
            await self._server.stop(grace=None)

    async def _publish(
        self, frames: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[state_pb2.StateReceipt]:
        """Serves one link until it ends or breaks a rule."""
        transport = await self._authenticate(context)
        carrier = await self._admit(transport, context)
        stream = _Stream(self._mirrors, self._follow, self._max_update_bytes, carrier)
        try:
            # Unfinished updates are dropped first: nothing is left when the sender sees the end.
            try:
                async for raw in frames:
                    receipt = await stream.take(raw)
                    if receipt is not None:
                        yield receipt
            finally:
                stream.end()
                carrier.close()
        except framing.OversizedError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except framing.FrameError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except CarrierError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))

    async def _authenticate(self, context: Context) -> Transport:
        """The link's transport, once it has shown the token."""
        metadata = dict(context.invocation_metadata() or ())
        if not shows(metadata, TOKEN_KEY, self._token):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing link token")
        transport = metadata.get(TRANSPORT_KEY, "grpc")
        if transport == "grpc":
            return "grpc"
        if transport != self._transport:
            message = f"transport: got {transport!r}, expected {self._transport!r}"
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, message)
        return self._transport

    async def _admit(self, transport: Transport, context: Context) -> Carrier:
        # The sender waits for this before its first write: a write that meets an ended stream
        # would hide why it has ended.
        if transport == "grpc":
            await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
            return InFrame()
        rendezvous = Rendezvous(self._host)
        try:
            await context.send_initial_metadata(
                ((ADMITTED_KEY, "1"), (STORE_PORT_KEY, str(rendezvous.port)))
            )
            end = await rendezvous.accept(transport, self._device, self._timeout)
        except RuntimeError as error:
            await context.abort(grpc.StatusCode.UNAVAILABLE, f"no process group: {error}")
        finally:
            rendezvous.close()
        return BesideFrame(end, lambda _: None)


class _Stream:
    """The unfinished updates of a link."""

    def __init__(
        self,
        mirrors: Mirrors,
        follow: Callable[[Mapping[str, Tensor]], None],
        max_update_bytes: int,
        carrier: Carrier,
    ) -> None:
        self._mirrors = mirrors
        self._follow = follow
        self._max_update_bytes = max_update_bytes
        self._carrier = carrier
        self._assemblies: dict[int, Assembly] = {}

    async def take(self, raw: bytes) -> state_pb2.StateReceipt | None:
        """Takes a frame; a receipt where it ends a row's update.

        Raises FrameError or CarrierError.
        """
        frame, payload = framing.decode(raw)
        if frame.HasField("header"):
            self._begin(frame.sequence, frame.header)
        assembly = self._assemblies.get(frame.sequence)
        if assembly is None:
            raise framing.FrameError(f"sequence: got {frame.sequence} without a header")
        if frame.aborted:
            del self._assemblies[frame.sequence]
            self._mirrors.drop(assembly)
            outcome = state_pb2.StateReceipt.OUTCOME_ABORTED
            return state_pb2.StateReceipt(sequence=frame.sequence, outcome=outcome)
        size = assembly.announce(frame.pieces)
        assembly.fill(frame.pieces, await self._carrier.receive(size, payload))
        return self._finish(frame.sequence, assembly) if frame.finished else None

    def end(self) -> None:
        """Drops every unfinished update."""
        for assembly in self._assemblies.values():
            self._mirrors.drop(assembly)
        self._assemblies.clear()

    def _begin(self, sequence: int, header: state_pb2.StateHeader) -> None:
        if sequence in self._assemblies:
            raise framing.FrameError(f"header: got one inside update {sequence}")
        if len(self._assemblies) >= MAX_UNFINISHED:
            raise framing.FrameError(f"header: got more than {MAX_UNFINISHED} unfinished updates")
        framing.check_header(header, self._max_update_bytes)
        keep = self._mirrors.admit(header)
        assembly = Assembly(header, keep=keep or header.row_id == SELF_TEST_ROW)
        self._assemblies[sequence] = assembly
        self._mirrors.hold(assembly)

    def _finish(self, sequence: int, assembly: Assembly) -> state_pb2.StateReceipt | None:
        del self._assemblies[sequence]
        if not assembly.complete:
            self._mirrors.drop(assembly)
            raise framing.FrameError(f"finished: got update {sequence} with bytes missing")
        if assembly.header.row_id == SELF_TEST_ROW:
            return state_pb2.StateReceipt(sequence=sequence, outcome=_tested(assembly))
        if assembly.header.row_id:
            outcome = self._mirrors.settle(assembly)
            return state_pb2.StateReceipt(sequence=sequence, outcome=outcome)
        # What comes late over a group that was given up may be anything.
        if assembly.keep and self._mirrors.is_latest(assembly.header):
            try:
                self._follow(assembly.weights())
            except ValueError as error:
                raise framing.FrameError(str(error)) from None
        return None


def _tested(assembly: Assembly) -> state_pb2.StateReceipt.Outcome:
    """Whether an update of a link's self-test has arrived as it was sent."""
    known = has_known_values(assembly.update(), assembly.header.block_index)
    assembly.discard()
    if known:
        return state_pb2.StateReceipt.OUTCOME_APPLIED
    return state_pb2.StateReceipt.OUTCOME_REFUSED

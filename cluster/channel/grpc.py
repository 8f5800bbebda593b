"""The state channel over gRPC: a sender beside the context tower, a receiver beside the denoiser.

One bidirectional stream per link. The sender writes an update and waits for its receipt, so a
row has at most one update on the way, and HTTP/2 flow control bounds what a slow receiver makes
the sender hold. A stream that broke stays broken: whoever owns the pair replaces the link whole.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import torch

from twotower.cluster.channel import framing
from twotower.protos.v1 import state_pb2, state_pb2_grpc
from twotower.towers.errors import UnavailableError
from twotower.towers.state import ContextState, StateUpdate

TOKEN_KEY = "twotower-link-token"
ADMITTED_KEY = "twotower-link-admitted"
RECEIPT_TIMEOUT_S = 30.0
_OPTIONS = [
    ("grpc.max_send_message_length", 4 * framing.CHUNK_BYTES),
    ("grpc.max_receive_message_length", 4 * framing.CHUNK_BYTES),
    ("grpc.enable_http_proxy", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.use_local_subchannel_pool", 1),
]


@dataclass(frozen=True)
class LinkSpec:
    """Where a link leads: `host:port`, the pair's secret, and the link's incarnation."""

    address: str
    token: str
    epoch: int


class GrpcStateLink:
    """The sending side; fulfils `StateLink`. Use it from one event loop only.

    `replay_tensors` are the context tower's, sent when the stream opens: with them the receiver
    replays deltas.
    """

    def __init__(
        self,
        spec: LinkSpec,
        replay_tensors: Mapping[str, torch.Tensor],
        receipt_timeout_s: float = RECEIPT_TIMEOUT_S,
    ) -> None:
        self._spec = spec
        self._replay_tensors = replay_tensors
        self._timeout = receipt_timeout_s
        self._lock = asyncio.Lock()
        self._next_index: dict[str, int] = {}
        self._receipts: dict[int, asyncio.Future[int]] = {}
        self._sequence = 0
        self._channel: grpc.aio.Channel | None = None
        self._call: Any = None
        self._reader: asyncio.Task[None] | None = None
        self._broken: str | None = None

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        self._next_index[row_id] = 0

    def forget(self, row_id: str) -> None:
        """Stops to carry a row; an unknown row is fine."""
        self._next_index.pop(row_id, None)

    def check(self) -> None:
        """Raises UnavailableError once the link is broken."""
        if self._broken is not None:
            raise UnavailableError(f"the state link is broken: {self._broken}")

    async def publish(self, row_id: str, state: ContextState, start: int) -> None:
        """Sends the row's state, K/V from `start`; returns when the mirror has it.

        Raises UnavailableError if the link is broken or the receiver refuses.
        """
        await self.send(row_id, state.export(start))

    async def send(self, row_id: str, update: StateUpdate) -> None:
        """Sends one update; as `publish`. A row that is not open is passed over."""
        if row_id not in self._next_index:
            return
        # Shielded: a cancelled write would end the stream of all rows in the middle of an update.
        task = asyncio.ensure_future(self._transfer(row_id, update))
        task.add_done_callback(_retrieve)
        outcome = await asyncio.shield(task)
        if outcome == state_pb2.StateReceipt.OUTCOME_STALE:
            self._break("another link has taken its place")
            self.check()
        if outcome == state_pb2.StateReceipt.OUTCOME_REFUSED:
            raise UnavailableError("the denoiser tower refused an update of the row")

    async def close(self) -> None:
        """Ends the stream; updates on the way fail."""
        self._break("closed")
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close(grace=None)

    async def _transfer(self, row_id: str, update: StateUpdate) -> int:
        async with self._lock:
            self.check()
            sequence, block_index = self._number(row_id)
            receipt = asyncio.get_running_loop().create_future()
            self._receipts[sequence] = receipt
            header = framing.make_header(
                update,
                row_id=row_id,
                sequence=sequence,
                epoch=self._spec.epoch,
                block_index=block_index,
            )
            await self._write(_frames(header, update.tensors))
        try:
            async with asyncio.timeout(self._timeout):
                return int(await receipt)
        except TimeoutError:
            self._break(f"no receipt within {self._timeout:g} s")
            raise UnavailableError("the denoiser tower does not answer") from None
        finally:
            self._receipts.pop(sequence, None)

    def _number(self, row_id: str) -> tuple[int, int]:
        sequence, self._sequence = self._sequence, self._sequence + 1
        block_index = self._next_index.get(row_id, 0)
        if row_id in self._next_index:
            self._next_index[row_id] = block_index + 1
        return sequence, block_index

    async def _write(self, frames: Iterator[state_pb2.StateFrame]) -> None:
        try:
            call = await self._connected()
            for frame in frames:
                await call.write(frame)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._break(_reason(error))
            self.check()

    async def _connected(self) -> Any:
        if self._call is None:
            self._channel = grpc.aio.insecure_channel(self._spec.address, options=_OPTIONS)
            stub = state_pb2_grpc.StateChannelStub(self._channel)
            self._call = stub.Publish(metadata=((TOKEN_KEY, self._spec.token),))
            await self._admission()
            self._reader = asyncio.create_task(self._read())
            if self._replay_tensors:
                header = framing.make_weights_header(self._replay_tensors, self._spec.epoch)
                for frame in _frames(header, self._replay_tensors):
                    await self._call.write(frame)
        return self._call

    async def _admission(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                metadata = dict(await self._call.initial_metadata() or ())
                if ADMITTED_KEY not in metadata:
                    code, details = await self._call.code(), await self._call.details()
                    self._break(f"{code.name}: {details}")
        except TimeoutError:
            self._break(f"no connection within {self._timeout:g} s")
        self.check()

    async def _read(self) -> None:
        try:
            async for receipt in self._call:
                waiting = self._receipts.get(receipt.sequence)
                if waiting is not None and not waiting.done():
                    waiting.set_result(receipt.outcome)
            self._break("closed by the receiver")
        except grpc.aio.AioRpcError as error:
            self._break(_reason(error))

    def _break(self, reason: str) -> None:
        if self._broken is None:
            self._broken = reason
        for waiting in self._receipts.values():
            if not waiting.done():
                waiting.set_exception(UnavailableError(f"the state link is broken: {reason}"))
                # A write that is still going on raises first; the receipt is then not awaited.
                waiting.exception()


@dataclass
class _Mirror:
    """How far the receiver has followed one row."""

    epoch: int = 0
    next_index: int = 0


class StateReceiver:
    """The receiving side: a gRPC server that hands complete updates to `apply`.

    `apply(row_id, update)` raises ValueError for an update that does not continue the row,
    `follow(tensors)` for replay weights of another model. Only rows that were opened are followed,
    so a late update of a released row leaves nothing behind.
    """

    def __init__(
        self,
        apply: Callable[[str, StateUpdate], None],
        follow: Callable[[Mapping[str, torch.Tensor]], None],
        token: str,
        max_update_bytes: int,
    ) -> None:
        self._apply = apply
        self._follow = follow
        self._token = token.encode()
        self._max_update_bytes = max_update_bytes
        self._rows: dict[str, _Mirror] = {}
        self._epoch = 0
        self._server: grpc.aio.Server | None = None

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def open(self, row_id: str) -> None:
        """Starts to follow a row."""
        self._rows[row_id] = _Mirror()

    def forget(self, row_id: str) -> None:
        """Stops to follow a row; an unknown row is fine."""
        self._rows.pop(row_id, None)

    async def start(self, host: str) -> str:
        """Listens on a free port of `host`; returns `host:port`."""
        self._server = grpc.aio.server(options=_OPTIONS)
        state_pb2_grpc.add_StateChannelServicer_to_server(self, self._server)
        name = f"[{host}]" if ":" in host else host
        port = self._server.add_insecure_port(f"{name}:0")
        await self._server.start()
        return f"{name}:{port}"

    async def stop(self) -> None:
        """Ends all streams and stops to listen."""
        if self._server is not None:
            await self._server.stop(grace=None)

    async def Publish(  # noqa: N802
        self,
        frames: AsyncIterator[state_pb2.StateFrame],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[state_pb2.StateReceipt]:
        """Serves one link until it ends or breaks a rule."""
        if not self._authentic(context):
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "wrong or missing link token")
        # The sender waits for this before its first write: a write that meets an ended stream
        # would hide why it has ended.
        await context.send_initial_metadata(((ADMITTED_KEY, "1"),))
        try:
            async for header, update in self._updates(frames):
                outcome = self._settle(header, update)
                yield state_pb2.StateReceipt(sequence=header.sequence, outcome=outcome)
        except framing.OversizedError as error:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
        except framing.FrameError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    def _authentic(self, context: grpc.aio.ServicerContext[Any, Any]) -> bool:
        metadata = dict(context.invocation_metadata() or ())
        given = metadata.get(TOKEN_KEY, "")
        given_bytes = given if isinstance(given, bytes) else given.encode()
        return hmac.compare_digest(given_bytes, self._token)

    async def _updates(
        self, frames: AsyncIterator[state_pb2.StateFrame]
    ) -> AsyncIterator[tuple[state_pb2.StateHeader, StateUpdate | None]]:
        """Complete updates in order; None where the bytes were not worth keeping."""
        assembly: framing.Assembly | None = None
        keep = False
        async for frame in frames:
            if frame.WhichOneof("frame") == "header":
                if assembly is not None:
                    raise framing.FrameError("header: got one inside an update")
                framing.check_header(frame.header, self._max_update_bytes)
                keep = self._wanted(frame.header)
                assembly = framing.Assembly(frame.header, keep=keep)
            elif assembly is None:
                raise framing.FrameError("payload: got one without a header")
            else:
                assembly.feed(frame.payload)
            if assembly.complete:
                if not assembly.header.row_id:
                    self._take_weights(assembly, keep)
                else:
                    yield assembly.header, assembly.update() if keep else None
                assembly = None

    def _wanted(self, header: state_pb2.StateHeader) -> bool:
        self._epoch = max(self._epoch, header.epoch)
        known = not header.row_id or header.row_id in self._rows
        return known and header.epoch == self._epoch

    def _take_weights(self, assembly: framing.Assembly, keep: bool) -> None:
        if keep:
            try:
                self._follow(assembly.tensors())
            except ValueError as error:
                raise framing.FrameError(str(error)) from None

    def _settle(
        self, header: state_pb2.StateHeader, update: StateUpdate | None
    ) -> state_pb2.StateReceipt.Outcome:
        """Applies an update if it is the next one; the row or epoch may have ended meanwhile."""
        if header.epoch < self._epoch:
            return state_pb2.StateReceipt.OUTCOME_STALE
        mirror = self._rows.get(header.row_id)
        if mirror is None or update is None:
            return state_pb2.StateReceipt.OUTCOME_IGNORED
        if header.epoch > mirror.epoch:
            mirror.epoch, mirror.next_index = header.epoch, 0
        if header.block_index < mirror.next_index:
            return state_pb2.StateReceipt.OUTCOME_IGNORED
        if header.block_index > mirror.next_index:
            return state_pb2.StateReceipt.OUTCOME_REFUSED
        try:
            self._apply(header.row_id, update)
        except ValueError:
            return state_pb2.StateReceipt.OUTCOME_REFUSED
        mirror.next_index += 1
        return state_pb2.StateReceipt.OUTCOME_APPLIED


def _frames(
    header: state_pb2.StateHeader, tensors: Mapping[str, torch.Tensor]
) -> Iterator[state_pb2.StateFrame]:
    yield state_pb2.StateFrame(header=header)
    for payload in framing.payloads(tensors):
        yield state_pb2.StateFrame(payload=payload)


def _reason(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return "the stream has ended"


def _retrieve(task: asyncio.Task[int]) -> None:
    """Marks a failure as seen: whoever was waiting may have been cancelled."""
    if not task.cancelled():
        task.exception()

"""Context states as a header and raw bytes: what the state channel puts on the wire, and checks.

Nothing here opens a socket. `check_header` runs before a byte is allocated, so a corrupt or
oversized header costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch

from twotower.protos.v1 import state_pb2
from twotower.towers.state import StateUpdate

CHUNK_BYTES = 1 << 20
MAX_ROW_ID = 256
MAX_DIMENSIONS = 8
UPDATE_TENSORS = frozenset(("conv", "ssm", "xbc", "dt", "k", "v"))
WEIGHT_TENSORS = frozenset(("conv_weight", "conv_bias", "a_log", "dt_bias"))
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class FrameError(ValueError):
    """A frame breaks the channel's rules; the stream cannot go on."""


class OversizedError(FrameError):
    """A header announces more bytes than a row may have."""


def make_header(
    update: StateUpdate, *, row_id: str, sequence: int, epoch: int, block_index: int
) -> state_pb2.StateHeader:
    """The header of an update. Raises ValueError for a dtype that the wire does not know."""
    return state_pb2.StateHeader(
        sequence=sequence,
        epoch=epoch,
        row_id=row_id,
        block_index=block_index,
        start=update.start,
        position=update.position,
        tensors=[_spec(name, tensor) for name, tensor in update.tensors.items()],
    )


def make_weights_header(tensors: Mapping[str, torch.Tensor], epoch: int) -> state_pb2.StateHeader:
    """The header that opens a link: the sender's replay weights, which belong to no row."""
    specs = [_spec(name, tensor) for name, tensor in tensors.items()]
    return state_pb2.StateHeader(epoch=epoch, tensors=specs)


def payloads(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """The tensors' bytes in order, at most `CHUNK_BYTES` at a time."""
    for tensor in tensors.values():
        flat = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        for begin in range(0, flat.numel(), CHUNK_BYTES):
            yield flat[begin : begin + CHUNK_BYTES].numpy().tobytes()


def check_header(header: state_pb2.StateHeader, max_bytes: int) -> None:
    """Raises FrameError, or OversizedError above `max_bytes` of payload."""
    if len(header.row_id) > MAX_ROW_ID:
        raise FrameError(
            f"row_id: got {len(header.row_id)} characters, expected at most {MAX_ROW_ID}"
        )
    names = UPDATE_TENSORS if header.row_id else WEIGHT_TENSORS
    if header.start > header.position:
        raise FrameError(f"start: got {header.start}, expected at most {header.position}")
    seen: set[str] = set()
    for spec in header.tensors:
        _check_spec(spec, names)
        if spec.name in seen:
            raise FrameError(f"tensors: {spec.name} appears twice")
        seen.add(spec.name)
    total = sum(spec.bytes for spec in header.tensors)
    if total > max_bytes:
        raise OversizedError(f"payload: got {total} bytes, expected at most {max_bytes}")


class Assembly:
    """Collects the payload of one checked header.

    With `keep` false the bytes are counted and thrown away: a stream has to be read past updates
    that nobody wants.
    """

    def __init__(self, header: state_pb2.StateHeader, *, keep: bool) -> None:
        self.header = header
        self._keep = keep
        self._sizes = [spec.bytes for spec in header.tensors]
        self._buffers = [
            torch.empty(size if keep else 0, dtype=torch.uint8) for size in self._sizes
        ]
        self._index = 0
        self._filled = 0
        self._skip_full()

    @property
    def complete(self) -> bool:
        return self._index == len(self._sizes)

    def feed(self, payload: bytes) -> None:
        """Takes the next bytes. Raises FrameError if they do not fit the current tensor."""
        if self.complete:
            raise FrameError("payload: got more bytes than the header announced")
        end = self._filled + len(payload)
        if not payload or len(payload) > CHUNK_BYTES or end > self._sizes[self._index]:
            left = self._sizes[self._index] - self._filled
            raise FrameError(
                f"payload: got {len(payload)} bytes, expected 1 to {min(left, CHUNK_BYTES)}"
            )
        if self._keep:
            # A bytearray copy: torch warns about tensors over read-only memory.
            source = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            self._buffers[self._index][self._filled : end] = source
        self._filled = end
        self._skip_full()

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors, once complete; they own their memory, on the CPU."""
        assert self.complete
        assert self._keep
        return {
            spec.name: buffer.view(DTYPES[spec.dtype]).reshape(tuple(spec.shape))
            for spec, buffer in zip(self.header.tensors, self._buffers, strict=True)
        }

    def update(self) -> StateUpdate:
        """The complete update of a row."""
        return StateUpdate(self.header.start, self.header.position, self.tensors())

    def _skip_full(self) -> None:
        while not self.complete and self._filled == self._sizes[self._index]:
            self._index += 1
            self._filled = 0


def _spec(name: str, tensor: torch.Tensor) -> state_pb2.TensorSpec:
    if tensor.dtype not in _DTYPE_NAMES:
        raise ValueError(f"{name}: got {tensor.dtype}, expected one of {', '.join(DTYPES)}")
    return state_pb2.TensorSpec(
        name=name,
        dtype=_DTYPE_NAMES[tensor.dtype],
        shape=list(tensor.shape),
        bytes=tensor.nbytes,
    )


def _check_spec(spec: state_pb2.TensorSpec, names: frozenset[str]) -> None:
    if spec.name not in names:
        raise FrameError(f"tensors: got {spec.name[:40]!r}, expected one of {sorted(names)}")
    if spec.dtype not in DTYPES:
        raise FrameError(f"{spec.name}: got dtype {spec.dtype[:40]!r}, expected {list(DTYPES)}")
    if len(spec.shape) > MAX_DIMENSIONS:
        raise FrameError(
            f"{spec.name}: got {len(spec.shape)} dimensions, expected at most {MAX_DIMENSIONS}"
        )
    expected = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
    if spec.bytes != expected:
        raise FrameError(f"{spec.name}: got {spec.bytes} bytes, expected {expected} by its shape")

"""Calls of a tower as messages: MessagePack, by the types of the calls' own signatures.

Nothing of a peer's message is run, as a pickle's would be, and a value that is not of its type is
refused. One message holds all calls, or all answers, that were ready together.
"""

from __future__ import annotations

import collections.abc
import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from types import GenericAlias
from typing import Any, get_args, get_origin, get_type_hints

import msgspec
import torch
from torch import Tensor

from twotower.towers import errors
from twotower.towers.errors import InvalidRequestError, TwoTowerError, shorten
from twotower.towers.request.params import GenerationParams

# A row's parameters come with each of its calls: so many are kept in both forms, if they are short.
KEPT_PARAMS, KEPT_BYTES = 4096, 1024
# Biases of tokens and stop strings up to which parameters are short.
_KEPT_PARTS = 8
_INT_BITS = 63
_DTYPES = {str(dtype): dtype for dtype in (torch.int64, torch.float32)}
_KINDS = {
    name: kind
    for name, kind in vars(errors).items()
    if isinstance(kind, type) and issubclass(kind, TwoTowerError)
}
Part = str | int | float | bool | None


class Request(msgspec.Struct, array_like=True, frozen=True):
    """One call: its number on the stream, the tower in a process that holds both, the qualified
    name of its method, and the arguments."""

    number: int
    side: str | None
    call: str
    arguments: msgspec.Raw


class Failure(msgspec.Struct, array_like=True, frozen=True):
    """An error: the name of its class, and what it is made from."""

    kind: str
    parts: tuple[Part, ...]

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """The message of an error."""
        if isinstance(error, InvalidRequestError):
            parts = (error.field, _plain(error.value), error.limit)
            return cls(InvalidRequestError.__name__, parts)
        return cls(type(error).__name__, (_plain(str(error)),))

    def error(self) -> Exception:
        """The error again; RuntimeError for one that is not in towers/errors.py."""
        kind: Any = _KINDS.get(self.kind)
        return RuntimeError(f"{self.kind}: {self.parts[0]}") if kind is None else kind(*self.parts)


class Answer(msgspec.Struct, array_like=True, frozen=True):
    """What became of the call with that number: its value, packed, or a failure."""

    number: int
    value: msgspec.Raw
    failure: Failure | None = None


class CallTypes:
    """The calls that go over a stream, with the types of their arguments and values."""

    def __init__(self, calls: Sequence[Callable[..., Any]]) -> None:
        # By class as well: a context tower and a denoiser tower open rows with other values.
        self._signatures = {call.__qualname__: _Signature(call) for call in calls}

    def __len__(self) -> int:
        return len(self._signatures)

    def __contains__(self, call: str) -> bool:
        return call in self._signatures

    def arguments(self, call: str, packed: msgspec.Raw) -> list[Any]:
        """The arguments of a call, by position.

        Raises msgspec.ValidationError for others than it takes, KeyError for an unknown call.
        """
        return self._signatures[call].arguments(packed)

    def value(self, call: str, packed: msgspec.Raw) -> Any:
        """The value of a call. Raises msgspec.ValidationError for one of another type."""
        return self._signatures[call].value(packed)


def packed(message: Request | Answer) -> msgspec.Raw:
    """A message by itself. Raises TypeError, ValueError, OverflowError for what has none."""
    return msgspec.Raw(_ENCODER.encode(message))


def packed_arguments(arguments: Sequence[object]) -> msgspec.Raw:
    """Arguments of a call, by position; raises as `packed`."""
    sent = [_sent_params(arg) if isinstance(arg, GenerationParams) else arg for arg in arguments]
    return msgspec.Raw(_ENCODER.encode(sent))


def packed_value(value: object) -> msgspec.Raw:
    """The value of a call; raises as `packed`."""
    return msgspec.Raw(_ENCODER.encode(value))


def joined(messages: Sequence[msgspec.Raw]) -> bytes:
    """Several packed messages as one."""
    return _ENCODER.encode(messages)


class _Signature:
    """A call's types, without `self`."""

    def __init__(self, call: Callable[..., Any]) -> None:
        hints = get_type_hints(call)
        names = [name for name in inspect.signature(call).parameters if name != "self"]
        types = tuple(_wire_type(hints[name]) for name in names)
        self._params = [index for index, kind in enumerate(types) if kind is bytes]
        decoder: Any = partial(msgspec.msgpack.Decoder, dec_hook=_decoded)
        self._arguments = decoder(GenericAlias(tuple, types)).decode
        self.value = decoder(hints["return"]).decode

    def arguments(self, packed: msgspec.Raw) -> list[Any]:
        found = list(self._arguments(packed))
        for index in self._params:
            sent: bytes = found[index]
            found[index] = _kept_params(sent) if len(sent) <= KEPT_BYTES else _PARAMS.decode(sent)
        return found


def _wire_type(hint: Any) -> Any:
    """What a message has in place of an argument: tuples for sequences, bytes for parameters, and
    nothing for a callback."""
    if hint is GenerationParams:
        return bytes
    if get_origin(hint) is collections.abc.Sequence:
        return GenericAlias(tuple, (get_args(hint)[0], ...))
    if any(get_origin(part) is collections.abc.Callable for part in get_args(hint)):
        return None
    return hint


def _plain(value: object) -> Part:
    """A part of an error as a message may hold it."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if value is None or isinstance(value, float):
        return value
    if isinstance(value, int) and value.bit_length() <= _INT_BITS:
        return value
    return shorten(value)


def _encoded(value: object) -> object:
    """A tensor's dtype, shape and bytes."""
    if not isinstance(value, Tensor) or str(value.dtype) not in _DTYPES:
        raise TypeError(f"a {getattr(value, 'dtype', type(value).__name__)} has no message")
    return str(value.dtype), tuple(value.shape), value.contiguous().numpy().tobytes()


def _decoded(kind: type, value: Any) -> object:
    """The tensor of these."""
    if kind is not Tensor:
        raise TypeError(f"no message holds a {kind.__name__}")
    dtype, shape, content = value
    if not content:
        return torch.empty(shape, dtype=_DTYPES[dtype])
    return torch.frombuffer(bytearray(content), dtype=_DTYPES[dtype]).reshape(shape)


def _sent_params(params: GenerationParams) -> bytes:
    """A row's parameters as an argument of its calls."""
    if len(params.logit_bias) + len(params.stop) > _KEPT_PARTS:
        return _ENCODER.encode(params)
    return _kept_bytes(params)


@lru_cache(KEPT_PARAMS)
def _kept_bytes(params: GenerationParams) -> bytes:
    return _ENCODER.encode(params)


@lru_cache(KEPT_PARAMS)
def _kept_params(sent: bytes) -> GenerationParams:
    return _PARAMS.decode(sent)


_ENCODER = msgspec.msgpack.Encoder(enc_hook=_encoded)
_PARAMS = msgspec.msgpack.Decoder(GenerationParams)

from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class UpdateKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    UPDATE_KIND_UNSPECIFIED: _ClassVar[UpdateKind]
    UPDATE_KIND_SNAPSHOT: _ClassVar[UpdateKind]
    UPDATE_KIND_DELTA: _ClassVar[UpdateKind]
    UPDATE_KIND_KV: _ClassVar[UpdateKind]
UPDATE_KIND_UNSPECIFIED: UpdateKind
UPDATE_KIND_SNAPSHOT: UpdateKind
UPDATE_KIND_DELTA: UpdateKind
UPDATE_KIND_KV: UpdateKind

class StateFrame(_message.Message):
    __slots__ = ("sequence", "header", "pieces", "aborted", "finished", "payload")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PIECES_FIELD_NUMBER: _ClassVar[int]
    ABORTED_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    header: StateHeader
    pieces: _containers.RepeatedCompositeFieldContainer[Piece]
    aborted: bool
    finished: bool
    payload: bytes
    def __init__(self, sequence: _Optional[int] = ..., header: _Optional[_Union[StateHeader, _Mapping]] = ..., pieces: _Optional[_Iterable[_Union[Piece, _Mapping]]] = ..., aborted: _Optional[bool] = ..., finished: _Optional[bool] = ..., payload: _Optional[bytes] = ...) -> None: ...

class Piece(_message.Message):
    __slots__ = ("tensor", "offset", "size")
    TENSOR_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    tensor: int
    offset: int
    size: int
    def __init__(self, tensor: _Optional[int] = ..., offset: _Optional[int] = ..., size: _Optional[int] = ...) -> None: ...

class StateHeader(_message.Message):
    __slots__ = ("epoch", "row_id", "block_index", "kind", "start", "position", "tensors")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    ROW_ID_FIELD_NUMBER: _ClassVar[int]
    BLOCK_INDEX_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    row_id: str
    block_index: int
    kind: UpdateKind
    start: int
    position: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorSpec]
    def __init__(self, epoch: _Optional[int] = ..., row_id: _Optional[str] = ..., block_index: _Optional[int] = ..., kind: _Optional[_Union[UpdateKind, str]] = ..., start: _Optional[int] = ..., position: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorSpec, _Mapping]]] = ...) -> None: ...

class TensorSpec(_message.Message):
    __slots__ = ("name", "dtype", "shape", "bytes")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    name: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    bytes: int
    def __init__(self, name: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., bytes: _Optional[int] = ...) -> None: ...

class StateReceipt(_message.Message):
    __slots__ = ("sequence", "outcome")
    class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        OUTCOME_UNSPECIFIED: _ClassVar[StateReceipt.Outcome]
        OUTCOME_APPLIED: _ClassVar[StateReceipt.Outcome]
        OUTCOME_IGNORED: _ClassVar[StateReceipt.Outcome]
        OUTCOME_STALE: _ClassVar[StateReceipt.Outcome]
        OUTCOME_REFUSED: _ClassVar[StateReceipt.Outcome]
        OUTCOME_ABORTED: _ClassVar[StateReceipt.Outcome]
    OUTCOME_UNSPECIFIED: StateReceipt.Outcome
    OUTCOME_APPLIED: StateReceipt.Outcome
    OUTCOME_IGNORED: StateReceipt.Outcome
    OUTCOME_STALE: StateReceipt.Outcome
    OUTCOME_REFUSED: StateReceipt.Outcome
    OUTCOME_ABORTED: StateReceipt.Outcome
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    outcome: StateReceipt.Outcome
    def __init__(self, sequence: _Optional[int] = ..., outcome: _Optional[_Union[StateReceipt.Outcome, str]] = ...) -> None: ...

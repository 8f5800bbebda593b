"""The only place that chooses between an operator's reference and its Triton kernel.

Both have one signature. Tensors on a CUDA device take the Triton kernel where there is one, all
others the reference; `force` overrides this for a test or a comparison.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Generic, Literal, ParamSpec, TypeVar

from torch import Tensor

from twotower.kernels import attention as _attention
from twotower.kernels import causal_conv1d as _causal_conv1d
from twotower.kernels import chunk_scan as _chunk_scan
from twotower.kernels import linear as _linear
from twotower.kernels import moe as _moe
from twotower.kernels import norm as _norm
from twotower.kernels import replay as _replay
from twotower.kernels import unmask as _unmask

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["reference", "triton"]

_forced: ContextVar[Backend | None] = ContextVar("twotower_backend", default=None)


class Operator(Generic[P, R]):
    """A callable that runs the reference or the Triton kernel of one operator."""

    def __init__(self, reference: Callable[P, R], triton: Callable[P, R] | None = None) -> None:
        self.reference = reference
        self.triton = triton

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        backend = _forced.get()
        if backend is None:
            on_gpu = isinstance(args[0], Tensor) and args[0].is_cuda
            backend = "triton" if on_gpu and self.triton is not None else "reference"
        if backend == "reference":
            return self.reference(*args, **kwargs)
        if self.triton is None:
            raise ValueError(f"{self.reference.__name__}: has no Triton kernel")
        return self.triton(*args, **kwargs)


@contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Inside, every operator runs `backend`; raises ValueError from one that lacks it."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


linear = Operator(_linear.linear)
rms_norm = Operator(_norm.rms_norm)
adaln = Operator(_norm.adaln)
gated_group_norm = Operator(_norm.gated_group_norm)
causal_conv1d = Operator(_causal_conv1d.causal_conv1d)
chunk_scan = Operator(_chunk_scan.chunk_scan)
replay = Operator(_replay.replay)
attention = Operator(_attention.attention)
route = Operator(_moe.route)
experts = Operator(_moe.experts)
mlp = Operator(_moe.mlp)
predict = Operator(_unmask.predict)

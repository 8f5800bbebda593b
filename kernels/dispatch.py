"""Chooses between an operator's reference and its Triton kernel; nothing else in the project does.

Both have the same name and signature; the kernel is in `<file>_triton.py` next to the reference
and is imported when it is first needed. Tensors on a CUDA device take the kernel where there is
one, all others the reference; `force` overrides this for a test or a comparison. Of a dense product
the reference is a library's, and `linear_choice` says where the kernel takes its place. Inside
`deterministic` a row has the bits that it has alone.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cached_property
from typing import Any, Generic, Literal, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from twotower.kernels import attention as _attention
from twotower.kernels import commit as _commit
from twotower.kernels import draft_lines as _draft_lines
from twotower.kernels import linear as _linear
from twotower.kernels import mamba_scan as _mamba_scan
from twotower.kernels import moe as _moe
from twotower.kernels import norm as _norm
from twotower.kernels import pass_buffers as _pass_buffers
from twotower.kernels import replay as _replay
from twotower.kernels import unmask as _unmask
from twotower.kernels.determinism import is_deterministic
from twotower.kernels.linear_choice import own_mlp, own_product

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["reference", "triton"]

_forced: ContextVar[Backend | None] = ContextVar("twotower_backend", default=None)
_by_reference: ContextVar[Operator[..., Any] | None] = ContextVar(
    "twotower_by_reference", default=None
)


class Operator(Generic[P, R]):
    """Runs the reference or the Triton kernel of an operator, by the device of its first tensor.

    `triton` is the name of the kernel's module, None if there is no kernel. `wanted` says of the
    arguments of a call whether the kernel may run; otherwise the reference does, on a GPU too.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        triton: str | None = None,
        wanted: Callable[P, bool] | None = None,
    ) -> None:
        self.reference = reference
        self._triton_module = triton
        self._wanted = wanted

    @property
    def has_kernel(self) -> bool:
        """True if there is a Triton kernel."""
        return self._triton_module is not None

    @cached_property
    def triton(self) -> Callable[P, R]:
        """The kernel's launcher. Raises ValueError if there is none, ImportError without Triton."""
        name = self.reference.__name__
        if self._triton_module is None:
            raise ValueError(f"{name}: has no Triton kernel")
        module = importlib.import_module(f"twotower.kernels.{self._triton_module}")
        return cast(Callable[P, R], getattr(module, name))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        backend = _forced.get()
        first = next((arg for arg in args if isinstance(arg, Tensor)), None)
        on_gpu = first is not None and first.is_cuda
        if backend is None:
            backend = "triton" if on_gpu else "reference"
        if backend == "reference" or not self.has_kernel or _by_reference.get() is self:
            return self.reference(*args, **kwargs)
        if self._wanted is not None and not self._wanted(*args, **kwargs):
            return self.reference(*args, **kwargs)
        if first is None or not on_gpu or first.get_device() == torch.cuda.current_device():
            return self.triton(*args, **kwargs)
        # Triton launches on the current device, whatever device its tensors are on.
        with torch.cuda.device(first.device):
            return self.triton(*args, **kwargs)


@contextmanager
def force(backend: Backend) -> Iterator[None]:
    """Inside, every operator with a Triton kernel runs `backend`, whatever the device; where an
    operator chooses by a call's arguments, `triton` leaves the choice to it."""
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


@contextmanager
def by_reference(operator: Operator[..., Any]) -> Iterator[None]:
    """Inside, this one operator runs its reference, whatever the device and the backend."""
    token = _by_reference.set(operator)
    try:
        yield
    finally:
        _by_reference.reset(token)


def _routed_by_kernel(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    rule: _moe.RouterRule,
    real: Tensor | None = None,
    narrow: Tensor | None = None,
) -> bool:
    """Without narrow parts the kernel takes torch's product, whose order of summation depends on
    the number of tokens; the reference makes it in tiles of one size."""
    del weight, bias, real
    in_pieces = narrow is not None and x.dtype == torch.bfloat16 and rule.groups == 1
    return in_pieces or not is_deterministic()


linear = Operator(_linear.linear, "linear_triton", own_product)
add_norm = Operator(_norm.add_norm, "norm_triton")
gated_group_norm = Operator(_norm.gated_group_norm, "norm_triton")
mamba_scan = Operator(_mamba_scan.mamba_scan, "mamba_scan_triton")
replay = Operator(_replay.replay, "replay_triton")
attention = Operator(_attention.attention, "attention_triton")
store_kv = Operator(_attention.store_kv, "attention_triton")
route = Operator(_moe.route, "router_triton", _routed_by_kernel)
slot_outputs = Operator(_moe.slot_outputs, "experts_triton")
mlp = Operator(_moe.mlp, "linear_triton", own_mlp)
predict = Operator(_unmask.predict, "unmask_triton")
commit = Operator(_commit.commit, "commit_triton")
select_masked = Operator(_commit.select_masked, "commit_triton")
read_blocks = Operator(_draft_lines.read_blocks, "draft_lines_triton")
read_lines = Operator(_draft_lines.read_lines, "draft_lines_triton")
spread_lines = Operator(_draft_lines.spread_lines, "draft_lines_triton")
pack_drafts = Operator(_draft_lines.pack_drafts, "draft_lines_triton")
unpack_rows = Operator(_pass_buffers.unpack_rows, "pass_buffers_triton")
pack_drawn = Operator(_pass_buffers.pack_drawn, "pass_buffers_triton")
right_counts = Operator(_pass_buffers.right_counts, "pass_buffers_triton")

# All operators by name.
OPERATORS: dict[str, Operator[..., Any]] = {
    name: each for name, each in globals().items() if isinstance(each, Operator)
}

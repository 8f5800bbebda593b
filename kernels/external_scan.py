"""mamba-ssm's chunked scan for long prefills, where it is installed and gives the right numbers.

It computes the same as `twotower.kernels.chunk_scan`, all chunks of a row side by side. Its kernels
are autotuned, and builds of them have been wrong without an error: for blocks shorter than a chunk,
for an initial state. So it is used only after it has been compared with the recurrence on the
device and at the shape that it will run at; a single fault disables it.

The autotuner keeps its choice by shape and dtypes, not by length, so that the kernels that were
checked are those that run. fp32 operands go through TF32 there, which costs about 1e-3 of relative
RMS. Of rows that are packed by `seq_idx` it seeds only the first, so rows are a batch here, each
with its state.
Source: github.com/state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower.kernels.chunk_scan import chunk_scan_recurrent

logger = logging.getLogger(__name__)

MODULE, NAME = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"
CHUNK = 128
LIMIT = 2e-3
# The first call is autotuned: as long as a prefill's.
_LENGTHS = (2048, 1, 3, 15, 16, 17, 31, 127, 128, 129, 150)
_CHUNKS = (CHUNK, 16)
# Scale of the initial state of a row each: zero, ordinary, and as grown by a long context.
_STATE_SCALES = (0.0, 1.0, 1000.0)
_DT_RANGE = (1e-3, 1e-1)
# x, dt, a_log, b, c, d, state -> y
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@cache
def load_verified(
    device: torch.device, heads: int, head_dim: int, groups: int, state_dim: int
) -> Scan | None:
    """mamba-ssm's scan at this shape on `device`; None, with a line in the log, if it is not
    installed or gives wrong numbers.

    The scan takes x [B, L, H, P], dt [B, L, H] after softplus, a_log and d [H], b and c
    [B, L, G, N] and state [B, H, P, N], which it leaves as it is, and gives y [B, L, H, P] fp32, as
    `chunk_scan.chunk_scan` does. The first call per device and shape checks, so load it before
    serving.
    """
    try:
        combined = vars(importlib.import_module(MODULE)).get(NAME)
        if combined is None:
            raise ImportError(f"{MODULE} has no {NAME}")
    except ImportError as error:
        logger.info("long prefills keep this project's scan: no mamba-ssm (%s)", error)
        return None
    fault = _first_fault(combined, _random_arguments(device, heads, head_dim, groups, state_dim))
    if fault is not None:
        logger.warning(
            "long prefills keep this project's scan: %s is wrong on %s (%s)", NAME, device, fault
        )
        return None
    return lambda *arguments: _scan(combined, CHUNK, *arguments)


def _scan(
    combined: Any,
    chunk: int,
    x: Tensor,
    dt: Tensor,
    a_log: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    state: Tensor,
) -> Tensor:
    """Calls `combined` with chunks of `chunk` tokens; arguments and result as `load_verified`."""
    # The same dtypes at every call: others would run kernels that were not checked. With bf16
    # operands it would also round the state to bf16.
    x, dt, b, c = (tensor.float().contiguous() for tensor in (x, dt, b, c))
    a = -torch.exp(a_log.float())
    y: Tensor = combined(x, dt, a, b, c, chunk, D=d.float(), initial_states=state.float())
    return y


def _first_fault(combined: Any, arguments: tuple[Tensor, ...]) -> str | None:
    """The first difference from the recurrence at `arguments`; None if there is none."""
    before = arguments[-1].clone()
    # The same truth for all lengths: y of a token does not depend on those after it.
    truth = chunk_scan_recurrent(*(argument.double() for argument in arguments))
    for chunk in _CHUNKS:
        for length in _LENGTHS:
            try:
                got = _scan(combined, chunk, *_first_tokens(arguments, length))
            # Any error of a foreign compiler or kernel: it is not to be used.
            except Exception as error:
                return f"chunk {chunk}, length {length}: {type(error).__name__}: {error}"
            fault = _difference(got, truth[:, :length])
            if fault is not None:
                return f"chunk {chunk}, length {length}: {fault}"
    if not torch.equal(arguments[-1], before):
        return "it changes the state that it is given"
    return None


def _difference(got: Tensor, want: Tensor) -> str | None:
    """The first difference in shape, dtype or numbers [B, L, H, P] above LIMIT, in words."""
    if got.shape != want.shape or got.dtype != torch.float32:
        return f"got {list(got.shape)} {got.dtype}, expected {list(want.shape)} float32"
    axes = (1, 2, 3)
    error = (got.double() - want).square().mean(axes) / want.square().mean(axes)
    for scale, rms in zip(_STATE_SCALES, error.sqrt().tolist(), strict=True):
        # Not the other way round: NaN compares false.
        if not rms <= LIMIT:
            return f"state at scale {scale:g}: relative RMS {rms:.1e}, limit {LIMIT:g}"
    return None


def _first_tokens(arguments: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
    """The arguments of a scan over the first `length` tokens, as views."""
    x, dt, a_log, b, c, d, state = arguments
    return x[:, :length], dt[:, :length], a_log, b[:, :length], c[:, :length], d, state


def _random_arguments(
    device: torch.device, heads: int, head_dim: int, groups: int, state_dim: int
) -> tuple[Tensor, ...]:
    """x, dt, a_log, b, c, d, state, fp32; the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    rows, length = len(_STATE_SCALES), max(_LENGTHS)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    low, high = _DT_RANGE
    dt = low * (high / low) ** torch.rand(rows, length, heads, generator=generator)
    scales = torch.tensor(_STATE_SCALES).view(-1, 1, 1, 1)
    arguments = (
        normal(rows, length, heads, head_dim),
        dt,
        # As the model is initialised: A from -1 to -16.
        torch.linspace(1, 16, heads).log(),
        normal(rows, length, groups, state_dim),
        normal(rows, length, groups, state_dim),
        normal(heads),
        scales * normal(rows, heads, head_dim, state_dim),
    )
    return tuple(argument.to(device) for argument in arguments)

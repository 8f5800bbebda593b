"""mamba-ssm's chunked scan for long prefills, where it is installed and gives the right numbers.

It computes what `twotower.kernels.chunk_scan` does, all chunks of a row side by side. Its kernels
pick one of many configurations by timing, and builds of them have been wrong without an error:
for blocks shorter than a chunk, for an initial state. So it is used only after it has been held
against the recurrence on the device and at the shape that it will run at; one fault disables it.

Its choice is kept by shape and dtypes, not by length: what was checked is what runs. fp32 operands
go through TF32 there, which costs about 1e-3 of relative RMS. Of rows that are packed by `seq_idx`
it seeds only the first, so rows are a batch here, each with its state.
Source: github.com/state-spaces/mamba, mamba_ssm/ops/triton/ssd_combined.py.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower.kernels.chunk_scan import chunk_scan_recurrent

logger = logging.getLogger(__name__)

MODULE, NAME = "mamba_ssm.ops.triton.ssd_combined", "mamba_chunk_scan_combined"
CHUNK = 128
LIMIT = 2e-3
# The first call is the one that is timed: as long as a prefill's.
_LENGTHS = (2048, 1, 3, 15, 16, 17, 31, 127, 128, 129, 150)
_CHUNKS = (CHUNK, 16)
# A row each: not seeded, seeded, seeded as a long context grows it.
_STATE_SCALES = (0.0, 1.0, 1000.0)
_DT_RANGE = (1e-3, 1e-1)
# x, dt, a_log, b, c, d, state -> y
Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ScanShape:
    """H heads of P = `width`, G groups, N = `n` numbers of state per channel."""

    heads: int = 64
    width: int = 64
    groups: int = 8
    n: int = 128


@dataclass(frozen=True)
class _Verdict:
    scan: Scan | None
    reason: str | None


def load_verified(device: torch.device, shape: ScanShape | None = None) -> Scan | None:
    """The scan for `device` and `shape` (that of the 30B model if None), or None.

    It takes x [B, L, H, P], dt [B, L, H] after softplus, a_log and d [H], b and c [B, L, G, N] and
    state [B, H, P, N], which it leaves as it is, and gives y [B, L, H, P] fp32, as
    `chunk_scan.chunk_scan` does. The first call per device and shape checks, so load it before
    serving.
    """
    return _verdict(device, shape or ScanShape()).scan


def why_not(device: torch.device, shape: ScanShape | None = None) -> str | None:
    """Why `load_verified` gives None; None where it gives a scan."""
    return _verdict(device, shape or ScanShape()).reason


@cache
def _verdict(device: torch.device, shape: ScanShape) -> _Verdict:
    try:
        combined = vars(importlib.import_module(MODULE)).get(NAME)
        if combined is None:
            raise ImportError(f"{MODULE} has no {NAME}")
    except ImportError as error:
        reason = f"no mamba-ssm: {error}"
        logger.info("own scan for long prefills: %s", reason)
        return _Verdict(None, reason)
    fault = _first_fault(combined, device, shape)
    if fault is not None:
        reason = f"{NAME} is not used on {device}: {fault}"
        logger.warning("own scan for long prefills: %s", reason)
        return _Verdict(None, reason)
    return _Verdict(lambda *arguments: _scan(combined, CHUNK, *arguments), None)


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
    # The same dtypes at every call: other ones would be kernels that nobody has checked. From bf16
    # operands it would also round the state to bf16.
    x, dt, b, c = (one.float().contiguous() for one in (x, dt, b, c))
    a = -torch.exp(a_log.float())
    y: Tensor = combined(x, dt, a, b, c, chunk, D=d.float(), initial_states=state.float())
    return y


def _first_fault(combined: Any, device: torch.device, shape: ScanShape) -> str | None:
    """What is wrong with it; None if nothing is."""
    arguments = _random_arguments(device, shape)
    state = arguments[-1]
    # One truth for all lengths: y of a token does not depend on those after it.
    truth = chunk_scan_recurrent(*(one.double() for one in arguments))
    for chunk in _CHUNKS:
        for length in _LENGTHS:
            try:
                got = _scan(combined, chunk, *_first_tokens(arguments, length))
            # Whatever a foreign compiler or kernel raises: it is not to be used.
            except Exception as error:
                return f"chunk {chunk}, length {length}: {type(error).__name__}: {error}"
            fault = _difference(got, truth[:, :length])
            if fault is not None:
                return f"chunk {chunk}, length {length}: {fault}"
    if not torch.equal(state, _random_arguments(device, shape)[-1]):
        return "it changes the state that it is given"
    return None


def _difference(got: Tensor, want: Tensor) -> str | None:
    if got.shape != want.shape or got.dtype != torch.float32:
        return f"got {list(got.shape)} {got.dtype}, expected {list(want.shape)} float32"
    axes = (1, 2, 3)
    error = (got.double() - want).square().mean(axes) / want.square().mean(axes)
    for scale, one in zip(_STATE_SCALES, error.sqrt().tolist(), strict=True):
        # Not the other way round: NaN compares false.
        if not one <= LIMIT:
            return f"state at scale {scale:g}: relative RMS {one:.1e}, limit {LIMIT:g}"
    return None


def _first_tokens(arguments: tuple[Tensor, ...], length: int) -> tuple[Tensor, ...]:
    x, dt, a_log, b, c, d, state = arguments
    return x[:, :length], dt[:, :length], a_log, b[:, :length], c[:, :length], d, state


def _random_arguments(device: torch.device, shape: ScanShape) -> tuple[Tensor, ...]:
    """x, dt, a_log, b, c, d, state, fp32; the same numbers at every call."""
    generator = torch.Generator().manual_seed(0)
    rows, length = len(_STATE_SCALES), max(_LENGTHS)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    low, high = _DT_RANGE
    dt = low * (high / low) ** torch.rand(rows, length, shape.heads, generator=generator)
    scales = torch.tensor(_STATE_SCALES).view(-1, 1, 1, 1)
    arguments = (
        normal(rows, length, shape.heads, shape.width),
        dt,
        # As the model is initialised: A from -1 to -16.
        torch.linspace(1, 16, shape.heads).log(),
        normal(rows, length, shape.groups, shape.n),
        normal(rows, length, shape.groups, shape.n),
        normal(shape.heads),
        scales * normal(rows, shape.heads, shape.width, shape.n),
    )
    return tuple(one.to(device) for one in arguments)

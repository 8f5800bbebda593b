"""mamba-ssm's scan is used only if it is right; here by stand-ins under its name."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from twotower.kernels import external_scan
from twotower.kernels.chunk_scan import chunk_scan, chunk_scan_recurrent
from twotower.kernels.external_scan import CHUNK, MODULE, load_verified

CPU = torch.device("cpu")
# Heads, head_dim, groups and state_dim.
SHAPE = (4, 8, 2, 16)
Install = Callable[[Any], None]


def right(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803  mamba-ssm's own names
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    chunk_size: int,
    D: Tensor | None = None,  # noqa: N803
    initial_states: Tensor | None = None,
) -> Tensor:
    """The arguments, shapes and result of mamba_chunk_scan_combined."""
    rows, _, heads, width = x.shape
    state = initial_states
    if state is None:
        state = torch.zeros(rows, heads, width, B.shape[-1])
    skip = torch.zeros(heads) if D is None else D
    assert chunk_size > 0
    return chunk_scan(x, dt, torch.log(-A), B, C, skip, state)


def drops_the_state(*arguments: Any, **options: Any) -> Tensor:
    return right(*arguments, **{**options, "initial_states": None})


def seeds_the_first_row_only(*arguments: Any, **options: Any) -> Tensor:
    state = options["initial_states"].clone()
    state[1:] = 0
    return right(*arguments, **{**options, "initial_states": state})


def wrong_past_a_chunk(*arguments: Any, **options: Any) -> Tensor:
    y = right(*arguments, **options)
    y[:, arguments[5] :] *= 1.01
    return y


def wrong_inside_a_chunk(*arguments: Any, **options: Any) -> Tensor:
    """For blocks that do not fill a chunk of 128."""
    y = right(*arguments, **options)
    return y * 1.01 if y.shape[1] < arguments[5] == CHUNK else y


def gives_nan_once(*arguments: Any, **options: Any) -> Tensor:
    y = right(*arguments, **options)
    if y.shape[1] == 17:
        y[1, 5, 0, 0] = float("nan")
    return y


def raises(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("PassManager::run failed")


def rounds(*arguments: Any, **options: Any) -> Tensor:
    return right(*arguments, **options).bfloat16()


def moves_the_state(*arguments: Any, **options: Any) -> Tensor:
    y = right(*arguments, **options)
    options["initial_states"] *= 0.5
    return y


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a function where mamba-ssm's would be; None: the package lacks it."""

    def put(function: Any) -> None:
        parts = MODULE.split(".")
        for end in range(1, len(parts) + 1):
            module = ModuleType(".".join(parts[:end]))
            module.__path__ = []
            monkeypatch.setitem(sys.modules, module.__name__, module)
        if function is not None:
            monkeypatch.setattr(module, external_scan.NAME, function, raising=False)

    load_verified.cache_clear()
    yield put
    load_verified.cache_clear()


def some_arguments(length: int) -> tuple[Tensor, ...]:
    return (
        normal(2, length, 4, 8),
        normal(2, length, 4, seed=1).exp() * 0.05,
        normal(4, seed=2),
        normal(2, length, 2, 16, seed=3),
        normal(2, length, 2, 16, seed=4),
        normal(4, seed=5),
        normal(2, 4, 8, 16, seed=6, scale=100),
    )


def test_a_right_one_is_used(install: Install) -> None:
    install(right)
    scan = load_verified(CPU, *SHAPE)
    assert scan is not None
    arguments = some_arguments(70)
    truth = chunk_scan_recurrent(*(argument.double() for argument in arguments))
    assert_relative_rms(scan(*arguments), truth, 1e-5)


def test_what_runs_is_what_was_checked(install: Install) -> None:
    """The same chunk size and dtypes, whatever comes: bf16 views of a wider tensor here."""
    seen = []

    def watched(*arguments: Any, **options: Any) -> Tensor:
        tensors = [value for value in (*arguments, *options.values()) if isinstance(value, Tensor)]
        contiguous = all(tensor.is_contiguous() for tensor in tensors)
        seen.append(({tensor.dtype for tensor in tensors}, contiguous, arguments[5], {*options}))
        return right(*arguments, **options)

    install(watched)
    scan = load_verified(CPU, *SHAPE)
    assert scan is not None
    checked = [call for call in seen if call[2] == CHUNK]
    seen.clear()
    x, dt, a_log, b, c, d, state = some_arguments(70)
    wide = torch.cat([x.flatten(2), b.flatten(2), c.flatten(2)], -1).bfloat16()
    x, b, c = (part for part in wide.split([32, 32, 32], -1))
    x, b, c = x.unflatten(-1, (4, 8)), b.unflatten(-1, (2, 16)), c.unflatten(-1, (2, 16))
    y = scan(x, dt, a_log, b, c, d, state)
    assert seen == checked[:1]
    want = scan(x.float(), dt, a_log, b.float(), c.float(), d, state)
    assert y.dtype == torch.float32
    assert_same_bits(y, want)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (drops_the_state, r"chunk 128, length 2048: state at scale 1: relative RMS"),
        (seeds_the_first_row_only, r"state at scale 1: relative RMS"),
        (wrong_past_a_chunk, r"chunk 128, length 2048: state at scale 0: relative RMS"),
        (wrong_inside_a_chunk, r"chunk 128, length 1: state at scale 0: relative RMS 1.0e-02"),
        (gives_nan_once, r"length 17: state at scale 1: relative RMS nan, limit 0.002"),
        (raises, r"RuntimeError: PassManager::run failed"),
        (rounds, r"bfloat16, expected .* float32"),
        (moves_the_state, r"relative RMS"),
    ],
)
def test_a_wrong_one_is_not_used(
    install: Install, function: Any, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    install(function)
    with caplog.at_level(logging.WARNING, external_scan.__name__):
        assert load_verified(CPU, *SHAPE) is None
    (message,) = caplog.messages
    assert re.search(reason, message), message


def test_the_last_call_must_leave_the_state_too(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    """A state that is changed at the very end has spoiled no comparison."""
    calls = []

    def late(*arguments: Any, **options: Any) -> Tensor:
        y = right(*arguments, **options)
        calls.append(y.shape[1])
        if len(calls) == 22:
            options["initial_states"] *= 0.5
        return y

    install(late)
    assert load_verified(CPU, *SHAPE) is None
    assert "changes the state" in caplog.text
    assert len(calls) == 22


def test_the_check_runs_once_per_device_and_shape(install: Install) -> None:
    calls = []

    def counted(*arguments: Any, **options: Any) -> Tensor:
        calls.append(arguments[5])
        return right(*arguments, **options)

    install(counted)
    first = load_verified(CPU, *SHAPE)
    once = len(calls)
    assert load_verified(CPU, *SHAPE) is first
    assert len(calls) == once
    assert load_verified(CPU, 2, 8, 1, 8) is not first
    assert len(calls) == 2 * once


def test_without_the_package_the_log_says_so_without_a_warning(
    monkeypatch: pytest.MonkeyPatch, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    del install
    # What an import statement raises ModuleNotFoundError for.
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with caplog.at_level(logging.INFO, external_scan.__name__):
        assert load_verified(CPU, *SHAPE) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "mamba_ssm" in record.message


def test_a_package_without_the_function_is_as_none(
    install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    install(None)
    with caplog.at_level(logging.INFO, external_scan.__name__):
        assert load_verified(CPU, *SHAPE) is None
    assert external_scan.NAME in caplog.text


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_on_a_gpu_it_is_right_or_refused() -> None:
    """At the 30B shape against fp64; skipped where mamba-ssm is not installed."""
    device = torch.device("cuda")
    scan = load_verified(device, 64, 64, 8, 128)
    if scan is None:
        pytest.skip("mamba-ssm is not installed, or wrong here")
    for length in (65, 500, 4096):
        arguments = tuple(
            tensor.to(device)
            for tensor in (
                normal(2, length, 64, 64),
                normal(2, length, 64, seed=1).exp() * 0.05,
                normal(64, seed=2),
                normal(2, length, 8, 128, seed=3),
                normal(2, length, 8, 128, seed=4),
                normal(64, seed=5),
                normal(2, 64, 64, 128, seed=6, scale=1000),
            )
        )
        truth = chunk_scan_recurrent(*(argument.double() for argument in arguments))
        assert_relative_rms(scan(*arguments), truth, external_scan.LIMIT)

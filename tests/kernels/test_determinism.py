"""In deterministic mode no launch depends on how many tokens or rows share the pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_rows_are_independent, normal
from tests.support.mamba_layer import TINY
from twotower.kernels import (
    attention_triton,
    chunk_scan_triton,
    dispatch,
    expert_tiles_triton,
    experts_triton,
    external_scan,
    linear_triton,
    mamba_scan_triton,
    mamba_triton,
    moe,
    quantized_triton,
    router_triton,
)
from twotower.kernels.attention import PagedKeyValues
from twotower.kernels.determinism import deterministic, is_deterministic
from twotower.kernels.mamba_scan import MambaScanWeights
from twotower.kernels.moe import ExpertWeights, RouterRule, Routing, narrow_parts
from twotower.kernels.quantized import quantize
from twotower.kernels.rows import Rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MODULES = (
    attention_triton,
    chunk_scan_triton,
    expert_tiles_triton,
    experts_triton,
    linear_triton,
    mamba_scan_triton,
    mamba_triton,
    quantized_triton,
    router_triton,
)
# Whole numbers alone: the order of a sort and of its sums cannot be seen in their results.
EXEMPT = {"_count_kernel", "_place_kernel"}
EXEMPT_CONSTANTS = {"sorts"}
TOKENS = range(1, 201)
PAGE = 16
Launches = list[tuple[str, tuple[tuple[str, Any], ...]]]
Call = Callable[[int], object]


class Recorder:
    """Stands in for a kernel: notes the constants of a launch and does nothing."""

    def __init__(self, name: str, launches: Launches) -> None:
        self._name = name
        self._launches = launches

    def __getitem__(self, grid: object) -> Callable[..., None]:
        def launched(*_: object, **constants: Any) -> None:
            if self._name not in EXEMPT:
                kept = {name: constants[name] for name in {*constants} - EXEMPT_CONSTANTS}
                self._launches.append((self._name, tuple(sorted(kept.items()))))

        return launched


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The launches so far, none of which has run."""
    found: Launches = []
    for module in MODULES:
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Recorder(name, found))
    return found


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


def linear_of(dtype: torch.dtype, outputs: int, inner: int) -> Call:
    weight = zeros(outputs, inner, dtype=dtype)
    return lambda tokens: dispatch.linear(zeros(tokens, inner, dtype=dtype), weight)


def mlp(tokens: int) -> object:
    return dispatch.mlp(zeros(tokens, 64), zeros(128, 64), zeros(64, 128))


def experts_of(shared: int, *, fp8: bool = False) -> Call:
    up: ExpertWeights = zeros(4, 32, 64)
    down: ExpertWeights = zeros(4, 64, 32)
    if fp8:
        up, down = (quantize(zeros(*shape), "fp8") for shape in ((4, 32, 64), (4, 64, 32)))
    shared_up, shared_down = zeros(shared, 64), zeros(64, shared)

    def call(tokens: int) -> object:
        ids, scores = zeros(tokens, 2, dtype=torch.int64), zeros(tokens, 2, dtype=torch.float32)
        given = zeros(tokens, 64), Routing(ids, scores)
        return dispatch.slot_outputs(*given, up, down, shared_up, shared_down)

    return call


def route(tokens: int, narrow: Tensor | None, groups: int = 1) -> object:
    gate, bias = zeros(16, 64, dtype=torch.float64), zeros(16, dtype=torch.float32)
    rule = RouterRule(2, groups, 1, True, 1.0)
    return dispatch.route(zeros(tokens, 64), gate, bias, rule, None, narrow)


def rows_of(lengths: list[int]) -> Rows:
    pages = zeros(len(lengths), 400 // PAGE * 4, dtype=torch.int32)
    return Rows.build(lengths, range(len(lengths)), [0] * len(lengths), pages, PAGE)


def scan(lengths: list[int]) -> object:
    weights = MambaScanWeights(
        zeros(TINY.channels, TINY.taps),
        None,
        *(zeros(TINY.heads, dtype=torch.float32) for _ in range(3)),
        TINY.groups,
    )
    projected = zeros(sum(lengths), TINY.inner + TINY.channels + TINY.heads)
    conv = zeros(len(lengths), TINY.taps - 1, TINY.channels)
    states = zeros(len(lengths), TINY.heads, TINY.width, TINY.n, dtype=torch.float32)
    return dispatch.mamba_scan(projected, weights, conv, states, rows_of(lengths))


def attention(lengths: list[int]) -> object:
    q, new = zeros(sum(lengths), 8, 16), zeros(sum(lengths), 2, 16)
    pool = zeros(2, PAGE, 16)
    return dispatch.attention(q, new, new, PagedKeyValues(pool, pool), rows_of(lengths), True)


def one_row(operator: Callable[[list[int]], object]) -> Call:
    return lambda tokens: operator([tokens])


def single_tokens(operator: Callable[[list[int]], object]) -> Call:
    return lambda tokens: operator([1] * tokens)


OPERATORS: dict[str, list[Call]] = {
    "linear": [linear_of(torch.bfloat16, 128, 256)],
    "linear, split": [linear_of(torch.float16, 128, 2048)],
    "mlp": [mlp],
    "route": [lambda tokens: route(tokens, narrow_parts(zeros(16, 64, dtype=torch.float64)))],
    "experts": [experts_of(64)],
    "experts, shared apart": [experts_of(48)],
    "experts, products in 8 bits": [experts_of(64, fp8=True)],
    "mamba_scan": [one_row(scan), single_tokens(scan)],
    "attention": [one_row(attention), single_tokens(attention)],
}


def kinds(launches: Launches, calls: list[Call], on: bool) -> int:
    """How many different sequences of launches the calls make over all numbers of tokens."""
    found = set()
    with dispatch.force("triton"), deterministic() if on else nullcontext():
        for call in calls:
            for tokens in TOKENS:
                launches.clear()
                call(tokens)
                assert launches or not on
                found.add(tuple(launches))
    return len(found)


@pytest.mark.parametrize("name", OPERATORS)
def test_a_launch_does_not_see_the_number_of_tokens(name: str, launches: Launches) -> None:
    assert kinds(launches, OPERATORS[name], on=True) == 1


def test_the_shapes_for_any_number_are_among_those_that_are_compiled() -> None:
    """Those of test_experts_triton.py and test_mamba_scan_triton.py."""
    for tiling in (experts_triton.tiling_of, experts_triton.fp8_tiling_of):
        with deterministic():
            steady = tiling(1, torch.bfloat16)
        assert steady == tiling(1024, torch.bfloat16)
    assert mamba_scan_triton.tile_of(64) == mamba_scan_triton.STEADY_TILE


@pytest.mark.parametrize(
    "name", ["experts", "experts, products in 8 bits", "route", "mamba_scan", "attention"]
)
def test_otherwise_launches_suit_it(name: str, launches: Launches) -> None:
    """What the test above would find."""
    assert kinds(launches, OPERATORS[name], on=False) > 1


@pytest.mark.parametrize("groups", [1, 2])
def test_the_router_without_pieces_is_the_reference(groups: int, launches: Launches) -> None:
    """Torch's product of all tokens in fp64 sums in an order that depends on their number."""
    narrow = None if groups == 1 else narrow_parts(zeros(16, 64, dtype=torch.float64))
    with dispatch.force("triton"):
        with deterministic():
            route(40, narrow, groups)
        assert not launches
        route(40, narrow, groups)
    assert launches


def test_no_foreign_scan_takes_a_prompt_that_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class OnGpu(Tensor):
        is_cuda = True

    def noted(*_: object) -> None:
        asked.append(is_deterministic())

    monkeypatch.setattr(mamba_scan_triton, "load_verified", noted)
    assert external_scan.load_verified is not noted
    projected = zeros(100, TINY.inner + TINY.channels + TINY.heads).as_subclass(OnGpu)
    states = zeros(1, TINY.heads, TINY.width, TINY.n, dtype=torch.float32)
    weights: Any = type("Weights", (), {"groups": 1})
    for on in (True, False):
        with deterministic() if on else nullcontext():
            mamba_scan_triton._foreign_scan(projected, weights, states, rows_of([100]))
    assert asked == [False]


@pytest.fixture
def mixture() -> Iterator[tuple[Tensor, ...]]:
    shapes = ((4, 24, 16), (4, 16, 24), (20, 16), (16, 20))
    with deterministic():
        yield tuple(normal(*one, seed=i, scale=0.3).to(DEVICE) for i, one in enumerate(shapes))


def test_experts_are_right_with_the_shared_mlp_by_our_own_product(
    mixture: tuple[Tensor, ...],
) -> None:
    """A token's bits too are those that it has alone."""
    x = normal(20, 16).to(DEVICE)
    ids, scores = torch.arange(40).view(20, 2).to(DEVICE) % 4, normal(20, 2, seed=9).to(DEVICE)
    got = experts_triton.experts(x, ids, scores, *mixture)
    want = moe.experts(x.cpu(), ids.cpu(), scores.cpu(), *(one.cpu() for one in mixture))
    assert_relative_rms(got.cpu(), want, 1e-6)

    def of_tokens(numbers: Tensor) -> Tensor:
        own = numbers.long().to(DEVICE)
        return experts_triton.experts(x[own], ids[own], scores[own], *mixture).cpu()

    assert_rows_are_independent(of_tokens, torch.arange(20.0), sizes=(1, 17))


def test_the_mode_ends_with_its_block() -> None:
    assert not is_deterministic()
    with deterministic():
        assert is_deterministic()
        with pytest.raises(ZeroDivisionError), deterministic():
            _ = 1 / 0
        assert is_deterministic()
    assert not is_deterministic()

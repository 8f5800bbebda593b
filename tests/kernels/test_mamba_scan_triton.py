"""The scan's kernels against the recurrence in fp64: any length, seeded states, ragged batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from tests.support.mamba_layer import (
    DEVICE,
    NAN,
    NEMOTRON,
    SLACK,
    TINY,
    Shape,
    before_softplus,
    fill_new_memory,
    recurrence,
    rows_of,
    steps_of_all_sizes,
    true_conv,
    true_softplus,
)
from twotower.kernels import mamba_scan as reference
from twotower.kernels import mamba_scan_triton as module
from twotower.kernels import mamba_triton
from twotower.kernels.chunk_scan import chunk_scan_recurrent
from twotower.kernels.mamba_scan import MambaScanWeights
from twotower.kernels.mamba_scan_triton import mamba_scan

# In 16 bits a channel whose conv is close to the middle of two numbers may round either way.
LIMITS = {torch.float32: 2e-6, torch.float16: 2e-4, torch.bfloat16: 5e-4}


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


@dataclass(frozen=True)
class Case:
    """Arguments of `mamba_scan`, with the rows' lengths and slots."""

    shape: Shape
    projected: Tensor
    weights: MambaScanWeights
    conv_state: Tensor
    ssm_state: Tensor
    lengths: tuple[int, ...]
    slots: tuple[int, ...]

    def run(self, scan: Callable[..., Tensor] = mamba_scan) -> Tensor:
        rows = rows_of(self.lengths, self.slots)
        return scan(self.projected, self.weights, self.conv_state, self.ssm_state, rows)

    def truth(self) -> Tensor:
        """NaN where no row is computed."""
        shape, weights = self.shape, self.weights
        y = torch.full((len(self.projected), shape.inner), NAN, device=DEVICE).double()
        _, xbc, dt = self.projected.split((shape.inner, shape.channels, shape.heads), dim=-1)
        steps = true_softplus(dt.double() + weights.dt_bias.double())
        start = 0
        for length, slot in zip(self.lengths, self.slots, strict=True):
            own = slice(start, start + length)
            start += length
            if slot < 0 or not length:
                continue
            conv = true_conv(
                self.conv_state[slot], xbc[own], weights.conv_weight, weights.conv_bias
            )
            state, a_log = self.ssm_state[slot].double(), weights.a_log.double()
            past = torch.stack(
                [out for _, out in recurrence(shape, state, conv, steps[own], a_log)]
            )
            x = conv[:, : shape.inner].unflatten(1, (shape.heads, -1))
            y[own] = (past + weights.d.double()[:, None] * x).flatten(1)
        return y

    def check(self, limit: float | None = None, got: Tensor | None = None) -> None:
        """All that is computed is right, nothing else is written."""
        got = self.run() if got is None else got
        want = self.truth()
        idle = want.isnan().all(dim=1)
        assert bool(got[idle].isnan().all())
        assert_relative_rms(
            got[~idle], want[~idle], SLACK * (limit or LIMITS[self.projected.dtype])
        )


def make(
    lengths: Sequence[int],
    slots: Sequence[int] | None = None,
    shape: Shape = TINY,
    dtype: torch.dtype = torch.float32,
    scale: float = 1e3,
    steps: Tensor | None = None,
) -> Case:
    """NaN in z, in padding's tokens and in the slots of no row."""
    own = tuple(range(len(lengths))) if slots is None else tuple(slots)
    tokens, count = sum(lengths), max(0, *own) + 2
    raw = normal(tokens, shape.heads, seed=1) - 2.0 if steps is None else before_softplus(steps)
    weights = MambaScanWeights(
        (normal(shape.channels, shape.taps, seed=2) * 0.5).to(DEVICE, dtype),
        (normal(shape.channels, seed=3) * 0.1).to(DEVICE, dtype),
        (normal(shape.heads, seed=4) * 0.5).to(DEVICE),
        normal(shape.heads, seed=5).to(DEVICE),
        (torch.zeros(shape.heads) if steps is not None else normal(shape.heads, seed=6)).to(DEVICE),
        shape.groups,
    )
    z = torch.full((tokens, shape.inner), NAN)
    projected = torch.cat((z, normal(tokens, shape.channels, seed=7), raw), dim=1)
    conv_state = normal(count, shape.taps - 1, shape.channels, seed=8)
    ssm_state = normal(count, shape.heads, shape.width, shape.n, seed=9) * scale
    unused = sorted({*range(count)} - {*own})
    conv_state[unused] = ssm_state[unused] = NAN
    for row, slot in enumerate(own):
        if slot < 0:
            projected[sum(lengths[:row]) : sum(lengths[: row + 1])] = NAN
    return Case(
        shape,
        projected.to(DEVICE, dtype),
        weights,
        conv_state.to(DEVICE, dtype),
        ssm_state.to(DEVICE),
        tuple(lengths),
        own,
    )


BATCHES = [
    ((1, 1, 0, 1), (2, -1, -1, 0)),
    ((16, 3, 2), (0, -1, 1)),
    ((1, 5, 40, 2), (3, 0, 1, -1)),
    ((65, 1), (1, 0)),
    ((100, 9, 33), (0, -1, 2)),
    ((130,), (0,)),
]


@pytest.mark.parametrize(("lengths", "slots"), BATCHES)
def test_values(lengths: tuple[int, ...], slots: tuple[int, ...]) -> None:
    make(lengths, slots).check()


@pytest.mark.parametrize(("lengths", "slots"), BATCHES[:3])
def test_from_an_empty_state(lengths: tuple[int, ...], slots: tuple[int, ...]) -> None:
    make(lengths, slots, scale=0.0).check()


@pytest.mark.parametrize("lengths", [range(1, 17), range(17, 33), range(33, 49), range(49, 65)])
def test_every_length(lengths: range) -> None:
    make(lengths, shape=Shape(1, 5, 7, 1)).check()


@pytest.mark.parametrize("lengths", [(1, 1), (7, 16), (20,), (70,)])
def test_fp16(lengths: tuple[int, ...]) -> None:
    """A state of 1e5 is beyond what fp16 holds."""
    make(lengths, dtype=torch.float16, scale=1e5).check()


@pytest.mark.parametrize("lengths", [(1,), (20,)])
@pytest.mark.parametrize("shape", [Shape(4, 5, 7, 2), Shape(2, 33, 20, 1, 3), Shape(4, 3, 2, 4, 2)])
def test_shapes(shape: Shape, lengths: tuple[int, ...]) -> None:
    make(lengths, shape=shape).check()


@pytest.mark.parametrize("lengths", [(1, 1), (3, 18)])
def test_without_a_bias_and_with_channels_side_by_side(lengths: tuple[int, ...]) -> None:
    case = make(lengths)
    tap_major = case.weights.conv_weight.t().contiguous().t()
    weights = replace(case.weights, conv_weight=tap_major, conv_bias=None)
    replace(case, weights=weights).check()


@pytest.mark.parametrize("length", [1, 16, 64, 130])
def test_steps_of_all_sizes(length: int) -> None:
    """Most states are forgotten within a token, some hardly decay."""
    steps = steps_of_all_sizes(2 * length, TINY.heads)
    make((length, length), steps=steps).check(1e-5)


@pytest.mark.parametrize("step", [1e-4, 50.0])
@pytest.mark.parametrize("length", [1, 16, 64, 65])
def test_steps_of_one_size(length: int, step: float) -> None:
    make((length,), steps=torch.full((length, TINY.heads), step).double()).check(1e-5)


@pytest.mark.parametrize(("lengths", "slots"), BATCHES[1:4])
def test_the_reference_agrees(lengths: tuple[int, ...], slots: tuple[int, ...]) -> None:
    case = make(lengths, slots)
    want = case.run(reference.mamba_scan)
    computed = ~case.truth().isnan().all(dim=1)
    assert_relative_rms(case.run()[computed], want[computed], SLACK * LIMITS[torch.float32])


@pytest.mark.parametrize("lengths", [(1, 1, 1), (3, 16, 2), (17, 64, 2, 33), (65, 3, 16, 130)])
def test_rows_alone_and_in_a_batch(lengths: tuple[int, ...]) -> None:
    """Bit for bit, as long as the longest row asks for the same tile."""
    case = make(lengths)
    together = case.run()
    start = 0
    for slot, length in enumerate(lengths):
        own = slice(start, start + length)
        start += length
        if module.tile_of(length) == module.tile_of(max(lengths)):
            alone = replace(
                case, projected=case.projected[own], lengths=(length,), slots=(slot,)
            ).run()
            assert_same_bits(together[own], alone, f"row {slot}")


@pytest.mark.parametrize("lengths", [(1, 1), (5, 16), (17, 3), (66,)])
def test_views_of_pools_and_projections(lengths: tuple[int, ...]) -> None:
    case = make(lengths)
    layer, layers = 1, 3
    projected = torch.full((sum(lengths), case.projected.shape[1] + 9), NAN, device=DEVICE)
    conv_state, ssm_state = (
        torch.full((len(state), layers, *state.shape[1:]), NAN, device=DEVICE)
        for state in (case.conv_state, case.ssm_state)
    )
    projected[:, 4:-5] = case.projected
    conv_state[:, layer], ssm_state[:, layer] = case.conv_state, case.ssm_state
    views = replace(
        case,
        projected=projected[:, 4:-5],
        conv_state=conv_state[:, layer],
        ssm_state=ssm_state[:, layer],
    )
    assert_same_bits(views.run(), case.run())


@pytest.mark.parametrize("length", [1, 9, 30, 70])
def test_inputs_are_only_read(length: int) -> None:
    case = make((length,))
    inputs = case.projected, case.conv_state, case.ssm_state
    before = [part.clone() for part in inputs]
    case.run()
    for part, old in zip(inputs, before, strict=True):
        assert_same_bits(part, old)


@pytest.mark.parametrize("lengths", [(0,), (0, 0), (4,), (1, 1)])
def test_padding_alone(lengths: tuple[int, ...]) -> None:
    """Ordinary numbers in it, so that a result would show."""
    case = make(lengths, (-1,) * len(lengths))
    ordinary = {
        name: getattr(case, name).nan_to_num(0.5)
        for name in ("projected", "conv_state", "ssm_state")
    }
    got = replace(case, **ordinary).run()
    assert got.shape == (sum(lengths), TINY.inner)
    assert bool(got.isnan().all())


def test_one_token_in_bf16() -> None:
    """The interpreter cuts where a GPU rounds to bf16."""
    make((1, 1), dtype=torch.bfloat16).check(2e-2)


@pytest.mark.usefixtures("products_of_bf16")
@pytest.mark.parametrize("lengths", [(3, 16), (40, 2), (70,)])
def test_products_beside_bf16_are_as_exact_as_fp32(
    lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same numbers after the conv, once stored as bf16 and once as fp32."""
    case, prepare = make(lengths), mamba_triton.prepare
    results = []
    for dtype in (torch.bfloat16, torch.float32):

        def rounded(*args: Any, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            conv, steps = prepare(*args)
            return conv.bfloat16().to(dtype), steps

        monkeypatch.setattr(module, "prepare", rounded)
        results.append(case.run())
    assert_relative_rms(results[0], results[1], SLACK * 1e-6)


def test_a_run_of_seeded_scans_is_finite() -> None:
    """As many programs as a test may take here; the large number needs a GPU."""
    shape = Shape(5, 4, 4, 1)
    for lengths in ((1,) * 4, (2,) * 12):
        case = make(lengths, shape=shape, steps=steps_of_all_sizes(sum(lengths), shape.heads))
        assert bool(torch.isfinite(case.run()).all())


MULTIPLES = "ssm_state_stride_s ssm_state_stride_h ssm_state_stride_p heads shared_channels"
COMMON = {
    **dict.fromkeys(MULTIPLES.split(), "i32:16"),
    **dict.fromkeys(["ssm_state", "a_log", "d", "y"], "*fp32"),
    **dict.fromkeys(["cu_seqlens", "slots"], "*i32:1"),
    "per_group": "i32",
}


def chunks_launch(max_seqlen: int) -> Launch:
    tile = module.tile_of(max_seqlen)
    return Launch(
        "twotower.kernels.mamba_scan_triton:_chunks_kernel",
        {**COMMON, "conv": "*bf16", "steps": "*fp32"},
        {
            "head_dim": NEMOTRON.width,
            "state_dim": NEMOTRON.n,
            "block_l": tile.tokens,
            "block_p": tile.channels,
            "block_n": NEMOTRON.n,
            "single_chunk": tile.single_chunk,
        },
        tile.num_warps,
        tile.num_stages,
    )


TOKEN_STRIDES = "projected_stride_t conv_state_stride_s conv_state_stride_k conv_weight_stride_k"
TOKEN_LAUNCH = Launch(
    "twotower.kernels.mamba_scan_triton:_token_kernel",
    {
        **COMMON,
        **dict.fromkeys(TOKEN_STRIDES.split(), "i32:16"),
        **dict.fromkeys(["projected", "conv_state", "conv_weight", "conv_bias"], "*bf16"),
        "dt_bias": "*fp32",
    },
    {
        "conv_weight_stride_c": 1,
        "head_dim": NEMOTRON.width,
        "state_dim": NEMOTRON.n,
        "taps": NEMOTRON.taps,
        "block_p": module.TOKEN_TILE.channels,
        "block_n": NEMOTRON.n,
    },
)


def test_kernels_compile_for_a_gpu() -> None:
    token, *chunks = compile_all([TOKEN_LAUNCH, *map(chunks_launch, (16, 64, 4096))])
    for compiled in (token, *chunks):
        assert compiled.spills == 0
    assert token.registers <= 64
    assert chunks[0].registers <= 168, "three programs fit side by side"
    for compiled in chunks:
        assert compiled.instructions["HMMA"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1,) * 8, (16,) * 8, (1, 16, 5, 16), (64, 17, 3), (65, 200)])
def test_a_layer_of_the_large_model(lengths: tuple[int, ...]) -> None:
    case = make(lengths, shape=NEMOTRON, dtype=torch.bfloat16)
    first = case.run()
    case.check(got=first)
    assert_same_bits(case.run(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 16, 100])
@pytest.mark.parametrize("length", [1, 16])
def test_rows_of_the_large_model_are_independent(length: int, count: int) -> None:
    case = make((length,) * count, shape=NEMOTRON, dtype=torch.bfloat16)
    together = case.run()
    for row in {0, count // 2, count - 1}:
        own = slice(row * length, (row + 1) * length)
        alone = replace(case, projected=case.projected[own], lengths=(length,), slots=(row,))
        assert_same_bits(together[own], alone.run(), f"row {row} of {count}")


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(1, 1), (16, 16), (70, 3)])
def test_a_graph_replays_it(lengths: tuple[int, ...]) -> None:
    case = make(lengths, shape=NEMOTRON, dtype=torch.bfloat16)
    rows = rows_of(case.lengths, case.slots)
    inputs = case.projected, case.weights, case.conv_state, case.ssm_state, rows
    want = mamba_scan(*inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = mamba_scan(*inputs)
    got.fill_(NAN)
    graph.replay()
    assert_same_bits(got, want)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 16, 33])
def test_a_million_seeded_programs_are_finite(length: int) -> None:
    rows = 64
    steps = steps_of_all_sizes(rows * length, NEMOTRON.heads)
    case = make((length,) * rows, shape=NEMOTRON, dtype=torch.bfloat16, steps=steps)
    first = case.run()
    assert bool(torch.isfinite(first).all())
    for _ in range(130):
        assert_same_bits(case.run(), first)


def test_a_long_piece_may_be_scanned_by_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments that a verified scan receives are right; here the recurrence stands for it."""
    lengths: list[int] = []

    def recurrent(x: Tensor, *others: Tensor) -> Tensor:
        lengths.append(x.shape[1])
        return chunk_scan_recurrent(x.float(), *(other.float() for other in others))

    def offered(*arguments: Any) -> Any:
        return recurrent if arguments[-1].max_seqlen > 64 else None

    monkeypatch.setattr(module, "_foreign_scan", offered)
    make([70], slots=[2]).check()
    make([9]).check()
    assert lengths == [70]


def test_no_other_library_is_asked_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: Any) -> Any:
        raise AssertionError("asked")

    monkeypatch.setattr(module, "load_verified", unwanted)
    if DEVICE.type == "cpu":
        make([70]).check()

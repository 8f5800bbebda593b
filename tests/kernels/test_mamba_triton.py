"""The launch that leaves conv and steps in memory, against both in fp64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.hopper import Launch, compile_all
from tests.support.mamba_layer import (
    DEVICE,
    NAN,
    NEMOTRON,
    TINY,
    Shape,
    before_softplus,
    fill_new_memory,
    rows_of,
    steps_of_all_sizes,
    true_conv,
    true_softplus,
)
from twotower.kernels.mamba_triton import prepare

LENGTHS, SLOTS = (3, 17, 2, 33, 0, 1), (4, 0, -1, 2, -1, 1)
TOKENS, PADDING = sum(LENGTHS), slice(20, 22)
LAYERS = 2


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def make(shape: Shape, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors that `prepare` takes; NaN in padding and in the slot of no row."""
    xbc = normal(LAYERS, TOKENS, shape.channels, seed=1).to(DEVICE, dtype)
    dt = before_softplus(steps_of_all_sizes(LAYERS, TOKENS, shape.heads)).to(DEVICE, dtype)
    conv_state = normal(5, LAYERS, shape.taps - 1, shape.channels, seed=2).to(DEVICE, dtype)
    xbc[:, PADDING] = dt[:, PADDING] = conv_state[3] = NAN
    return {
        "xbc": xbc,
        "dt": dt,
        "conv_state": conv_state,
        "conv_weight": (normal(LAYERS, shape.channels, shape.taps, seed=3) * 0.5).to(DEVICE),
        "conv_bias": (normal(LAYERS, shape.channels, seed=4) * 0.1).to(DEVICE),
        "dt_bias": torch.zeros(LAYERS, shape.heads, device=DEVICE),
    }


def check(
    inputs: dict[str, Tensor | None], limit: float, counts: tuple[int, ...] | None = None
) -> None:
    rows = rows_of(LENGTHS, SLOTS)
    taken = counts or LENGTHS
    told = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    xbc, dt, conv_state, weight, bias, dt_bias = inputs.values()
    assert xbc is not None
    assert dt is not None
    assert conv_state is not None
    assert weight is not None
    assert dt_bias is not None
    channels = xbc.shape[2] - 3
    conv, steps = prepare(xbc, dt, conv_state, weight, bias, dt_bias, rows, channels, counts=told)
    start = 0
    for length, count, slot in zip(LENGTHS, taken, SLOTS, strict=True):
        own = slice(start, start + (count if slot >= 0 else 0))
        for layer in range(LAYERS if count and slot >= 0 else 0):
            want = true_conv(
                conv_state[slot, layer],
                xbc[layer, own],
                weight[layer],
                None if bias is None else bias[layer],
            )
            assert_relative_rms(conv[layer, own], want[:, :channels], limit)
            true_steps = true_softplus(dt[layer, own].double() + dt_bias[layer].double())
            off = (steps[layer, own].double() - true_steps).abs() / true_steps
            assert float(off.max()) < 3e-6, f"a step is off by {float(off.max()):.1e} of itself"
        assert bool(conv[:, own.stop : start + length].isnan().all())
        assert bool(steps[:, own.stop : start + length].isnan().all())
        start += length


@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("with_bias", [True, False])
def test_values(taps: int, with_bias: bool) -> None:
    inputs: dict[str, Tensor | None] = {**make(Shape(4, 5, 7, 2, taps))}
    check(inputs if with_bias else {**inputs, "conv_bias": None}, 1e-6)


def test_a_weight_with_channels_side_by_side_and_a_bias_of_steps() -> None:
    inputs: dict[str, Tensor | None] = {**make(TINY)}
    weight = inputs["conv_weight"]
    assert weight is not None
    inputs["conv_weight"] = weight.transpose(1, 2).contiguous().transpose(1, 2)
    inputs["dt_bias"] = normal(LAYERS, TINY.heads, seed=5).to(DEVICE)
    check(inputs, 1e-6)


def test_only_the_first_tokens_of_rows() -> None:
    check({**make(TINY)}, 1e-6, (2, 16, 1, 0, 0, 1))


def test_padding_is_not_written() -> None:
    """Ordinary numbers in it, so that a result would show."""
    inputs = make(TINY)
    for name in ("xbc", "dt", "conv_state"):
        inputs[name] = inputs[name].nan_to_num(0.5)
    check({**inputs}, 1e-6)


def test_fp16() -> None:
    check({**make(TINY, torch.float16)}, 2e-4)


def test_more_channels_and_heads_than_a_tile() -> None:
    check({**make(Shape(33, 4, 3, 1))}, 1e-6)


def test_the_cut_of_columns_and_pools_does_not_matter() -> None:
    inputs = make(TINY)
    rows = rows_of(LENGTHS, SLOTS)
    want = prepare(**inputs, rows=rows, channels=TINY.channels)
    packed = torch.cat((inputs["dt"], inputs["xbc"], inputs["dt"]), dim=-1)
    packed = packed.transpose(0, 1).contiguous().transpose(0, 1)
    pool = torch.full((5, 7, TINY.taps - 1, TINY.channels), NAN, device=DEVICE)
    pool[:, 2:6:2] = inputs["conv_state"]
    views = {
        **inputs,
        "xbc": packed[..., TINY.heads : -TINY.heads],
        "dt": packed[..., -TINY.heads :],
        "conv_state": pool[:, 2:6:2],
    }
    got = prepare(**views, rows=rows, channels=TINY.channels)
    for one, other in zip(got, want, strict=True):
        assert_same_bits(one, other)


MULTIPLES = (
    "xbc_stride_m xbc_stride_t dt_stride_m dt_stride_t conv_state_stride_s conv_state_stride_m "
    "conv_state_stride_k conv_weight_stride_m conv_weight_stride_k conv_bias_stride_m "
    "dt_bias_stride_m heads wanted_channels"
)
PREPARE = Launch(
    "twotower.kernels.mamba_triton:_prepare_kernel",
    {
        **dict.fromkeys(MULTIPLES.split(), "i32:16"),
        **dict.fromkeys(["xbc", "dt", "conv_state", "conv_out"], "*bf16"),
        **dict.fromkeys(["conv_weight", "conv_bias"], "*bf16"),
        **dict.fromkeys(["dt_bias", "steps_out"], "*fp32"),
        **dict.fromkeys(["cu_seqlens", "slots", "counts"], "*i32:1"),
        **dict.fromkeys(["total_tokens", "row_count"], "i32"),
    },
    {"conv_weight_stride_c": 1, "taps": 4, "block_t": 16, "block_c": 128, "block_h": 64},
)


def without(launch: Launch, *absent: str) -> Launch:
    """The same launch with None for some of its tensors."""
    signature = {name: kind for name, kind in launch.signature.items() if name not in absent}
    return replace(
        launch, signature=signature, constants={**launch.constants, **dict.fromkeys(absent)}
    )


def test_it_compiles_for_a_gpu() -> None:
    for compiled in compile_all([PREPARE, without(PREPARE, "counts", "conv_bias")]):
        assert compiled.spills == 0
        assert compiled.registers <= 80


@pytest.mark.gpu
def test_a_layer_of_the_large_model() -> None:
    inputs: dict[str, Tensor | None] = {**make(NEMOTRON, torch.bfloat16)}
    check(inputs, 1e-3)

"""Our own dense product: against fp64, rows against themselves alone, and who multiplies."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.comparing import (
    assert_relative_rms,
    assert_rows_are_independent,
    assert_same_bits,
    normal,
)
from tests.support.hopper import Launch, compile_all
from twotower.kernels import dispatch, linear_triton
from twotower.kernels.determinism import deterministic
from twotower.kernels.launch_table import LaunchTable, using
from twotower.kernels.linear_choice import entry_name
from twotower.kernels.linear_triton import linear, mlp, shape_of

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAN = float("nan")
LIMITS = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 5e-4}
# Channels and inner lengths that no tile divides, and inner lengths that are split.
WEIGHTS = [(24, 40), (3, 7), (35, None)]
SPLIT = {torch.float64: 260, torch.float32: 520, torch.float16: 1030, torch.bfloat16: 1030}
ROWS = (1, 3, 16, 17, 64, 65, 130)
# The dense weights of a model of 30 billion parameters.
REAL = {
    "in_proj": (10304, 2688),
    "out_proj": (2688, 4096),
    "qkv": (4608, 2688),
    "o_proj": (2688, 4096),
    "head": (131072, 2688),
}


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that a read of an element that no kernel wrote shows."""
    allocate = torch.empty

    def filled(*args: object, **kwargs: object) -> Tensor:
        new: Tensor = allocate(*args, **kwargs)  # type: ignore[call-overload]
        return new.fill_(NAN)

    monkeypatch.setattr(torch, "empty", filled)


@pytest.fixture
def _sums_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the interpreter, where there is one, sum each element of a product in one order, as a
    tensor core does: the order of numpy's depends on an element's place in the tile."""
    if torch.cuda.is_available():
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def in_order(_: Any, a: Any, b: Any, d: Any, *__: object) -> Any:
        kind = d.data.dtype
        total = d.data.copy()
        for k in range(a.data.shape[1]):
            total += a.data[:, k, None].astype(kind) * b.data[None, k].astype(kind)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", in_order)


def operands(
    rows: int, outputs: int, inner: int | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight and bias; an inner length of None is one that is split."""
    inner = inner or SPLIT[dtype]
    x, weight = normal(rows, inner), normal(outputs, inner, seed=1, scale=inner**-0.5)
    parts = x, weight, normal(outputs, seed=2)
    return tuple(part.to(DEVICE, dtype) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("outputs", "inner"), WEIGHTS)
@pytest.mark.parametrize("steady", [False, True])
def test_against_fp64(outputs: int, inner: int | None, dtype: torch.dtype, steady: bool) -> None:
    for rows in (1, 3, 17, 65):
        x, weight, bias = operands(rows, outputs, inner, dtype)
        want = x.double() @ weight.double().T
        if steady:
            with deterministic():
                got, with_bias = linear(x, weight), linear(x, weight, bias)
        else:
            got, with_bias = linear(x, weight), linear(x, weight, bias)
        assert got.dtype == dtype
        assert_relative_rms(got, want, LIMITS[dtype])
        assert_relative_rms(with_bias, want + bias.double(), LIMITS[dtype])


@pytest.mark.parametrize("tokens", [16, 64, 300])
def test_every_tile(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the tiles that 16-bit numbers have, with a part of the inner dimension and whole."""
    shape = shape_of(tokens, 2688, 4096, torch.float16, False)
    monkeypatch.setattr(linear_triton, "shape_of", lambda *_: shape)
    x, weight, bias = operands(2 * shape.rows + 1, shape.channels + 5, 1100, torch.float16)
    assert_relative_rms(linear(x, weight, bias), x.double() @ weight.double().T + bias, 5e-4)


@pytest.mark.usefixtures("products_of_bf16")
def test_bf16_is_summed_in_fp32_and_rounded_once() -> None:
    x, weight, bias = operands(17, 24, None, torch.bfloat16)
    want = x.double() @ weight.double().T + bias.double()
    # Rounding parts or sums to bf16 would be off by more; the interpreter rounds toward zero.
    assert_relative_rms(linear(x, weight, bias), want, 4e-3)


@pytest.mark.usefixtures("_sums_in_order")
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize(("inner", "sizes"), [(40, ROWS), (None, (1, 17))])
def test_a_row_keeps_its_bits_in_any_batch(
    inner: int | None, sizes: tuple[int, ...], dtype: torch.dtype
) -> None:
    x, weight, bias = operands(max(sizes), 24, inner, dtype)
    split = shape_of(1, *weight.shape, dtype, True).split
    assert (split > 1) == (inner is None)
    with deterministic():
        assert_rows_are_independent(lambda rows: linear(rows, weight, bias), x, sizes)


@pytest.mark.parametrize("dtype", [*LIMITS, torch.bfloat16])
@pytest.mark.parametrize("weight", [*REAL.values(), (24, 40), (70, 2088)])
def test_the_steady_shape_does_not_see_the_number_of_rows(
    weight: tuple[int, int], dtype: torch.dtype
) -> None:
    shapes = {shape_of(tokens, *weight, dtype, True) for tokens in range(1, 5000, 7)}
    assert len(shapes) == 1


def test_narrow_weights_are_split_and_others_are_not() -> None:
    for steady in (True, False):
        splits = {
            name: shape_of(1, *weight, torch.bfloat16, steady).split
            for name, weight in REAL.items()
        }
        assert splits == {"in_proj": 1, "out_proj": 4, "qkv": 1, "o_proj": 4, "head": 1}
    # Tiles of 1024 rows fill a GPU by themselves.
    assert shape_of(1024, *REAL["out_proj"], torch.bfloat16, False).split == 1


def test_few_rows_take_a_narrow_tile_unless_bits_count() -> None:
    def rows_of(tokens: int, steady: bool) -> int:
        return shape_of(tokens, *REAL["out_proj"], torch.bfloat16, steady).rows

    rows = {steady: [rows_of(one, steady) for one in (1, 16, 17)] for steady in (False, True)}
    assert rows == {False: [16, 16, 64], True: [64, 64, 64]}


@pytest.mark.parametrize("inner", [40, None])
def test_it_writes_where_it_is_told(inner: int | None) -> None:
    x, weight, bias = operands(5, 24, inner, torch.float32)
    wide = torch.full((9, 40), NAN, device=DEVICE)
    out = wide[2:7, 8:32]
    assert linear(x, weight, bias, out) is out
    assert_same_bits(out, linear(x, weight, bias))
    out.fill_(NAN)
    assert bool(wide.isnan().all())


def test_views_with_nan_around_them() -> None:
    x, weight, bias = operands(5, 24, 40, torch.float32)
    wide_x = torch.full((7, 50), NAN, device=DEVICE)
    wide_weight = torch.full((30, 60), NAN, device=DEVICE)
    own_x, own_weight = wide_x[1:6, 3:43], wide_weight[2:26, 5:45]
    own_x.copy_(x)
    own_weight.copy_(weight)
    assert_same_bits(linear(own_x, own_weight, bias), linear(x, weight, bias))


def test_nan_stays_in_its_row() -> None:
    x, weight, _ = operands(20, 24, None, torch.float32)
    x[6, 3] = NAN
    got = linear(x, weight)
    assert bool(got[6].isnan().all())
    assert bool(got[torch.arange(20) != 6].isfinite().all())


def test_no_rows_and_other_dtypes() -> None:
    x, weight, bias = operands(2, 24, 40, torch.float32)
    assert linear(x[:0], weight, bias).shape == (0, 24)
    with pytest.raises(ValueError, match=r"got torch.float32, torch.float64, expected one dtype"):
        linear(x, weight.double())


def test_the_mlp_is_two_products() -> None:
    x, up, up_bias = operands(5, 24, 40, torch.float64)
    down, down_bias = (part.double().to(DEVICE) for part in (normal(40, 24), normal(40, seed=3)))
    want = (x @ up.T + up_bias).clamp_min(0).square() @ down.T + down_bias
    assert_relative_rms(mlp(x, up, down, up_bias, down_bias), want, 1e-14)


def test_the_library_multiplies_unless_a_table_or_the_mode_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counted(x: Tensor, *_: object) -> Tensor:
        asked.append(len(x))
        return x

    monkeypatch.setattr(dispatch.linear, "triton", counted)
    x, weight, _ = operands(12, 24, 40, torch.float32)
    with dispatch.force("triton"):
        dispatch.linear(x, weight)
        choices = [{"up_to": 8}, {"up_to": 11, "own": True}, {"own": False}]
        with using(LaunchTable("", {entry_name(24, 40): choices})):
            for rows in (8, 9, 12):
                dispatch.linear(x[:rows], weight)
            with deterministic():
                dispatch.linear(x[:4], weight)
    with deterministic():
        dispatch.linear(x[:5].cpu(), weight.cpu())
    assert asked == [9, 4]


def launch(name: str, tokens: int, steady: bool) -> Launch:
    outputs, inner = REAL[name]
    shape = shape_of(tokens, outputs, inner, torch.bfloat16, steady)
    steps = -(-inner // shape.inner // shape.split)
    return Launch(
        "twotower.kernels.linear_triton:_linear_kernel",
        {
            **dict.fromkeys(("x", "weight", "bias"), "*bf16"),
            "target": "*bf16" if shape.split == 1 else "*fp32",
            "tokens": "i32",
            **dict.fromkeys(("outputs", "x_stride", "weight_stride", "target_stride"), "i32:16"),
        },
        {
            "length": inner,
            "span": steps * shape.inner,
            "split": shape.split,
            "has_bias": False,
            "wide": False,
            "tile_rows": shape.rows,
            "tile_channels": shape.channels,
            "tile_inner": shape.inner,
        },
        shape.num_warps,
        shape.num_stages,
    )


# As the router would take it: fp64 weights and tokens.
WIDE = Launch(
    "twotower.kernels.linear_triton:_linear_kernel",
    {
        **dict.fromkeys(("x", "weight", "bias", "target"), "*fp64"),
        "tokens": "i32",
        **dict.fromkeys(("outputs", "x_stride", "weight_stride", "target_stride"), "i32:16"),
    },
    {
        "length": 2688,
        "span": 2688 // 4,
        "split": 4,
        "has_bias": False,
        "wide": True,
        "tile_rows": 16,
        "tile_channels": 32,
        "tile_inner": 16,
    },
    num_warps=4,
    num_stages=2,
)
ADD = Launch(
    "twotower.kernels.linear_triton:_add_kernel",
    {
        "parts": "*fp32",
        **dict.fromkeys(("bias", "out"), "*bf16"),
        "tokens": "i32",
        **dict.fromkeys(("outputs", "out_stride"), "i32:16"),
    },
    {"split": 4, "has_bias": False, "block": 1024},
)
COMPILED = [("out_proj", 1, False), ("in_proj", 1024, False), ("in_proj", 1, True)]
SHARED_BYTES_OF_AN_SM = 227 * 1024


def test_it_compiles_for_hopper() -> None:
    """Without spills, in tensor core instructions, both operands copied past the registers; two
    programs of the steady shape find room on a multiprocessor."""
    launches = [launch(*one) for one in COMPILED]
    *products, steady, wide, add = compile_all([*launches, launch("out_proj", 1, True), WIDE, ADD])
    assert add.spills == wide.spills == 0
    assert wide.instructions["DMMA"] > 0
    for asked, compiled in zip(COMPILED, (*products, steady), strict=False):
        assert compiled.spills == 0, asked
        assert compiled.instructions["HGMMA"] > 0, asked
        assert compiled.instructions["HMMA"] == 0, asked
        assert compiled.instructions["LDGSTS"] > 0, asked
    for compiled in (products[2], steady):
        assert 2 * (compiled.shared_bytes + 1024) <= SHARED_BYTES_OF_AN_SM


@pytest.mark.gpu
@pytest.mark.parametrize("name", REAL)
def test_real_shapes(name: str) -> None:
    """Every number of rows gives a row the same bits, two runs agree, and the sums are right."""
    outputs, inner = REAL[name]
    generator = torch.Generator(DEVICE).manual_seed(1)
    x = torch.randn(1024, inner, generator=generator, device=DEVICE).bfloat16()
    weight = torch.randn(outputs, inner, generator=generator, device=DEVICE) * inner**-0.5
    weight = weight.bfloat16()
    assert_relative_rms(linear(x, weight), x.float() @ weight.float().T, 5e-3)
    with deterministic():
        whole = linear(x, weight)
        assert_same_bits(linear(x, weight), whole, "a second run")
        for rows in (1, 2, 16, 17, 64, 65, 256, 1000):
            assert_same_bits(linear(x[:rows], weight), whole[:rows], f"{rows} rows")
            assert_same_bits(linear(x[-rows:], weight), whole[-rows:], f"the last {rows} rows")

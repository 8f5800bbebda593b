"""Floors of the released model's passes, against figures derived apart from this code."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from twotower.bench.random_towers import TowerMaker
from twotower.planner.floors import (
    Ceilings,
    PassKind,
    expected_unique,
    floor_seconds,
    num_bytes,
    pass_works,
    shape_of,
)
from twotower.planner.shapes import LARGE, TINY

H200 = Ceilings(4.3e12, 790e12, 60e12)
# Draws a row that give 34 experts for one block, as measured in real text; uniform are 16.
TEXT, UNIFORM = 6.5, 16.0
CLOSE = 0.02


def floor_ms(kind: PassKind, rows: int, context: int = 4096, **more: float) -> float:
    draws = more.pop("draws", TEXT if kind == "denoise" else 1.0 if kind == "ar" else UNIFORM)
    shape = shape_of(
        kind,
        LARGE,
        rows,
        context,
        16,
        unique=expected_unique(LARGE, draws * rows),
        masked=more.get("masked", 1.0),
        expert_bytes=int(more.get("expert_bytes", 2)),
        fp8_products=bool(more.get("fp8_products", False)),
    )
    return 1e3 * floor_seconds(pass_works(LARGE, shape), H200)


@pytest.mark.parametrize(
    ("kind", "by_rows"),
    [
        ("denoise", {1: 4.56, 16: 15.4, 64: 20.8, 128: 28.0}),
        ("ar", {1: 1.53, 16: 8.67, 64: 15.8, 128: 18.4}),
        ("extend", {1: 8.07, 16: 15.4, 64: 20.7, 128: 27.7}),
    ],
)
def test_a_pass_at_four_thousand_tokens(kind: PassKind, by_rows: dict[int, float]) -> None:
    for rows, expected in by_rows.items():
        assert floor_ms(kind, rows) == pytest.approx(expected, rel=CLOSE), rows


@pytest.mark.parametrize(
    ("kind", "by_rows"),
    [
        ("denoise", {1: 4.62, 16: 16.3, 64: 24.5, 128: 35.3}),
        ("ar", {1: 1.57, 16: 9.32, 64: 18.4, 128: 23.6}),
        ("extend", {1: 8.13, 16: 16.3, 64: 24.3, 128: 35.0}),
    ],
)
def test_a_pass_at_thirty_two_thousand_tokens(kind: PassKind, by_rows: dict[int, float]) -> None:
    for rows, expected in by_rows.items():
        assert floor_ms(kind, rows, 32768) == pytest.approx(expected, rel=CLOSE), rows


def test_uniform_routing_reads_twice_the_experts_of_text() -> None:
    assert floor_ms("denoise", 1, draws=UNIFORM) == pytest.approx(8.22, rel=CLOSE)
    for draws, unique in ((TEXT, 34), (UNIFORM, 69), (2 * TEXT, 59), (16 * TEXT, 127)):
        assert expected_unique(LARGE, draws) == pytest.approx(unique, abs=0.6)


def test_eight_bit_experts() -> None:
    assert floor_ms("denoise", 1, expert_bytes=1) == pytest.approx(2.73, rel=CLOSE)
    assert floor_ms("ar", 1, expert_bytes=1) == pytest.approx(1.21, rel=CLOSE)
    assert floor_ms("denoise", 64, expert_bytes=1) == pytest.approx(14.0, rel=CLOSE)


def test_products_of_eight_bit_experts_run_at_twice_the_rate() -> None:
    """Bytes bind at 64 rows and fewer; at 512 rows the products of routed experts do."""
    for rows in (1, 64):
        narrow = floor_ms("denoise", rows, expert_bytes=1, fp8_products=True)
        assert narrow == pytest.approx(floor_ms("denoise", rows, expert_bytes=1), rel=0.01)
    wide = floor_ms("denoise", 512, expert_bytes=1)
    # 23 layers, up and down, 8192 tokens of 6 experts each.
    products = 1e3 * 23 * 2 * 2 * 8192 * 6 * 1856 * 2688 / 790e12
    saved = wide - floor_ms("denoise", 512, expert_bytes=1, fp8_products=True)
    assert saved == pytest.approx(products / 2, rel=CLOSE)


def test_a_measured_rate_of_eight_bit_products_takes_the_place_of_the_assumed_one() -> None:
    assert H200.narrow_flops == 2 * 790e12
    measured = dataclasses.replace(H200, fp8_flops=1.1e15)
    assert measured.narrow_flops == 1.1e15
    shape = shape_of("denoise", LARGE, 512, 4096, 16, expert_bytes=1, fp8_products=True)
    works = [own for own in pass_works(LARGE, shape) if own.name.startswith("experts")]
    ratio = floor_seconds(works, measured) / floor_seconds(works, H200)
    assert ratio == pytest.approx(1580 / 1100, rel=0.01)


@pytest.mark.parametrize(
    ("name", "launches", "megabytes", "microseconds"),
    [
        ("norm", 52, 5.5, 1.3),
        ("in_proj", 23, 62, 18.0),
        ("scan", 23, 42, 9.7),
        ("out_proj", 23, 25, 7.1),
        ("router", 23, 2.1, 2.9),
        ("experts_up", 23, 1276, 297),
        ("experts_down", 23, 1282, 298),
        ("shared_up", 23, 23, 6.5),
        ("shared_down", 23, 23, 6.5),
        ("qkv", 6, 29, 8.0),
        ("attention", 6, 71, 21.8),
        ("o_proj", 6, 25, 7.1),
        ("head", 1, 706, 228),
    ],
)
def test_each_operator_of_a_denoiser_pass_over_sixteen_rows(
    name: str, launches: int, megabytes: float, microseconds: float
) -> None:
    unique = expected_unique(LARGE, 16 * TEXT)
    works = {
        own.name: own
        for own in pass_works(LARGE, shape_of("denoise", LARGE, 16, 4096, 16, unique=unique))
    }
    own = works[name]
    assert own.launches == launches
    assert own.num_bytes / 1e6 == pytest.approx(megabytes, rel=0.03)
    assert 1e6 * own.seconds(H200) / launches == pytest.approx(microseconds, rel=0.03)


def test_the_head_costs_less_where_positions_are_committed() -> None:
    # 0.4 of 913 us at 64 rows.
    saved = floor_ms("denoise", 64) - floor_ms("denoise", 64, masked=0.6)
    assert saved == pytest.approx(0.365, rel=CLOSE)


def test_a_pass_reads_every_weight_of_a_tower_once() -> None:
    """All experts chosen: without its activations a pass moves what the tower holds, but for the
    embedding, of which it reads a line, and vectors."""
    maker = TowerMaker(TINY, torch.device("cpu"), torch.float32, torch.Generator())
    weights = maker.context().weights
    shape = shape_of("ar", TINY, 1, 0, 16, unique=TINY.n_routed_experts, value_bytes=4)
    shape = dataclasses.replace(shape, rows=0, head_tokens=1e-9, expert_bytes=4)
    matrices = sum(matrix_bytes(layer.mixer) for layer in weights.layers) + weights.head.nbytes
    assert num_bytes(pass_works(TINY, shape)) == pytest.approx(matrices, rel=1e-6)


def matrix_bytes(part: object) -> int:
    """Bytes of all fp32 matrices, a router's counted as fp32."""
    if isinstance(part, Tensor):
        wide = part.dim() > 1 and part.shape[-1] > TINY.conv_kernel
        return part.numel() * torch.float32.itemsize if wide else 0
    if dataclasses.is_dataclass(part):
        return sum(matrix_bytes(getattr(part, own.name)) for own in dataclasses.fields(part))
    return 0

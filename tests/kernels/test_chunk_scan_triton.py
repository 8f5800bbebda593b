"""Scans of long rows by chunks side by side, against the recurrence in fp64 and the walk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.test_mamba_scan_triton import LIMITS, Case, make
from tests.support.comparing import assert_relative_rms, assert_same_bits
from tests.support.hopper import Launch, compile_all
from tests.support.mamba_layer import (
    DEVICE,
    NEMOTRON,
    SLACK,
    TINY,
    Shape,
    fill_new_memory,
    rows_of,
    steps_of_all_sizes,
)
from twotower.kernels import chunk_scan_triton as module
from twotower.kernels import mamba_scan_triton, mamba_triton
from twotower.kernels.launch_table import LaunchTable, using
from twotower.kernels.mamba_scan_triton import LONGEST_BLOCK

CHUNK = module.TILE.tokens


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    fill_new_memory(monkeypatch)


def walking() -> AbstractContextManager[None]:
    """Inside, long rows are walked from chunk to chunk."""
    return using(LaunchTable("none", {"scan_piece": [{"least_tokens": 1 << 20}]}))


def parts(case: Case, together: Tensor) -> list[tuple[Case, Tensor]]:
    """Each row alone, and what it got in the batch."""
    alone, start = [], 0
    for length, slot in zip(case.lengths, case.slots, strict=True):
        own = slice(start, start + length)
        start += length
        row = replace(case, projected=case.projected[own], lengths=(length,), slots=(slot,))
        alone.append((row, together[own]))
    return alone


@pytest.mark.parametrize("scale", [1.0, 1e3])
@pytest.mark.parametrize("length", [65, 127, 128, 129, 200, 300])
def test_values(length: int, scale: float) -> None:
    make((length,), scale=scale).check()


@pytest.mark.parametrize(
    ("lengths", "slots"),
    [
        ((3, 130, 64, 1, 200), (4, 0, 2, 1, 3)),
        ((129, 70, 0, 65), (1, -1, -1, 0)),
        ((1,) * 20 + (65,), (*range(21),)),
    ],
)
def test_packed_rows(lengths: tuple[int, ...], slots: tuple[int, ...]) -> None:
    """Chunks begin where rows begin, and padding is neither computed nor written."""
    make(lengths, slots).check()


@pytest.mark.parametrize("shape", [Shape(4, 33, 20, 2), Shape(3, 3, 2, 3, 2)])
def test_shapes(shape: Shape) -> None:
    make((66, 9), shape=shape).check()


def test_fp16() -> None:
    make((70,), dtype=torch.float16, scale=1e5).check()


def test_steps_of_all_sizes_lose_nothing_between_distant_tokens() -> None:
    """Closer to the truth than the walk, though its chunks are half as long: a difference of long
    sums has lost the digits of a small step behind large ones."""
    steps = steps_of_all_sizes(260, TINY.heads)
    make((130, 130), steps=steps).check(2e-7)


@pytest.mark.parametrize("step", [1e-4, 50.0])
def test_steps_of_one_size(step: float) -> None:
    make((150,), steps=torch.full((150, TINY.heads), step).double()).check(5e-7)


@pytest.mark.parametrize("lengths", [(200, 300, 65), (70, 5, 130, 64, 66), (300, 1, 1, 128)])
def test_a_row_has_the_same_bits_whatever_else_is_packed(lengths: Sequence[int]) -> None:
    case = make(lengths)
    for alone, together in parts(case, case.run()):
        if alone.lengths[0] > CHUNK:
            assert_same_bits(together, alone.run(), f"{alone.lengths} in {lengths}")


def test_heads_take_turns_where_the_scratch_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((130, 70), shape=Shape(5, 4, 8, 1))
    want, sizes = case.run(), []
    scan = module._scan_heads

    def counted(*args: Any) -> None:
        sizes.append((args[-2], args[-1], args[-4].nbytes))
        scan(*args)

    monkeypatch.setattr(module, "_scan_heads", counted)
    # Three chunks of tokens and one more for each row, 128 bytes a chunk and head.
    monkeypatch.setattr(module, "SCAN_SCRATCH_BYTES", 2 * 5 * 128)
    assert_same_bits(case.run(), want)
    assert sizes == [(0, 2, 1280), (2, 2, 1280), (4, 1, 1280)]


def test_every_chunk_of_a_pass_has_a_number_of_its_own() -> None:
    """Also where rows are empty, full to a token, or one above."""
    lengths = (0, 1, 64, 65, 0, 63, 64, 64, 129, 1, 1, 62, 128, 0)
    numbers, start = [], 0
    for row, length in enumerate(lengths):
        numbers += [start // CHUNK + row + chunk for chunk in range(-(-length // CHUNK))]
        start += length
    assert len({*numbers}) == len(numbers)
    assert max(numbers) < start // CHUNK + len(lengths)


def test_pieces_of_prompts_are_scanned_side_by_side_and_blocks_are_not() -> None:
    """Whatever the number of rows: it must not decide a row's bits."""
    for count in (1, 2, 64):
        assert module.tile_for(rows_of((1024,) * count, range(count))) == module.TILE
        assert module.tile_for(rows_of((LONGEST_BLOCK,) * count, range(count))) is None
    for longest, asked in ((LONGEST_BLOCK, False), (LONGEST_BLOCK + 1, True)):
        case = make((longest, 3), shape=Shape(1, 4, 4, 1))
        got = case.run()
        with walking():
            assert torch.equal(got, case.run()) is not asked


def test_a_cards_table_chooses_tiles_by_the_longest_row() -> None:
    entries = [{"up_to": 100, "least_tokens": 101}, {"tokens": 32, "state_channels": 16}]
    with using(LaunchTable("card", {"scan_piece": entries})):
        assert module.tile_for(rows_of((100,), (0,))) is None
        tile = module.tile_for(rows_of((101,), (0,)))
        assert tile == replace(module.TILE, tokens=32, state_channels=16)
        make((130, 40)).check()


@pytest.mark.usefixtures("products_of_bf16")
def test_products_beside_bf16_are_as_exact_as_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers after the conv, once stored as bf16 and once as fp32."""
    case, prepare = make((130, 66)), mamba_triton.prepare
    results = []
    for dtype in (torch.bfloat16, torch.float32):

        def rounded(*args: Any, dtype: torch.dtype = dtype) -> tuple[Tensor, Tensor]:
            conv, steps = prepare(*args)
            return conv.bfloat16().to(dtype), steps

        monkeypatch.setattr(mamba_scan_triton, "prepare", rounded)
        results.append(case.run())
    assert_relative_rms(results[0], results[1], SLACK * 1e-6)


@pytest.mark.parametrize("lengths", [(65, 1), (140, 66)])
def test_it_agrees_with_the_walk(lengths: tuple[int, ...]) -> None:
    case = make(lengths)
    got = case.run()
    with walking():
        walked = case.run()
    case.check(got=walked)
    assert_relative_rms(got, walked, SLACK * LIMITS[torch.float32])


STATE = {
    "ssm_state": "*fp32",
    **dict.fromkeys(["ssm_state_stride_s", "ssm_state_stride_h", "ssm_state_stride_p"], "i32:16"),
}
COMMON = {
    **dict.fromkeys(["states", "totals"], "*fp32"),
    **dict.fromkeys(["cu_seqlens", "slots"], "*i32:1"),
    "first_head": "i32:1",
    "scratch_heads": "i32:16",
}
INPUTS = {
    "conv": "*bf16",
    **dict.fromkeys(["steps", "a_log"], "*fp32"),
    **dict.fromkeys(["heads", "shared_channels"], "i32:16"),
    "per_group": "i32",
    "row_count": "i32:1",
}
SIZES = {"head_dim": NEMOTRON.width, "state_dim": NEMOTRON.n, "block_l": CHUNK}
WIDE = {**SIZES, "block_n": NEMOTRON.n, "block_r": module._FEWEST_ROWS}
NAMED = "twotower.kernels.chunk_scan_triton:"
OUTPUTS = {**COMMON, **INPUTS, **STATE, "d": "*fp32", "y": "*fp32"}
LAUNCHES = [
    Launch(
        NAMED + "_states_kernel",
        {**COMMON, **INPUTS},
        {**WIDE, "block_p": module.TILE.state_channels},
        module.TILE.state_warps,
    ),
    Launch(
        NAMED + "_passing_kernel",
        {**COMMON, **STATE},
        {**SIZES, "block": module.TILE.passed},
        module.TILE.passing_warps,
    ),
    Launch(
        NAMED + "_outputs_kernel",
        {name: kind for name, kind in OUTPUTS.items() if name != "totals"},
        {**WIDE, "block_p": module.TILE.output_channels},
        module.TILE.output_warps,
    ),
]


def test_kernels_compile_for_a_gpu() -> None:
    states, passing, outputs = compile_all(LAUNCHES)
    for compiled in (states, passing, outputs):
        assert compiled.spills == 0
    assert max(states.registers, outputs.registers) <= 168, "three programs fit side by side"
    assert passing.registers <= 64
    # Tiles are wide enough for the tensor cores' products of whole warp groups.
    assert states.instructions["HGMMA"] > 0
    assert outputs.instructions["HGMMA"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [(300,), (1024,), (1024, 700, 3)])
def test_a_layer_of_the_large_model(lengths: tuple[int, ...]) -> None:
    case = make(lengths, shape=NEMOTRON, dtype=torch.bfloat16)
    first = case.run()
    case.check(got=first)
    assert_same_bits(case.run(), first)
    for alone, together in parts(case, first):
        if alone.lengths[0] >= module.TILE.least_tokens:
            assert_same_bits(together, alone.run(), f"{alone.lengths}")
    assert DEVICE.type == "cuda"

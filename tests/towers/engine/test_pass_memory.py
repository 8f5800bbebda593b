"""What passes take on a GPU, in hand figures of the released shapes, and that it is reserved."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.support.random_model import small_config
from twotower.planner.shapes import LARGE
from twotower.towers.engine.pass_memory import layer_bytes, log_bytes, partial_bytes, working_bytes
from twotower.towers.state import budget as memory
from twotower.towers.state.budget import affordable_pages
from twotower.towers.state.pool import StatePool

BF16 = torch.bfloat16


def test_logs_are_the_raw_projections_of_the_mamba_layers() -> None:
    assert log_bytes(LARGE, BF16, 16) == 23 * (6144 + 64) * 16 * 2
    assert log_bytes(replace(LARGE, layer_pattern="E*"), BF16, 16) == 0


def test_experts_are_the_widest_layer() -> None:
    """Eight slots a token, up and down, and the router's fp64, beside four of the residual's."""
    per_token = 8 * (1856 + 2688) * 2 + 8 * (2688 + 128) + 4 * 2688 * 2
    assert layer_bytes(LARGE, BF16, 1024) == 1024 * per_token
    # In 8 bits beside them the tokens and what six experts have inside.
    in_8_bits = layer_bytes(replace(LARGE, quantized_experts=True), BF16, 1024)
    assert in_8_bits == 1024 * (per_token + 6 * 1856 + 2688)
    narrow = layer_bytes(replace(LARGE, layer_pattern="M"), BF16, 1)
    assert narrow == (10304 + 6144 + 4096) * 2 + 4096 * 4 + 64 * 4 + 4 * 2688 * 2


def test_splits_of_128_blocks_take_half_a_gigabyte() -> None:
    assert partial_bytes(LARGE, 128, 16) == 16 * 128 * 16 * 32 * 130 * 4
    assert partial_bytes(LARGE, 128, 1024) == partial_bytes(LARGE, 128, 64)
    assert partial_bytes(replace(LARGE, layer_pattern="ME"), 128, 16) == 0


def test_what_a_pair_reserves_for_the_released_model() -> None:
    """Several gigabytes a tower, more than was left of an H200 when states took nine tenths of what
    was free; 64 rows of 8 K still have room beside both towers and what their passes take."""
    context = working_bytes(LARGE, BF16, 5120, 64, reads_prompts=True)
    denoiser = working_bytes(LARGE, BF16, 4096, 64, reads_prompts=False)
    assert 7.0e9 < context < 10.0e9
    assert 4.0e9 < denoiser < 6.0e9
    parts = log_bytes(LARGE, BF16, 5120) + layer_bytes(LARGE, BF16, 5120)
    assert context > parts + partial_bytes(LARGE, 64, 64) + 4096 * 131072 * 2
    # What a card had free beside both towers in bf16.
    left = int(0.95 * (22.75e9 - context - denoiser))
    assert affordable_pages(LARGE, 64, 8192, left, BF16) == 64 * 8192 // 64


def test_reserved_memory_is_not_given_to_states(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(StatePool, "__init__", lambda _, *own: made.append((own[1], own[2])))
    monkeypatch.setattr(memory, "free_bytes", lambda _: 24_000_000_000)
    cuda = torch.device("cuda")
    asked = {"max_num_seqs": 64, "max_context": None, "memory_fraction": 0.95}
    memory.pool_for(LARGE, cuda, BF16, **asked)
    memory.pool_for(LARGE, cuda, BF16, **asked, reserved=8_000_000_000)
    page = 64 * 6144
    assert made[0][1] - made[1][1] == pytest.approx(0.95 * 8e9 / page, abs=1)
    with pytest.raises(Exception, match="memory: got 0 bytes for states"):
        memory.pool_for(small_config(), cuda, BF16, **asked, reserved=30_000_000_000)

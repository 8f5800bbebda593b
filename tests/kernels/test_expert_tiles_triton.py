"""Sorting by expert on the device against sorting in Python."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.hopper import Launch, compile_all
from twotower.kernels.expert_tiles_triton import sort_by_expert

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def true_tiles(ids: Tensor, experts: int, rows: int) -> tuple[list[int], list[list[int]]]:
    """Sorted pairs and (expert, first, rows) of every tile."""
    flat = ids.flatten().tolist()
    pairs: list[int] = []
    tiles: list[list[int]] = []
    for expert in range(experts):
        own = [pair for pair, chosen in enumerate(flat) if chosen == expert]
        for start in range(0, len(own), rows):
            tiles.append([expert, len(pairs) + start, len(own[start : start + rows])])
        pairs += own
    return pairs, tiles


def assert_sorted(ids: Tensor, experts: int, rows: int) -> None:
    pairs, table = true_tiles(ids, experts, rows)
    got = sort_by_expert(ids.to(DEVICE), experts, rows)
    assert got.pairs[: len(pairs)].tolist() == pairs
    assert int(got.table[0]) == len(table)
    assert got.table[1 : 1 + 3 * len(table)].view(-1, 3).tolist() == table
    assert len(table) <= got.most
    assert got.table.shape == (1 + 3 * got.most,)


def random_ids(tokens: int, top_k: int, experts: int, lowest: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(tokens * 100 + top_k)
    return torch.randint(lowest, experts, (tokens, top_k), generator=generator)


@pytest.mark.parametrize("rows", [16, 32])
@pytest.mark.parametrize(("tokens", "top_k"), [(1, 1), (1, 3), (2, 6), (17, 3), (40, 6), (300, 4)])
@pytest.mark.parametrize("lowest", [0, -1])
def test_pairs_and_tiles(tokens: int, top_k: int, rows: int, lowest: int) -> None:
    assert_sorted(random_ids(tokens, top_k, 5, lowest), 5, rows)


def test_a_number_of_experts_that_is_no_power_of_two() -> None:
    assert_sorted(random_ids(9, 3, 12), 12, 16)
    assert_sorted(random_ids(9, 3, 33), 33, 16)


@pytest.mark.parametrize("expert", [-1, 0, 2, 4])
def test_all_pairs_to_one_expert_or_none(expert: int) -> None:
    assert_sorted(torch.full((700, 2), expert), 5, 16)


def test_the_most_tiles_that_can_be() -> None:
    """One pair for all experts but one, whose last tile begins with its last pair."""
    ids = torch.tensor([0, 1, 2, 3] + [4] * 33)[:, None]
    got = sort_by_expert(ids.to(DEVICE), 5, 16)
    assert int(got.table[0]) == got.most == 7


def test_ids_may_be_columns_of_a_wider_tensor() -> None:
    wide = random_ids(20, 7, 5)
    assert_sorted(wide[:, :3], 5, 16)


SIZES = {"experts": 128, "expert_lanes": 128, "block_pairs": 64 * 6}
LAUNCHES = [
    Launch(
        "twotower.kernels.expert_tiles_triton:_count_kernel",
        {"ids": "*i64", "counts": "*i32", "count": "i32"},
        {**SIZES, "pair_lanes": 512},
    ),
    Launch(
        "twotower.kernels.expert_tiles_triton:_place_kernel",
        {
            "ids": "*i64",
            **dict.fromkeys(["counts", "pairs", "table"], "*i32"),
            **dict.fromkeys(["count", "blocks"], "i32"),
        },
        {**SIZES, "tile_rows": 128, "at_once": 64, "block_lanes": 16},
    ),
]


def test_it_compiles_for_hopper_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch

"""Sizes of passes that run as CUDA graphs, and works cut into such passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

# Numbers of rows that have graphs: a pass of another number is padded to the next.
ROW_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128)
# Tokens of a pass that is a graph, 128 rows of 16: larger passes are bound by their arithmetic, and
# run part by part.
GRAPH_TOKENS = 2048
# Tokens of the longest block that has graphs.
MAX_LENGTH = 64
# Numbers of rows of packed passes that have graphs. Empty rows cost next to nothing.
PACKED_ROWS = (1, 4, 16, 32, 64, ROW_BUCKETS[-1])

Work = TypeVar("Work")
Result = TypeVar("Result")


def bucket_for(rows: int) -> int:
    """The smallest bucket that holds so many rows. Raises ValueError above the largest."""
    for bucket in ROW_BUCKETS:
        if rows <= bucket:
            return bucket
    raise ValueError(f"rows: got {rows}, expected at most {ROW_BUCKETS[-1]}")


def packed_bucket_for(rows: int) -> int:
    """The smallest bucket of a packed pass that holds so many rows, ROW_BUCKETS[-1] at most."""
    return next(bucket for bucket in PACKED_ROWS if bucket >= min(rows, PACKED_ROWS[-1]))


def rows_at_once(length: int) -> int:
    """The most rows of blocks of `length` tokens in one graph."""
    fitting = [bucket for bucket in ROW_BUCKETS if bucket * length <= GRAPH_TOKENS]
    return fitting[-1] if fitting else ROW_BUCKETS[0]


def buckets_up_to(rows: int, length: int = 1) -> list[int]:
    """The buckets that passes of up to `rows` rows need, none for blocks above MAX_LENGTH. The
    largest comes first: the others' graphs then fit into the memory that it takes."""
    if length > MAX_LENGTH:
        return []
    largest = bucket_for(min(rows, rows_at_once(length)))
    return [bucket for bucket in reversed(ROW_BUCKETS) if bucket <= largest]


def run_in_parts(
    works: Sequence[Work],
    shape_of: Callable[[Work], tuple[int, ...]],
    run: Callable[[Sequence[Work]], Sequence[Result]],
) -> list[Result]:
    """The results of all works, run in parts that a graph can take: works of one shape, whose first
    number is a row's tokens, and at most `rows_at_once` of them."""
    shapes = [shape_of(work) for work in works]
    results: dict[int, Result] = {}
    for shape in dict.fromkeys(shapes):
        same = [index for index, other in enumerate(shapes) if other == shape]
        for first in range(0, len(same), rows_at_once(shape[0])):
            part = same[first : first + rows_at_once(shape[0])]
            results |= zip(part, run([works[index] for index in part]), strict=True)
    return [results[index] for index in range(len(works))]

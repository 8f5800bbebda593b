"""What a pass over fixed buffers unpacks and packs, reference and kernel, against plain Python."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.hopper import Launch, compile_all
from twotower.kernels import pass_buffers as reference
from twotower.kernels import pass_buffers_triton as kernels

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
EITHER = pytest.mark.parametrize("module", [reference, kernels])


@EITHER
@pytest.mark.parametrize("length", [1, 5, 16])
@pytest.mark.parametrize("slots", [[0], [3, -1], [2, 0, -1, -1] * 20])
def test_rows_are_unpacked_behind_whatever_was_there(
    module: ModuleType, slots: list[int], length: int
) -> None:
    wide = torch.zeros(2, len(slots) * length + 3, dtype=torch.int64)
    wide[0, : len(slots)] = torch.tensor(slots)
    wide[1, : len(slots)] = 1000 + torch.arange(len(slots))
    sent, context = wide.to(DEVICE)
    own = torch.full((len(slots),), 77, dtype=torch.int32, device=DEVICE)
    lens = torch.full_like(own, 88)
    real = module.unpack_rows(sent, context, own, lens, length)
    assert own.tolist() == slots
    assert lens.tolist() == [1000 + row for row in range(len(slots))]
    assert real.dtype == torch.bool
    assert real.tolist() == [slot >= 0 for slot in slots for _ in range(length)]


@EITHER
@pytest.mark.parametrize("count", [1, 300])
def test_what_was_drawn_is_packed_exactly(module: ModuleType, count: int) -> None:
    ids = torch.arange(count) * 7919 + 2**33
    parts = torch.randn(2, count, generator=torch.Generator().manual_seed(count))
    parts[1, 0] = float("-inf")
    finite = torch.arange(count) % 3 != 1
    out = torch.full((4, count), -5.0, dtype=torch.float64, device=DEVICE)
    drawn = [own.to(DEVICE) for own in (ids, parts[0], parts[1], finite)]
    module.pack_drawn(drawn, out)
    assert out[0].tolist() == ids.tolist()
    assert out[1:3].tolist() == parts.tolist()
    assert out[3].tolist() == finite.double().tolist()


def true_counts(drawn: list[int], tokens: list[int], lengths: list[int]) -> list[int]:
    """Tokens of each row that are right, its first always."""
    counts, start = [], 0
    for length in lengths:
        right = 1 if length else 0
        while right and right < length and tokens[start + right] == drawn[start + right - 1]:
            right += 1
        counts.append(right)
        start += length
    return counts


@pytest.mark.parametrize("count_right", [reference.right_counts, kernels.right_counts])
@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    padding=st.integers(0, 9),
    seed=st.integers(0, 1000),
)
def test_right_tokens_are_counted_up_to_the_first_that_differs(
    count_right: Callable[..., torch.Tensor], lengths: list[int], padding: int, seed: int
) -> None:
    """Behind the rows is one of padding, whose tokens may look right."""
    total = sum(lengths) + padding
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 9, (total,), generator=generator)
    drawn = tokens.roll(-1)
    wrong = torch.rand(total, generator=generator) < 0.1
    drawn = torch.where(wrong, drawn + 1, drawn)
    starts = torch.tensor([0, *torch.tensor([*lengths, padding]).cumsum(0).tolist()])
    slots = torch.tensor([*range(len(lengths)), -1], dtype=torch.int32)
    args = (drawn, tokens, starts.int(), slots)
    got = count_right(*(own.to(DEVICE) for own in args)).tolist()
    assert got == [*true_counts(drawn.tolist(), tokens.tolist(), lengths), 0]


PATH = "twotower.kernels.pass_buffers_triton"
LAUNCHES = [
    Launch(
        f"{PATH}:_rows_kernel",
        {
            **dict.fromkeys(["sent", "context"], "*i64"),
            **dict.fromkeys(["slots", "context_lens"], "*i32"),
            "real": "*i1",
            **dict.fromkeys(["count", "length"], "i32"),
        },
        {"block": 256},
    ),
    Launch(
        f"{PATH}:_drawn_kernel",
        {
            "ids": "*i64",
            **dict.fromkeys(["confidences", "log_probs"], "*fp32"),
            "finite": "*i1",
            "out": "*fp64",
            "count": "i32",
        },
        {"block": 256},
    ),
    Launch(
        f"{PATH}:_right_kernel",
        {
            **dict.fromkeys(["drawn", "tokens"], "*i64"),
            **dict.fromkeys(["starts", "slots", "counts"], "*i32"),
        },
        {"block": 16},
        num_warps=1,
    ),
]


def test_they_compile_for_hopper_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch

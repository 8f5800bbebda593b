"""The norm kernels against fp64, and against the reference where bits count."""

from __future__ import annotations

from itertools import product

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
from twotower.kernels import norm
from twotower.kernels.moe import SlotOutputs
from twotower.kernels.norm import Modulation
from twotower.kernels.norm_triton import add_norm, gated_group_norm

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Whether there is a delta and a gate, and where the modulation stands.
DELTAS = [(False, False), (True, False), (True, True)]
MODULATIONS = [None, "first", "after"]
HALF = {torch.float16: 2e-3, torch.bfloat16: 2.0**-7}
NAN = float("nan")


@pytest.fixture(autouse=True)
def _nan_in_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new memory with NaN, so that an element that no kernel wrote shows."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def filled(*args: object, allocate: object = allocate, **kwargs: object) -> Tensor:
            return allocate(*args, **kwargs).fill_(NAN)  # type: ignore[operator]

        monkeypatch.setattr(torch, name, filled)


def true_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


def true_add_norm(
    hidden: Tensor,
    delta: Tensor | None,
    gate: Modulation | None,
    weight: Tensor,
    eps: float,
    modulation: Modulation | None,
    first: bool,
) -> tuple[Tensor, Tensor]:
    total = hidden.double()
    if delta is not None:
        weights = 1.0 if gate is None else gate.table[gate.index, 2].double()
        total = total + weights * delta.double()
    if modulation is None:
        return total, true_norm(total, weight, eps)
    shift, scale, _ = modulation.table[modulation.index].double().unbind(1)
    if first:
        return total, true_norm(total * (1 + scale) + shift, weight, eps)
    return total, true_norm(total, weight, eps) * (1 + scale) + shift


def inside(tensor: Tensor, pad: int = 3) -> Tensor:
    """The same numbers as a view with NaN on all sides of every row."""
    guarded = torch.full(
        (tensor.shape[0] + 2, *tensor.shape[1:-1], tensor.shape[-1] + 2 * pad), NAN
    )
    guarded = guarded.to(tensor.device, tensor.dtype)
    view = guarded[1:-1, ..., pad:-pad]
    view.copy_(tensor)
    return view


def modulation_of(tokens: int, width: int, seed: int, entries: int = 4) -> Modulation:
    """One layer of a table of several, [entries, layers, 3, width]."""
    table = normal(entries, 2, 3, width, seed=seed).to(DEVICE)
    index = torch.arange(tokens, device=DEVICE).flip(0) % entries
    return Modulation(inside(table.flatten(1, 2)).unflatten(1, (2, 3))[:, 1], index)


@pytest.mark.parametrize(("with_delta", "with_gate"), DELTAS)
@pytest.mark.parametrize("where", MODULATIONS)
@pytest.mark.parametrize("width", [1, 20, 56])
def test_add_norm(with_delta: bool, with_gate: bool, where: str | None, width: int) -> None:
    # Small numbers, so that eps matters.
    hidden = inside(normal(7, width, scale=0.05).to(DEVICE))
    delta = inside(normal(7, width, seed=1, scale=0.05).to(DEVICE)) if with_delta else None
    gate = modulation_of(7, width, 2) if with_gate else None
    modulation = modulation_of(7, width, 3) if where else None
    weight = normal(width, seed=4).to(DEVICE)
    case = (hidden, delta, gate, weight, 5e-3, modulation, where == "first")
    for got, want in zip(add_norm(*case), true_add_norm(*case), strict=True):
        assert got.dtype == torch.float32
        assert_relative_rms(got, want, 1e-6)


@pytest.mark.parametrize("where", MODULATIONS)
@pytest.mark.parametrize("dtype", HALF)
def test_add_norm_in_half_precision(where: str | None, dtype: torch.dtype) -> None:
    def cast(modulation: Modulation) -> Modulation:
        return Modulation(modulation.table.to(dtype), modulation.index)

    hidden, delta = (normal(5, 56, seed=seed).to(DEVICE, dtype) for seed in (0, 1))
    weight = normal(56, seed=2).to(DEVICE, dtype)
    modulation = cast(modulation_of(5, 56, 4)) if where else None
    case = (hidden, delta, cast(modulation_of(5, 56, 3)), weight, 1e-5, modulation)
    got = add_norm(*case, where == "first")
    for mine, want in zip(got, true_add_norm(*case, where == "first"), strict=True):
        assert mine.dtype == dtype
        assert_relative_rms(mine, want, HALF[dtype])
    # What the next layer adds to is what was normed.
    again = add_norm(got[0], None, None, weight, 1e-5, modulation, where == "first")
    assert_same_bits(got[1], again[1])


def test_a_stream_without_a_delta_is_returned_as_it_is() -> None:
    hidden, weight = normal(3, 20).to(DEVICE), normal(20, seed=1).to(DEVICE)
    before = hidden.clone()
    assert add_norm(hidden, None, None, weight, 1e-5, None, False)[0] is hidden
    total, _ = add_norm(hidden, before, None, weight, 1e-5, None, False)
    assert_same_bits(hidden, before)
    assert_same_bits(total, 2 * before)


@pytest.mark.parametrize("shape", [(6, 56), (1, 2688), (0, 20)])
def test_no_modulation_is_the_plain_norm(shape: tuple[int, int]) -> None:
    x, weight = normal(*shape, scale=1e3).to(DEVICE), normal(shape[-1], seed=1).to(DEVICE)
    _, got = add_norm(x, None, None, weight, 1e-5, None, False)
    assert got.shape == shape
    if len(x):
        assert_relative_rms(got, norm.rms_norm(x, weight, 1e-5), 1e-6)


@pytest.mark.parametrize("where", MODULATIONS)
@pytest.mark.parametrize("with_delta", [False, True])
def test_add_norm_is_the_reference(where: str | None, with_delta: bool) -> None:
    hidden = normal(4, 40).to(DEVICE)
    delta = normal(4, 40, seed=1).to(DEVICE) if with_delta else None
    gate = modulation_of(4, 40, 2, entries=1) if with_delta else None
    modulation = modulation_of(4, 40, 3, entries=1) if where else None
    case = (hidden, delta, gate, normal(40, seed=4).to(DEVICE), 1e-5, modulation, where == "first")
    for got, want in zip(add_norm(*case), norm.add_norm(*case), strict=True):
        assert_relative_rms(got, want, 1e-6)


def test_a_token_has_its_bits_in_any_batch_and_harms_no_other() -> None:
    weight = normal(56, seed=1).to(DEVICE)
    rows = normal(9, 112, seed=2).to(DEVICE)
    table = normal(1, 3, 56, seed=3).to(DEVICE)

    def both(x: Tensor) -> Tensor:
        entry = Modulation(table, torch.zeros(len(x), dtype=torch.int64, device=DEVICE))
        return torch.cat(
            add_norm(x[:, :56], x[:, 56:], entry, weight, 1e-5, entry, modulate_first=True), dim=1
        )

    whole = both(rows)
    assert_rows_are_independent(both, rows, sizes=(1, 2, 5))
    rows[3] = NAN
    others = [row for row in range(9) if row != 3]
    assert_same_bits(both(rows)[others], whole[others])


def true_group_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    gated = (y.double() * z.double() * torch.sigmoid(z.double())).unflatten(-1, (groups, -1))
    ones = torch.ones(gated.shape[-1], device=y.device)
    return true_norm(gated, ones, eps).flatten(-2) * weight.double()


@pytest.mark.parametrize(("width", "groups"), [(20, 1), (66, 3), (56, 8), (4096, 8)])
@pytest.mark.parametrize("scale", [0.1, 1e3])
def test_gated_group_norm(width: int, groups: int, scale: float) -> None:
    y = inside(normal(3, width, scale=scale).to(DEVICE))
    z = inside(normal(3, width, seed=1, scale=4.0).to(DEVICE))
    weight = normal(width, seed=2).to(DEVICE)
    got = gated_group_norm(y, z, weight, groups, 1e-5)
    assert_relative_rms(got, true_group_norm(y, z, weight, groups, 1e-5), 1e-6)
    assert_relative_rms(got, norm.gated_group_norm(y, z, weight, groups, 1e-5), 1e-6)


@pytest.mark.parametrize("dtype", HALF)
def test_the_group_norm_has_the_dtype_of_the_gate(dtype: torch.dtype) -> None:
    y, z = normal(3, 48).to(DEVICE), normal(3, 96, seed=1).to(DEVICE, dtype)[:, 48:]
    weight = normal(48, seed=2).to(DEVICE, dtype)
    got = gated_group_norm(y, z, weight, 2, 1e-5)
    assert got.dtype == dtype
    assert_relative_rms(got, true_group_norm(y, z, weight, 2, 1e-5), HALF[dtype])


def test_extreme_gates_are_open_or_shut() -> None:
    z = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], device=DEVICE)
    y, weight = torch.ones(1, 4, device=DEVICE), torch.ones(4, device=DEVICE)
    got = gated_group_norm(y, z, weight, 1, 1e-5)
    assert_relative_rms(got, true_group_norm(y, z, weight, 1, 1e-5), 1e-6)


def test_tokens_of_the_group_norm_are_independent() -> None:
    weight = normal(66, seed=1).to(DEVICE)
    assert_rows_are_independent(
        lambda x: gated_group_norm(x[:, :66], x[:, 66:], weight, 3, 1e-5),
        normal(9, 132).to(DEVICE),
        sizes=(1, 2, 5),
    )


@pytest.mark.parametrize(("gated", "where"), [(False, None), (True, "after"), (True, "first")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_of_experts_are_added_up_as_before_the_norm(
    gated: bool, where: str | None, dtype: torch.dtype
) -> None:
    """The sum is rounded as if a launch of its own had written it, and slots without an expert,
    which nobody writes, are not read."""
    tokens, slots, parts, width = 5, 3, 2, 24
    by_slot = normal(tokens, slots + parts, width, seed=1).to(dtype)
    ids = torch.arange(tokens * slots).view(tokens, slots) % 7
    ids[1, 2] = ids[3, 0] = -1
    scores = normal(tokens, slots, seed=2).abs()
    summed = torch.zeros(tokens, width)
    for slot in range(slots):
        used = (ids[:, slot] >= 0).unsqueeze(1)
        summed += torch.where(used, scores[:, slot : slot + 1] * by_slot[:, slot].float(), 0.0)
    for part in range(parts):
        summed += by_slot[:, slots + part].float()
    by_slot[1, 2] = by_slot[3, 0] = NAN
    table = normal(4, 3, width, seed=3, scale=0.3).to(dtype).to(DEVICE)
    modulation = Modulation(table, torch.arange(tokens, device=DEVICE) % 4)
    hidden = normal(tokens, width).to(dtype).to(DEVICE)
    weight = normal(width, seed=4).to(dtype).to(DEVICE)
    rest = (modulation if gated else None, weight, 1e-5, modulation if where else None)
    outputs = SlotOutputs(*(own.to(DEVICE) for own in (by_slot, ids, scores)))
    got = add_norm(hidden, outputs, *rest, where == "first")
    want = add_norm(hidden, summed.to(dtype).to(DEVICE), *rest, where == "first")
    for own, other in zip(got, want, strict=True):
        torch.testing.assert_close(own, other, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def _add_norm_launch(
    delta: bool, gate: bool, modulation: bool, first: bool, slots: int = 0
) -> Launch:
    pointers = ("hidden", "delta", "gate", "weight", "modulation", "total", "out")
    strides = ("hidden", "delta", "gate", "gate_part", "modulation", "modulation_part")
    signature = {
        **dict.fromkeys(pointers, "*bf16"),
        **dict.fromkeys(("gate_index", "modulation_index", "ids"), "*i64"),
        "scores": "*fp32",
        **dict.fromkeys(("ids_stride", "scores_stride"), "i32"),
        **{f"{name}_stride": "i32:16" for name in strides},
        "width": "i32:16",
        "eps": "fp32",
    }
    flags = {"has_delta": delta, "has_gate": gate, "has_modulation": modulation}
    experts = {"slots": slots, "parts": 2 if slots else 0}
    constants = {**flags, **experts, "modulate_first": first, "block": 4096}
    return Launch("twotower.kernels.norm_triton:_add_norm_kernel", signature, constants, 8)


LAUNCHES = [
    _add_norm_launch(True, True, True, True),
    _add_norm_launch(True, True, True, False),
    _add_norm_launch(True, False, False, False),
    _add_norm_launch(False, False, False, False),
    _add_norm_launch(True, True, True, True, slots=6),
    _add_norm_launch(True, False, False, False, slots=6),
    Launch(
        "twotower.kernels.norm_triton:_group_norm_kernel",
        {
            "y": "*fp32",
            **dict.fromkeys(("z", "weight", "out"), "*bf16"),
            **dict.fromkeys(("y_stride", "z_stride", "out_stride", "width"), "i32:16"),
            "eps": "fp32",
        },
        {"block": 512},
        num_warps=2,
    ),
]


def test_the_real_shapes_compile_without_spills() -> None:
    for launch, compiled in zip(LAUNCHES, compile_all(LAUNCHES), strict=True):
        assert compiled.spills == 0, launch
        assert compiled.registers <= (80 if launch.constants.get("slots") else 64), launch


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 1024])
@pytest.mark.parametrize(("with_delta", "where"), list(product([False, True], MODULATIONS)))
def test_add_norm_of_the_30b_model(tokens: int, with_delta: bool, where: str | None) -> None:
    hidden, delta = (normal(tokens, 2688, seed=seed).bfloat16().to(DEVICE) for seed in (0, 1))
    table = normal(16, 52, 3, 2688, seed=2, scale=0.3).bfloat16().to(DEVICE)
    index = torch.arange(tokens, device=DEVICE) % 16
    gate = Modulation(table[:, 20], index) if with_delta else None
    modulation = Modulation(table[:, 21], index) if where else None
    weight = normal(2688, seed=3).bfloat16().to(DEVICE)
    case = (hidden, delta if with_delta else None, gate, weight, 1e-5, modulation, where == "first")
    first, second = add_norm(*case), add_norm(*case)
    for got, again, want in zip(first, second, true_add_norm(*case), strict=True):
        assert_relative_rms(got, want, 5e-3)
        assert_same_bits(got, again)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 16, 1024])
def test_the_group_norm_of_the_30b_model(tokens: int) -> None:
    y = normal(tokens, 4096, scale=1e3).to(DEVICE)
    z = normal(tokens, 10304, seed=1).bfloat16().to(DEVICE)[:, :4096]
    weight = normal(4096, seed=2).bfloat16().to(DEVICE)
    got = gated_group_norm(y, z, weight, 8, 1e-5)
    assert_relative_rms(got, true_group_norm(y, z, weight, 8, 1e-5), 5e-3)
    assert_same_bits(got, gated_group_norm(y, z, weight, 8, 1e-5))

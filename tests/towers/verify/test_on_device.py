"""The self-test of a device: it passes where operators are right and refuses where one is not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from weakref import ReferenceType, ref

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tools import self_test as tool
from twotower import TwoTower
from twotower.kernels import dispatch
from twotower.kernels.dispatch import OPERATORS, force
from twotower.towers.errors import DeviceError
from twotower.towers.verify import on_device
from twotower.towers.verify.formula_model import FORMULA_CONFIG, formula_towers
from twotower.towers.verify.on_device import RECORDING, prove_device, self_test

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_references_pass(dtype: torch.dtype, quantized: bool) -> None:
    assert self_test(CPU, dtype, quantized_experts=quantized) < 60


@pytest.mark.usefixtures("products_of_bf16")
@pytest.mark.parametrize(
    ("dtype", "quantized"),
    [
        pytest.param(torch.float32, False, marks=pytest.mark.slow),
        (torch.float32, True),
        pytest.param(torch.bfloat16, True, marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_pass(dtype: torch.dtype, quantized: bool) -> None:
    """Under their interpreter where there is no GPU."""
    pytest.importorskip("triton")
    with warnings.catch_warnings(), force("triton"):
        # Outputs of padding are whatever memory held.
        warnings.filterwarnings("ignore", ".* encountered in", RuntimeWarning)
        self_test(DEVICE, dtype, quantized_experts=quantized, for_triton=True)


def test_the_recording_is_that_of_the_references_and_small() -> None:
    assert tool.differences(load_file(RECORDING), tool.record()) == []
    assert RECORDING.stat().st_size < 300_000


def test_it_has_every_kind_of_layer_and_the_released_widths() -> None:
    assert set(FORMULA_CONFIG.layer_pattern) == set("M*E-")
    widths = (FORMULA_CONFIG.head_dim, FORMULA_CONFIG.mamba_head_dim, FORMULA_CONFIG.ssm_state_size)
    assert widths == (128, 64, 128)


def test_products_in_8_bits_have_a_limit_of_their_own() -> None:
    """The recording is that of tokens which are not rounded to 8 bits."""
    self_test(CPU, torch.float32, quantized_experts=True, expert_products="fp8")
    self_test(CPU, torch.bfloat16, quantized_experts=True, expert_products="fp8")


def test_8_bit_experts_have_the_values_of_the_others() -> None:
    """One recording serves both: on the layout of kernels, where values and scales stay apart."""
    plain, quantized = (
        formula_towers(CPU, torch.bfloat16, own, for_triton=True)[0].weights.layers[0].mixer
        for own in (False, True)
    )
    for side in ("up", "down"):
        want, got = getattr(plain, side), getattr(quantized, side)
        for expert in range(FORMULA_CONFIG.n_routed_experts):
            assert torch.equal(got[expert], want[expert].float())


def again(like: tuple[Any, ...], parts: Iterable[Any]) -> tuple[Any, ...]:
    """A tuple of the same kind with other parts."""
    return like._make(parts) if hasattr(like, "_make") else tuple(parts)


def larger(out: Any) -> Any:
    """Floats that are 5 % too large."""
    if isinstance(out, tuple):
        return again(out, map(larger, out))
    return out * 1.05 if isinstance(out, Tensor) and out.is_floating_point() else out


def spoiled(out: Any) -> Any:
    """The first and the last value are NaN: one of them may be that of padding."""
    if isinstance(out, tuple):
        return again(out, map(spoiled, out))
    if isinstance(out, Tensor) and out.is_floating_point() and out.numel():
        out = out.clone()
        out.view(-1)[[0, -1]] = float("nan")
    return out


def without_lanes(out: Any) -> Any:
    """Every eighth value of the last dimension is 0."""
    if isinstance(out, tuple):
        return again(out, map(without_lanes, out))
    if isinstance(out, Tensor) and out.is_floating_point():
        out = out.clone()
        out[..., ::8] = 0
    return out


def next_tokens(operator: Any) -> Any:
    """Draws or commits another token."""

    def wrong(*args: Any, **kwargs: Any) -> Any:
        tokens, *others = operator(*args, **kwargs)
        return ((tokens + 1) % FORMULA_CONFIG.vocab_size, *others)

    return wrong


def commits_another(operator: Any) -> Any:
    def wrong(drafts: Any, slots: Any, token: Tensor, *others: Any) -> None:
        operator(drafts, slots, (token + 1) % FORMULA_CONFIG.vocab_size, *others)

    return wrong


def commits_unsure(operator: Any) -> Any:
    """The least confident first."""

    def wrong(drafts: Any, slots: Any, token: Any, confidence: Tensor, *others: Any) -> None:
        operator(drafts, slots, token, 1 - confidence, *others)

    return wrong


def misses_a_line(operator: Any) -> Any:
    def wrong(*args: Any) -> Tensor:
        lines: Tensor = operator(*args).clone()
        lines[(lines >= 0).sum() - 1] = -1
        return lines

    return wrong


def with_first_larger(operator: Any) -> Any:
    """Of an operator that writes in place: what it is given first is a quarter too large."""

    def wrong(first: Tensor, *others: Any) -> Any:
        return operator(first * 1.25, *others)

    return wrong


def replays_one_less(operator: Any) -> Any:
    def wrong(*args: Any) -> Any:
        *head, counts = args
        return operator(*head, counts - 1)

    return wrong


def wrong_behind_many_pages(operator: Any) -> Any:
    """Of splits of a long context the first is left out, as it were."""

    def wrong(*args: Any) -> Tensor:
        out: Tensor = operator(*args)
        return out * 0.8 if int(args[4].context_lens.max()) > 512 else out

    return wrong


def with_outputs(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda operator: lambda *args, **kwargs: change(operator(*args, **kwargs))


def with_other_words(operator: Any) -> Any:
    """Of an operator that gives whole numbers: one more of the first."""

    def wrong(*args: Any) -> Any:
        out = operator(*args)
        return (out[0] + 1, *out[1:]) if isinstance(out, tuple) else out + 1

    return wrong


def writes_elsewhere(operator: Any) -> Any:
    """Of an operator that fills its last argument: its first line comes last."""

    def wrong(*args: Any) -> None:
        operator(*args)
        args[-1].copy_(args[-1].roll(1, 0))

    return wrong


def forgets_the_context(operator: Any) -> Any:
    def wrong(sent: Tensor, context: Tensor, *others: Any) -> Tensor:
        return operator(sent, context * 0, *others)

    return wrong


# Operators that give no floats, or write where they are told.
OTHERS = (
    *("replay", "store_kv", "commit", "select_masked", "read_blocks", "pack_drafts"),
    *("unpack_rows", "pack_drawn", "right_counts"),
)
FLOATS = [name for name in OPERATORS if name not in OTHERS]
# A norm follows the scan: what is too large all over does not show behind it.
SLIGHT = [name for name in FLOATS if name != "mamba_scan"]
Fault = tuple[str, Callable[[Any], Any], torch.dtype]
WRONG: list[Fault] = [
    *((name, with_outputs(larger), torch.float32) for name in SLIGHT),
    *((name, with_outputs(spoiled), torch.float32) for name in FLOATS),
    *((name, with_outputs(without_lanes), dtype) for name in FLOATS for dtype in DTYPES),
    *(
        (name, fault, dtype)
        for dtype in DTYPES
        for name, fault in (
            ("attention", wrong_behind_many_pages),
            ("predict", next_tokens),
            ("commit", commits_another),
            ("commit", commits_unsure),
            ("select_masked", misses_a_line),
            ("store_kv", with_first_larger),
            ("replay", replays_one_less),
            ("read_blocks", with_other_words),
            ("right_counts", with_other_words),
            ("pack_drafts", writes_elsewhere),
            ("pack_drawn", writes_elsewhere),
            ("unpack_rows", forgets_the_context),
        )
    ),
]


def test_every_operator_has_a_fault_here() -> None:
    assert {name for name, _, _ in WRONG} == set(OPERATORS)


@pytest.mark.parametrize(("name", "fault", "dtype"), WRONG)
def test_a_wrong_operator_is_refused(
    name: str, fault: Callable[[Any], Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = OPERATORS[name]
    monkeypatch.setattr(operator, "reference", fault(operator.reference))
    with pytest.raises(DeviceError, match=r"self-test of device cpu in .* failed") as caught:
        self_test(CPU, dtype)
    assert "self_test: false" in str(caught.value)


def test_the_error_names_pass_error_and_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = dispatch.store_kv.reference
    monkeypatch.setattr(dispatch.store_kv, "reference", with_first_larger(reference))
    said = r"prefill/k/0: off by 2\.5e-01 of its size, at most .*, limits 5e-03 and 7e-02"
    with pytest.raises(DeviceError, match=said):
        self_test(CPU, torch.float32)


def test_an_operator_that_raises_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(dispatch.commit, "reference", broken)
    said = (
        "checks miss: what follows denoise/plain failed with RuntimeError: an illegal memory access"
    )
    with pytest.raises(DeviceError, match=said):
        self_test(CPU, torch.float32)


@pytest.mark.parametrize("name", ["attention", "commit", "slot_outputs"])
def test_a_wrong_kernel_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """References stand in for all kernels but the one that is wrong."""
    for other, operator in OPERATORS.items():
        fault: Any = commits_another if name == "commit" else with_outputs(without_lanes)
        kernel = fault(operator.reference) if other == name else operator.reference
        monkeypatch.setitem(operator.__dict__, "triton", kernel)
    said = f"with the reference of {name} in place of its kernel they hold"
    with force("triton"), pytest.raises(DeviceError, match=said):
        self_test(CPU, torch.float32, for_triton=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_passes_and_its_memory_is_free_again(dtype: torch.dtype, quantized: bool) -> None:
    self_test(DEVICE, dtype, quantized_experts=quantized)
    before = torch.cuda.memory_allocated()
    seconds = self_test(DEVICE, dtype, quantized_experts=quantized)
    assert torch.cuda.memory_allocated() <= before
    # Kernels are compiled by now.
    assert seconds < 5


def test_nothing_of_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[ReferenceType[Any]] = []

    def watched(*args: Any) -> Any:
        towers = formula_towers(*args)
        made.extend(ref(part) for tower in towers for part in (tower, tower.weights.embedding))
        return towers

    monkeypatch.setattr(on_device, "formula_towers", watched)
    self_test(CPU, torch.float32)
    assert len(made) == 4
    assert [one() for one in made] == [None] * 4


@pytest.mark.parametrize(
    ("device", "wanted", "runs"),
    [("cpu", None, 0), ("cpu", True, 1), ("cuda", None, 1), ("cuda", False, 0), ("cpu", False, 0)],
)
def test_it_runs_where_it_is_wanted_by_default_on_cuda(
    device: str, wanted: bool | None, runs: int, tiny_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def noted(*args: Any, **kwargs: Any) -> float:
        seen.append((*args, kwargs))
        return 0.5

    monkeypatch.setattr(on_device, "self_test", noted)
    prove_device(tiny_a, device, torch.bfloat16, wanted)
    plain = {
        "quantized_experts": False,
        "expert_products": "widened",
        "deterministic": False,
    }
    wants = [(torch.device(device), torch.bfloat16, plain)]
    assert seen == wants * runs


def test_from_pretrained_refuses_a_device_that_fails(
    tiny_a: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = with_outputs(larger)(dispatch.attention.reference)
    monkeypatch.setattr(dispatch.attention, "reference", wrong)
    TwoTower.from_pretrained(tiny_a)
    with pytest.raises(DeviceError, match="self-test of device cpu in float32 failed") as caught:
        TwoTower.from_pretrained(tiny_a, self_test=True)
    assert [record.getMessage() for record in caplog.records] == [str(caught.value)]

"""The kind of a processor's products: found by trying, and forced for a test."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support.comparing import assert_relative_rms, assert_same_bits, normal
from tests.support.products import ALL_PRODUCTS, multiplied_by
from twotower.kernels import products as module
from twotower.kernels.linear import linear, pack, try_single_row
from twotower.kernels.products import Products, best_products, force_products, products

Packing = Callable[[Tensor], Tensor]
HERE = ALL_PRODUCTS[ALL_PRODUCTS.index(best_products()) :]
needs_onednn = pytest.mark.skipif(
    best_products() != "onednn", reason="this processor has nothing more to lose"
)


def packs(dtype: torch.dtype) -> bool:
    return pack(normal(8, 24).to(dtype)).is_mkldnn


def test_each_packs_what_it_multiplies(each_products: Products) -> None:
    assert products() == each_products
    assert packs(torch.float32) == (each_products != "plain")
    assert packs(torch.bfloat16) == (each_products == "onednn")
    assert not packs(torch.float64)


def test_products_are_forced_for_a_block() -> None:
    before = products()
    with force_products("plain"):
        with force_products(best_products()):
            assert products() == best_products()
        with pytest.raises(KeyError), force_products(best_products()):
            raise KeyError
        assert products() == "plain"
    assert products() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at_load", HERE)
@pytest.mark.parametrize("later", HERE)
def test_a_weight_of_one_processor_is_multiplied_by_another(
    dtype: torch.dtype, at_load: Products, later: Products
) -> None:
    x, weight = normal(5, 24).to(dtype), normal(8, 24, seed=1).to(dtype)
    with multiplied_by(at_load):
        packed = pack(weight)
    with multiplied_by(later):
        want = x.double() @ weight.double().T
        assert_relative_rms(linear(x, packed), want, 1e-2 if dtype == torch.bfloat16 else 1e-6)


def refusing(dtype: torch.dtype, error: Exception) -> Packing:
    """Packing as it is, but for one dtype."""
    real = module.pack_onednn

    def pack_or_not(weight: Tensor) -> Tensor:
        if weight.dtype == dtype:
            raise error
        return real(weight)

    return pack_or_not


def changing(dtype: torch.dtype) -> Packing:
    """Packing after which one dtype's products are others."""
    real = module.pack_onednn
    return lambda weight: real(weight * 1.01 if weight.dtype == dtype else weight)


@needs_onednn
@pytest.mark.parametrize(
    ("packing", "left"),
    [
        (refusing(torch.bfloat16, RuntimeError("bf16 path needs the cpu support")), "onednn_fp32"),
        (refusing(torch.float32, RuntimeError("could not create a primitive")), "plain"),
        (refusing(torch.float32, AttributeError("no attribute '_linear_pointwise'")), "plain"),
        (changing(torch.bfloat16), "onednn_fp32"),
        (changing(torch.float32), "plain"),
    ],
)
def test_what_onednn_refuses_or_gets_wrong_is_not_used(
    packing: Packing, left: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "pack_onednn", packing)
    assert best_products.__wrapped__() == left


def test_a_product_in_which_a_rows_bits_depend_on_the_others_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def by_size(x: Tensor, weight: Tensor, _bias: Tensor | None = None) -> Tensor:
        held = weight.to_dense() if weight.is_mkldnn else weight
        return x @ held.T if len(x) > 3 else (x.double() @ held.double().T).to(x.dtype)

    monkeypatch.setattr(module, "linear_onednn", by_size)
    assert best_products.__wrapped__() == "plain"


@pytest.mark.parametrize("best", ["onednn_fp32", "plain"])
def test_what_a_processor_lacks_cannot_be_forced(
    best: Products, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "best_products", lambda: best)
    with (
        pytest.raises(ValueError, match=f"^products: got 'onednn', expected at most '{best}'"),
        force_products("onednn"),
    ):
        pass


def rows_multiplied(
    monkeypatch: pytest.MonkeyPatch, alone: Callable[[Tensor, Tensor], Tensor] | None = None
) -> list[int]:
    """The numbers of rows that oneDNN is given from now on; `alone` stands in for its product of a
    single row."""
    real, seen = module._product, []

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        seen.append(len(x))
        if alone is None or len(x) > 1:
            return real(x, weight, bias)
        return alone(x, weight) if bias is None else alone(x, weight) + bias

    monkeypatch.setattr(module, "_product", product)
    return seen


@pytest.fixture
def tried_anew() -> Iterator[None]:
    """Single rows of this processor's best products are tried anew, and the verdicts forgotten."""
    module._shape_sums_alone.cache_clear()
    with force_products(best_products()):
        yield
    module._shape_sums_alone.cache_clear()


needs_packing = pytest.mark.skipif(best_products() == "plain", reason="nothing is packed here")


@needs_packing
@pytest.mark.usefixtures("tried_anew")
def test_a_row_that_is_summed_in_another_order_alone_runs_as_two(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reversed_order(x: Tensor, weight: Tensor) -> Tensor:
        return (x * weight.to_dense()).flip(1).cumsum(1)[:, -1].unsqueeze(0)

    seen = rows_multiplied(monkeypatch, reversed_order)
    x, weight = normal(3, 90), pack(normal(70, 90, seed=1))
    try_single_row(weight)
    assert 1 in seen, "single rows are tried"
    seen.clear()
    want = linear(x, weight)
    assert_same_bits(linear(x[:1], weight), want[:1])
    assert seen == [3, 2]


@needs_packing
@pytest.mark.usefixtures("tried_anew")
def test_a_row_that_is_summed_alike_alone_runs_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = pack(normal(70, 90, seed=1))
    monkeypatch.setattr(module, "_shape_sums_alone", lambda *_: True)
    seen = rows_multiplied(monkeypatch)
    linear(normal(1, 90), weight)
    assert seen == [1]


@needs_packing
@pytest.mark.usefixtures("tried_anew")
@pytest.mark.parametrize("kind", ["plain", "bfloat16", "large"])
def test_a_weight_that_is_not_tried_takes_two_rows(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "bfloat16" and best_products() != "onednn":
        pytest.skip("bf16 is widened here")
    monkeypatch.setattr(module, "_MOST_TRIED", 70 * 90 - (kind == "large"))
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    weight = normal(70, 90, seed=1).to(dtype)
    held = weight if kind == "plain" else pack(weight)
    seen = rows_multiplied(monkeypatch)
    linear(normal(1, 90).to(dtype), held)
    assert seen == [2]


PROGRAM = """
import sys
from twotower import TwoTower
from twotower.kernels.products import products

assert products() == "onednn_fp32", products()
model = TwoTower.from_pretrained(sys.argv[1], dtype="bfloat16")
assert len(model.generate([[5, 3, 17]], max_tokens=9)[0].token_ids) == 9
"""


@needs_onednn
def test_a_onednn_that_does_refuse_bf16(tiny_a: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN itself told that the processor ends at AVX2, which it reads at its first use."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tiny_a)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr

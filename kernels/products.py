"""Matrix products of this processor and this build of torch, detected once per process.

    onednn       oneDNN multiplies fp32 and bf16              x86 with AVX-512
    onednn_fp32  oneDNN multiplies fp32, bf16 is widened      x86 without it, like AVX2
    plain        torch's usual fp32 product in tiles of rows  anything else, like ARM

oneDNN's product is reached by an operator that torch itself uses for compiled graphs. Neither
processor flags nor versions say for sure whether it exists and gives a row the same bits in any
batch (on ARM it exists and does not), so it is tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Literal

import torch
from torch import Tensor

Products = Literal["onednn", "onednn_fp32", "plain"]

_PACKED_FOR_ROWS = 16
# A weight of more elements is not tried with a single row: two copies of it would be made for that.
_MOST_TRIED = 1 << 25
_BY_ONEDNN: dict[Products, tuple[torch.dtype, ...]] = {
    "onednn": (torch.float32, torch.bfloat16),
    "onednn_fp32": (torch.float32,),
    "plain": (),
}
_forced: Products | None = None


def products() -> Products:
    """The kind of products that this process uses: the forced one, else `best_products`."""
    return _forced or best_products()


def by_onednn(dtype: torch.dtype) -> bool:
    """True if oneDNN multiplies matrices of `dtype` in this process."""
    return dtype in _BY_ONEDNN[products()]


def fastest_dtype() -> torch.dtype:
    """The dtype in which training multiplies on a CPU: bf16, or fp32 where there is no oneDNN
    product of bf16 and torch's takes about ten times as long as that of fp32."""
    return torch.bfloat16 if by_onednn(torch.bfloat16) else torch.float32


@cache
def best_products() -> Products:
    """The fastest kind of products that works on this processor with this build of torch."""
    if not _works(torch.float32):
        return "plain"
    return "onednn" if _works(torch.bfloat16) else "onednn_fp32"


@contextmanager
def force_products(forced: Products) -> Iterator[None]:
    """Inside, every thread of this process multiplies as a processor of kind `forced` would.

    A weight that was packed before is still multiplied by oneDNN. Raises ValueError if this
    processor lacks such products.
    """
    global _forced
    if set(_BY_ONEDNN[forced]) - set(_BY_ONEDNN[best_products()]):
        raise ValueError(f"products: got {forced!r}, expected at most {best_products()!r} here")
    before, _forced = _forced, forced
    try:
        yield
    finally:
        _forced = before


def pack_onednn(weight: Tensor) -> Tensor:
    """A weight [N, K] in oneDNN's packed layout; only `linear_onednn` reads it."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K] (plain or packed) and bias [N] of one dtype, fp32 or bf16 -> [T, N].

    A single row is computed twice, in a batch of 2, where it would be summed in another order
    alone.
    """
    if x.shape[0] == 1 and not sums_alone(weight):
        return _product(torch.cat((x, x)), weight, bias)[:1]
    return _product(x.contiguous(), weight, bias)


def sums_alone(weight: Tensor) -> bool:
    """True if a single row by `weight` is known to have the bits that it has in a batch. Of bf16 it
    is not: rounding hides most differences from a trial, not all."""
    if not weight.is_mkldnn or weight.dtype != torch.float32:
        return False
    return _shape_sums_alone(*weight.shape, torch.get_num_threads())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out


@cache
def _shape_sums_alone(outputs: int, width: int, _threads: int) -> bool:
    """`sums_alone` of packed fp32 weights [outputs, width], tried with random numbers in a few
    milliseconds. Seen: with AVX-512 up to a width of 1024, with AVX2 of any."""
    if outputs * width > _MOST_TRIED:
        return False
    generator = torch.Generator().manual_seed(0)
    x, some, bias = (
        torch.randn(shape, generator=generator, device="cpu")
        for shape in ((max(4, 256 // outputs), width), (min(outputs, 64), width), (outputs,))
    )
    packed = pack_onednn(some.repeat(-(-outputs // len(some)), 1)[:outputs])
    return all(
        torch.equal(
            torch.cat([_product(row, packed, each) for row in x.split(1)]),
            _product(x, packed, each),
        )
        for each in (None, bias)
    )


def _works(dtype: torch.dtype) -> bool:
    """True if oneDNN packs and multiplies `dtype`, and gives a row the same bits in any batch."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (
        torch.randn(rows, 259, generator=generator, device="cpu").to(dtype) for rows in (33, 40)
    )
    try:
        whole, packed = linear_onednn(x, weight), pack_onednn(weight)
        parts = [linear_onednn(part, packed) for part in x.split((1, 2, 3, 4, 5, 7, 11))]
    except (AttributeError, RuntimeError):
        # This build of torch has no such operator, or oneDNN has none for this processor.
        return False
    return torch.equal(torch.cat(parts), whole)

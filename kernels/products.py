"""What the products of this processor and this build of torch run on, found out once.

    onednn       oneDNN multiplies fp32 and bf16              x86 with AVX-512
    onednn_fp32  oneDNN multiplies fp32, bf16 is widened      x86 without it, like AVX2
    plain        torch's usual fp32 product in tiles of rows  anything else, like ARM

oneDNN's product stands behind an operator that torch itself uses for compiled graphs. Neither
processor flags nor versions say for sure whether it is there and keeps a row's bits (on ARM it is,
and does not), so it is tried.
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
_BY_ONEDNN: dict[Products, tuple[torch.dtype, ...]] = {
    "onednn": (torch.float32, torch.bfloat16),
    "onednn_fp32": (torch.float32,),
    "plain": (),
}
_forced: Products | None = None


def products() -> Products:
    """What this process multiplies by: the best there is, unless forced."""
    return _forced or best_products()


def by_onednn(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies numbers of `dtype` in this process."""
    return dtype in _BY_ONEDNN[products()]


def fastest_dtype() -> torch.dtype:
    """What training multiplies on a CPU: bf16, or fp32 where torch's own bf16 products take about
    ten times as long as those of fp32."""
    return torch.bfloat16 if by_onednn(torch.bfloat16) else torch.float32


@cache
def best_products() -> Products:
    """The best that this processor and this build of torch have."""
    if not _works(torch.float32):
        return "plain"
    return "onednn" if _works(torch.bfloat16) else "onednn_fp32"


@contextmanager
def force_products(forced: Products) -> Iterator[None]:
    """Inside, every thread of this process multiplies as on a processor that has no better.

    A weight that was packed before is still multiplied by oneDNN. Raises ValueError where there is
    no such product.
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
    """A weight [N, K] in oneDNN's own layout."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] and weight [N, K] (plain or packed) -> [T, N]. A single row is doubled."""
    single = x.shape[0] == 1
    x = torch.cat((x, x)) if single else x.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out[:1] if single else out


def _works(dtype: torch.dtype) -> bool:
    """Whether oneDNN packs and multiplies `dtype`, and a row has the same bits in any batch."""
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

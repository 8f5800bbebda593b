"""Matrix products that give a row the same bits in any batch.

    y[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]

On a CPU the usual fp32 product takes another summation order for small numbers of rows (1 to 15
on AVX-512 with MKL) and, for long rows, for other numbers of threads. oneDNN's product sums in
one order from 2 rows up, whatever the threads, and for most shapes of packed weights from 1 row up.
A weight packed into oneDNN's layout makes it as fast for one row as MKL's matrix-vector product.
`products` says for which dtypes it is there. Without it bf16 is widened to fp32, and products of
fp32 are cut into tiles of 16 rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels.products import by_onednn, linear_onednn, pack_onednn, sums_alone

_TILE_ROWS = 16
_VECTOR = 16


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """x [T, K], weight [N, K] (plain or packed) and bias [N] of one dtype -> [T, N] of that dtype,
    written to `out` if it is given."""
    if out is not None:
        return _linear_into(out, x, weight, bias)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if x.is_cuda:
        return F.linear(x, weight, bias)
    if weight.is_mkldnn or by_onednn(x.dtype):
        return linear_onednn(x, weight, bias)
    if x.dtype == torch.bfloat16:
        return _linear_widened(x, weight, bias)
    return linear_tiled(x, weight, bias)


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in the layout that `linear` reads fastest on its device.

    A packed weight has the same shape and as many bytes, and gives the same bits, but only
    `linear` can read it.
    """
    if weight.is_cuda or not by_onednn(weight.dtype):
        return weight
    return pack_onednn(weight)


def try_single_row(weight: Tensor) -> None:
    """Finds out how a single row is multiplied by a packed weight, with the threads that the caller
    has. Else the first product by a weight of this shape does, for a few milliseconds."""
    if weight.is_mkldnn:
        sums_alone(weight)


def linear_tiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N], in tiles of exactly 16 rows, the last padded.

    Rows are padded to whole vectors: otherwise MKL's order of summation depends on a row's index in
    the tile.
    """
    rows, width = x.shape
    padded = F.pad(x, (0, -width % _VECTOR, 0, -rows % _TILE_ROWS))
    if width % _VECTOR:
        weight = F.pad(weight, (0, -width % _VECTOR))
    if rows <= _TILE_ROWS:
        return F.linear(padded, weight, bias)[:rows]
    return torch.cat([F.linear(tile, weight, bias) for tile in padded.split(_TILE_ROWS)])[:rows]


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if not x.is_cuda:
        return out.copy_(linear(x, weight, bias))
    if bias is None:
        return torch.mm(x, weight.T, out=out)
    return torch.addmm(bias, x, weight.T, out=out)


def _linear_widened(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A bf16 product summed in fp32 and rounded once. The weight is widened at every call: that
    takes less time than torch's bf16 product where this runs, and keeps no second copy."""
    wide = linear(x.float(), weight.float(), None if bias is None else bias.float())
    return wide.to(x.dtype)

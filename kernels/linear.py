"""Matrix products whose rows do not depend on what else is in the batch.

    y[t, n] = sum_k x[t, k] * weight[n, k] + bias[n]

On a CPU the usual fp32 product takes another summation order for small numbers of rows (1 to 15
on AVX-512 with MKL) and, for long rows, for other numbers of threads. oneDNN's product sums in
one order from 2 rows up, whatever the threads. It stands behind an operator that torch itself
uses for compiled graphs, and takes weights packed into its own layout, which makes it as fast for
one row as MKL's matrix-vector product. Where it is missing, products are cut into tiles of 16
rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_TILE_ROWS = 16
_VECTOR = 16
_PACKED_FOR_ROWS = 16
_HAS_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
)
_ONEDNN_DTYPES = (torch.float32, torch.bfloat16)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K] and weight [N, K] (plain or packed) of one dtype -> [T, N] of that dtype."""
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0])
    if x.is_cuda:
        return F.linear(x, weight, bias)
    if _HAS_ONEDNN and x.dtype in _ONEDNN_DTYPES:
        return _linear_onednn(x, weight, bias)
    return linear_tiled(x, weight, bias)


def pack(weight: Tensor) -> Tensor:
    """A weight [N, K] in the layout that `linear` reads fastest on its device.

    A packed weight has the same shape and gives the same bits, but can only be handed to
    `linear`; it takes the place of the plain one, in as many bytes.
    """
    if weight.is_cuda or not _HAS_ONEDNN or weight.dtype not in _ONEDNN_DTYPES:
        return weight
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _PACKED_FOR_ROWS)
    return packed


def linear_tiled(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same product in tiles of exactly 16 rows, the last one padded with zeros.

    MKL sums a row by its place in the tile where rows are not whole vectors: they are made so.
    """
    rows, width = x.shape
    padded = F.pad(x, (0, -width % _VECTOR, 0, -rows % _TILE_ROWS))
    if width % _VECTOR:
        weight = F.pad(weight, (0, -width % _VECTOR))
    tiles = [F.linear(tile, weight, bias) for tile in padded.split(_TILE_ROWS)]
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[:rows]


def _linear_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    single = x.shape[0] == 1
    x = torch.cat((x, x)) if single else x.contiguous()
    out: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return out[:1] if single else out

"""Who multiplies a dense weight on a GPU: the library, or our own kernel.

Nobody has timed the kernel yet, so the library multiplies unless a measurement says otherwise:
`python -m benchmarks.gpu.products` prints both. A table of a card enters what won there with
`prefer`. Deterministic passes always take the kernel.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from twotower.kernels.determinism import is_deterministic

Product = Literal["library", "own"]

# By output and input channels, and the power of two that holds the rows.
_faster: dict[tuple[int, int, int], Product] = {}


def prefer(outputs: int, inner: int, rows: int, product: Product) -> None:
    """Notes what multiplies a weight [outputs, inner] faster, for as many rows as need the same
    power of two as `rows`."""
    _faster[outputs, inner, _bucket(rows)] = product


def forget_all() -> None:
    """Back to the library for every shape."""
    _faster.clear()


def product_of(outputs: int, inner: int, rows: int) -> Product:
    """Who multiplies `rows` rows with a weight [outputs, inner]."""
    if is_deterministic():
        return "own"
    return _faster.get((outputs, inner, _bucket(rows)), "library")


def own_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    out: Tensor | None = None,  # noqa: ARG001
) -> bool:
    """Of the arguments of `linear`: whether the kernel is to multiply."""
    return product_of(weight.shape[0], weight.shape[1], x.shape[0]) == "own"


def own_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,  # noqa: ARG001
    down_bias: Tensor | None = None,  # noqa: ARG001
) -> bool:
    """Of the arguments of `mlp`: whether the kernel is to multiply both of its weights."""
    return own_product(x, up) and own_product(x, down)


def _bucket(rows: int) -> int:
    return 1 << max(0, rows - 1).bit_length()

"""Who multiplies a dense weight on a GPU: the library, or our own kernel.

The library, unless a card's launch table says otherwise of a weight's shape and so many rows, as
`"linear_2688x4096": [{"up_to": 16, "own": true}]`. Deterministic passes always take the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.kernels.determinism import is_deterministic
from twotower.kernels.launch_table import tuned


@dataclass(frozen=True)
class Choice:
    """Whether our own kernel multiplies a weight, and not the library."""

    own: bool = False


LIBRARY = Choice()


def entry_name(outputs: int, inner: int) -> str:
    """The name under which a table keeps the choice for weights [outputs, inner]."""
    return f"linear_{outputs}x{inner}"


def own_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,  # noqa: ARG001
    out: Tensor | None = None,  # noqa: ARG001
) -> bool:
    """Of the arguments of `linear`: whether the kernel is to multiply."""
    if is_deterministic():
        return True
    return tuned(entry_name(*weight.shape), x.shape[0], LIBRARY, x.device).own


def own_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    up_bias: Tensor | None = None,  # noqa: ARG001
    down_bias: Tensor | None = None,  # noqa: ARG001
) -> bool:
    """Of the arguments of `mlp`: whether the kernel is to multiply both of its weights."""
    return own_product(x, up) and own_product(x, down)

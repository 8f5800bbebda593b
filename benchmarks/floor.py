"""The matmul floor of a pass on a CPU: its matrix products alone.

Every weight that the pass uses is multiplied once, with the shapes and threads of the pass: stacked
projections, each chosen expert with as many rows as chose it, shared experts, head. Of the products
that a CPU build of torch offers (MKL, oneDNN on packed weights), the faster counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.linear import linear, pack
from twotower.kernels.moe import Routing
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import AttentionWeights, MambaWeights, MlpWeights, MoeWeights

Product = tuple[Tensor, Tensor]


@contextmanager
def counted_experts() -> Iterator[list[dict[int, int]]]:
    """A list to which each MoE layer that runs in the `with` block appends the number of rows that
    chose each expert, by expert."""
    layers: list[dict[int, int]] = []
    reference = dispatch.route.reference

    def counted(*args: object) -> Routing:
        routing = reference(*args)  # type: ignore[arg-type]
        unique, counts = routing.ids.unique(return_counts=True)
        layers.append(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
        return routing

    dispatch.route.reference = counted  # type: ignore[assignment]
    try:
        yield layers
    finally:
        dispatch.route.reference = reference


def products(
    tower: ContextTower | DenoiserTower,
    rows: int,
    head_rows: int,
    experts: list[dict[int, int]],
) -> list[Product]:
    """The (input, weight) pairs of a pass over `rows` tokens, `head_rows` of them through the head;
    inputs are random. `experts` are rows by expert of each MoE layer."""
    pairs: list[Product] = []
    chosen = iter(experts)
    for layer in tower.weights.layers:
        pairs += _layer_products(layer.mixer, rows, chosen)
    if head_rows:
        pairs.append(_pair(tower.weights.head, head_rows))
    return pairs


def run_products(pairs: list[Product], product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Multiplies every pair once."""
    for x, weight in pairs:
        product(x, weight)


def product_sets(pairs: list[Product]) -> list[Callable[[], None]]:
    """Functions that compute all products, by each library."""
    plain = [(x, weight.to_dense() if weight.is_mkldnn else weight) for x, weight in pairs]
    return [
        lambda: run_products(plain, F.linear),
        lambda: run_products(pairs, linear),
    ]


def _layer_products(mixer: object, rows: int, chosen: Iterator[dict[int, int]]) -> list[Product]:
    if isinstance(mixer, MambaWeights):
        return [_pair(mixer.in_proj, rows), _pair(mixer.out_proj, rows)]
    if isinstance(mixer, AttentionWeights):
        return [_pair(mixer.qkv, rows), _pair(mixer.o_proj, rows)]
    if isinstance(mixer, MlpWeights):
        return [_pair(mixer.up, rows), _pair(mixer.down, rows)]
    assert isinstance(mixer, MoeWeights)
    pairs = [_pair(pack(mixer.gate.float()), rows)]
    for expert, count in next(chosen).items():
        pairs += [_pair(mixer.up[expert], count), _pair(mixer.down[expert], count)]
    return [*pairs, _pair(mixer.shared.up, rows), _pair(mixer.shared.down, rows)]


def _pair(weight: Tensor, rows: int) -> Product:
    return torch.randn(rows, weight.shape[1]), weight

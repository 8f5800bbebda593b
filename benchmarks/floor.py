"""The matmul floor of a pass: its bare matrix products, with nothing between them.

Every weight that the pass uses is multiplied once, in the pass's own shapes and threads: stacked
projections, each expert that was chosen with as many rows as chose it, shared experts, head. Of
the products that a CPU build of torch offers (MKL, oneDNN on packed weights), the faster counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.linear import linear, pack
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.model.weights import AttentionWeights, MambaWeights, MlpWeights, MoeWeights

Product = tuple[Tensor, Tensor]


class ExpertCounter:
    """Records, while active, how many rows chose each expert, layer by layer."""

    def __init__(self) -> None:
        self.layers: list[dict[int, int]] = []
        self._reference = dispatch.route.reference

    def __enter__(self) -> ExpertCounter:
        def counted(*args: object) -> tuple[Tensor, Tensor]:
            ids, weights = self._reference(*args)  # type: ignore[arg-type]
            unique, counts = ids.unique(return_counts=True)
            self.layers.append(dict(zip(unique.tolist(), counts.tolist(), strict=True)))
            return ids, weights

        dispatch.route.reference = counted  # type: ignore[assignment]
        return self

    def __exit__(self, *_: object) -> None:
        dispatch.route.reference = self._reference

    @property
    def mean_unique(self) -> float:
        """Mean number of experts that a layer read."""
        return sum(map(len, self.layers)) / max(1, len(self.layers))


def products(
    tower: ContextTower | DenoiserTower,
    rows: int,
    head_rows: int,
    experts: list[dict[int, int]],
) -> list[Product]:
    """The (input, weight) pairs of one pass over `rows` tokens; inputs are random."""
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
    """The same products by each library, ready to be timed."""
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

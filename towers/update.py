"""What moves a mirror of a row's context state: the parts of an update, gathered layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower.towers.config import ATTENTION, MAMBA, TwoTowerConfig

UpdateKind = Literal["snapshot", "delta", "kv"]


@dataclass(frozen=True)
class UpdatePlan:
    """What an update will hold, known before the pass that computes it.

    All kinds have K/V of the tokens start..position-1. A snapshot has the Mamba layers' states at
    `position`; a delta has the raw projections of the tokens, which the receiver replays; "kv" has
    nothing more and leaves the mirror's state where it is.
    """

    kind: UpdateKind
    start: int
    position: int

    @property
    def count(self) -> int:
        """Tokens that the update covers."""
        return self.position - self.start

    def shapes(self, config: TwoTowerConfig) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the update's tensors; the first dimension counts layers.

        `k`, `v` [A, nkv, n, hd]; delta `xbc` [M, n, Cd], `dt` [M, n, H]; snapshot
        `conv` [M, K-1, Cd], `ssm` [M, H, P, N] fp32; without layers of a kind its names are left
        out.
        """
        mamba, attention = len(config.layers_of(MAMBA)), len(config.layers_of(ATTENTION))
        shapes: dict[str, tuple[int, ...]] = {}
        if mamba and self.kind == "delta":
            shapes["xbc"] = (mamba, self.count, config.conv_dim)
            shapes["dt"] = (mamba, self.count, config.mamba_num_heads)
        if mamba and self.kind == "snapshot":
            shapes["conv"] = (mamba, config.conv_kernel - 1, config.conv_dim)
            heads, width = config.mamba_num_heads, config.mamba_head_dim
            shapes["ssm"] = (mamba, heads, width, config.ssm_state_size)
        if attention:
            kv = (attention, config.num_key_value_heads, self.count, config.head_dim)
            shapes |= {"k": kv, "v": kv}
        return shapes


def plan_update(config: TwoTowerConfig, start: int, position: int) -> UpdatePlan:
    """A delta where it has fewer values than a snapshot, otherwise a snapshot."""
    delta, snapshot = UpdatePlan("delta", start, position), UpdatePlan("snapshot", start, position)
    sizes = [sum(map(math.prod, plan.shapes(config).values())) for plan in (delta, snapshot)]
    return delta if sizes[0] < sizes[1] else snapshot


@dataclass(frozen=True)
class StateUpdate:
    """A complete update; tensors as `UpdatePlan.shapes`."""

    plan: UpdatePlan
    tensors: Mapping[str, Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Name, layer and tensor of every layer's share."""
        for name, tensor in self.tensors.items():
            for layer, part in enumerate(tensor):
                yield name, layer, part


class UpdateBuilder:
    """Gathers the parts of an update as a pass computes them.

    The layers of one name come in order. `dtype` is that of everything but `ssm`, which is fp32.
    """

    def __init__(
        self, config: TwoTowerConfig, plan: UpdatePlan, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.plan = plan
        self.tensors = {
            name: torch.empty(shape, device=device, dtype=torch.float32 if name == "ssm" else dtype)
            for name, shape in plan.shapes(config).items()
        }
        self._filled = dict.fromkeys(self.tensors, 0)

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Takes one layer's share; names that the plan does not hold are passed over.

        Raises ValueError for a layer out of turn.
        """
        if name not in self.tensors:
            return
        if layer != self._filled[name]:
            raise ValueError(f"{name}: got layer {layer}, expected layer {self._filled[name]}")
        self.tensors[name][layer].copy_(tensor)
        self._filled[name] += 1

    def filled_bytes(self, name: str) -> int:
        """Bytes at the head of a tensor that are final."""
        tensor = self.tensors[name]
        return self._filled[name] * (tensor.nbytes // max(1, tensor.shape[0]))

    @property
    def complete(self) -> bool:
        return all(count == self.tensors[name].shape[0] for name, count in self._filled.items())

    def update(self) -> StateUpdate:
        """The update, once complete."""
        assert self.complete
        return StateUpdate(self.plan, self.tensors)

"""Updates that move a mirror of a row's context state, gathered layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower.towers.config.model_config import ATTENTION, MAMBA, TwoTowerConfig

UpdateKind = Literal["snapshot", "delta", "kv"]


@dataclass(frozen=True)
class UpdatePlan:
    """Kind and tokens of an update, known before the pass that computes it.

    All kinds have K/V of the tokens start..position-1. A snapshot has the Mamba layers' states at
    `position`; a delta has the raw projections of the tokens, which the receiver replays; "kv" has
    K/V alone and leaves the mirror's snapshot where it is.
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

    def layout(self, config: TwoTowerConfig, dtype: torch.dtype) -> dict[str, Tensor]:
        """The update's tensors without memory; all but `ssm`, which is fp32, as `dtype`."""
        return {
            name: torch.empty(shape, dtype=torch.float32 if name == "ssm" else dtype, device="meta")
            for name, shape in self.shapes(config).items()
        }


def plan_update(config: TwoTowerConfig, start: int, position: int) -> UpdatePlan:
    """A delta where it has fewer values than a snapshot, otherwise a snapshot."""
    small = position - start <= most_delta_tokens(config)
    return UpdatePlan("delta" if small else "snapshot", start, position)


def most_delta_tokens(config: TwoTowerConfig) -> int:
    """Most tokens of which a delta has fewer values than a snapshot; -1 without Mamba layers."""
    token = _values(config, UpdatePlan("delta", 0, 1)) - _values(config, UpdatePlan("kv", 0, 1))
    return (_values(config, UpdatePlan("snapshot", 0, 0)) - 1) // token if token else -1


def _values(config: TwoTowerConfig, plan: UpdatePlan) -> int:
    return sum(map(math.prod, plan.shapes(config).values()))


@dataclass(frozen=True)
class StateUpdate:
    """A complete update: of each tensor of `UpdatePlan.shapes` the layers' shares in order."""

    plan: UpdatePlan
    tensors: Mapping[str, Sequence[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(part.nbytes for _, _, part in self.parts())

    def parts(self) -> Iterator[tuple[str, int, Tensor]]:
        """Name, layer and tensor of every layer's share."""
        for name, shares in self.tensors.items():
            for layer, part in enumerate(shares):
                yield name, layer, part


class UpdateBuilder:
    """Gathers the shares of an update as a pass computes them.

    The layers of one name come in order. `dtype` is that of everything but `ssm`, which is fp32.
    With `copy` false a share that is contiguous, on `device` and of the right dtype is kept as it
    is, and must stay unchanged for as long as the update is read.
    """

    def __init__(
        self,
        config: TwoTowerConfig,
        plan: UpdatePlan,
        device: torch.device,
        dtype: torch.dtype,
        *,
        copy: bool = True,
    ) -> None:
        self.plan = plan
        self.layout = plan.layout(config, dtype)
        self._expected = {
            name: (tensor.dtype, tuple(tensor.shape[1:]), len(tensor))
            for name, tensor in self.layout.items()
        }
        self._device = device
        self._copy = copy
        self._shares: dict[str, list[Tensor]] = {name: [] for name in self.layout}

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Takes one layer's share; names that the plan does not hold are passed over.

        Raises ValueError for a layer out of turn or a share of another shape.
        """
        self.keep(name, layer, tensor)

    def keep(self, name: str, layer: int, tensor: Tensor) -> Tensor | None:
        """As `put`; returns the share as it is kept, contiguous, or None if it was passed over."""
        if name not in self._expected:
            return None
        (dtype, shape, count), shares = self._expected[name], self._shares[name]
        if layer != len(shares) or layer >= count:
            raise ValueError(f"{name}: got layer {layer}, expected layer {len(shares)} of {count}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got a share of shape {list(tensor.shape)}, expected {list(shape)}"
            )
        share = tensor.to(self._device, dtype, copy=self._copy).contiguous()
        shares.append(share)
        return share

    @property
    def complete(self) -> bool:
        return all(
            len(self._shares[name]) == count for name, (_, _, count) in self._expected.items()
        )

    def update(self) -> StateUpdate:
        """The update, once complete."""
        assert self.complete
        return StateUpdate(self.plan, self._shares)

"""A row's context state: one snapshot per Mamba layer, a short log after it, and K/V.

The snapshot stands at `position`: SSM states and conv histories after that many tokens. The log
holds the Mamba layers' raw projections of the tokens after it, K/V covers snapshot and log. A
forward pass only appends to log and K/V; `advance` replays the log into the snapshot. The same
class is the denoiser's mirror, which is filled by `apply` and never has a log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.replay import ReplayWeights
from twotower.towers.config import ATTENTION, MAMBA, TwoTowerConfig


@dataclass(frozen=True)
class StateUpdate:
    """What moves a mirror from `start` to `position` tokens, n = position - start.

    `k` and `v` [A, nkv, n, hd] always. A snapshot has `conv` [M, K-1, Cd] and `ssm` [M, H, P, N]
    fp32 at `position`; a delta has the raw projections `xbc` [M, n, Cd] and `dt` [M, n, H] that
    the receiver replays, one tenth of the bytes at 30B shapes and blocks of 16.
    """

    start: int
    position: int
    tensors: dict[str, Tensor]

    @property
    def is_delta(self) -> bool:
        """Whether the receiver has to replay."""
        return "xbc" in self.tensors

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True)
class LayerLog:
    """Raw projections of a Mamba layer: xbc [n, Cd] before the conv, dt [n, H] before softplus."""

    xbc: Tensor
    dt: Tensor


class ContextState:
    """State of one row on one device; K/V room for `capacity` tokens is taken at once."""

    def __init__(
        self, config: TwoTowerConfig, capacity: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        mamba, attention = config.layers_of(MAMBA), config.layers_of(ATTENTION)
        self.capacity = capacity
        self.position = 0
        self.conv = torch.zeros(
            len(mamba), config.conv_kernel - 1, config.conv_dim, device=device, dtype=dtype
        )
        self.ssm = torch.zeros(
            len(mamba),
            config.mamba_num_heads,
            config.mamba_head_dim,
            config.ssm_state_size,
            device=device,
            dtype=torch.float32,
        )
        kv_shape = (len(attention), config.num_key_value_heads, capacity, config.head_dim)
        self.k = torch.empty(kv_shape, device=device, dtype=dtype)
        self.v = torch.empty(kv_shape, device=device, dtype=dtype)
        self._log: list[LayerLog] = []
        self._log_length = 0
        # The part of the log that the last `advance` replayed, and where it began.
        self._replayed: list[LayerLog] = []
        self._replayed_from = 0

    @property
    def length(self) -> int:
        """Tokens that K/V covers: those of the snapshot and those of the log."""
        return self.position + self._log_length

    @property
    def num_bytes(self) -> int:
        """Bytes that the row holds."""
        held = [self.conv, self.ssm, self.k, self.v]
        logs = [*self._log, *self._replayed]
        held += [part for log in logs for part in (log.xbc, log.dt)]
        return sum(tensor.nbytes for tensor in held)

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts one attention layer's K/V [nkv, n, hd] of a pass behind what is there; they count
        once `append` has taken the pass."""
        span = slice(self.length, self.length + k.shape[1])
        self.k[layer, :, span] = k
        self.v[layer, :, span] = v

    def append(self, log: list[LayerLog], count: int) -> None:
        """Takes the log of a pass over `count` tokens, whose K/V the pass has written."""
        assert self._log_length == 0, "the log must be replayed before the next pass"
        assert self.length + count <= self.capacity
        self._log, self._log_length = log, count

    def advance(self, weights: list[ReplayWeights], count: int) -> None:
        """Replays the first `count` tokens of the log into the snapshot."""
        assert 0 <= count <= self._log_length
        if count == 0:
            return
        self._replayed = [LayerLog(log.xbc[:count], log.dt[:count]) for log in self._log]
        self._replayed_from = self.position
        for layer, (log, own) in enumerate(zip(self._replayed, weights, strict=True)):
            dispatch.replay(self.ssm[layer], self.conv[layer], log.xbc, log.dt, own)
        self.position += count
        self._log_length -= count
        self._log = (
            [LayerLog(log.xbc[count:], log.dt[count:]) for log in self._log]
            if self._log_length
            else []
        )

    def export(self, start: int) -> StateUpdate:
        """What a mirror at `start` needs, as views: send or copy it before the next pass.

        A delta if the last `advance` began at `start` and its log is smaller than the snapshot.
        """
        snapshot = self._update(start, {"conv": self.conv, "ssm": self.ssm})
        if not self._replayed or self._replayed_from != start:
            return snapshot
        delta = self._update(
            start,
            {
                "xbc": torch.stack([log.xbc for log in self._replayed]),
                "dt": torch.stack([log.dt for log in self._replayed]),
            },
        )
        self._replayed = []
        return delta if delta.num_bytes < snapshot.num_bytes else snapshot

    def apply(self, update: StateUpdate, weights: Sequence[ReplayWeights] | None = None) -> None:
        """Moves a mirror on by an update; `weights` are the sender's, for deltas.

        Raises ValueError, and changes nothing, if the update does not fit on what is there.
        """
        if update.start != self.position or not update.start <= update.position <= self.capacity:
            raise ValueError(
                f"update: got tokens {update.start}..{update.position}, expected a start at "
                f"{self.position} and an end of at most {self.capacity}"
            )
        if update.is_delta and (weights is None or len(weights) != self.ssm.shape[0]):
            raise ValueError("update: got a delta, expected a snapshot without replay weights")
        self._check_shapes(update)
        span = slice(update.start, update.position)
        self.k[:, :, span] = update.tensors["k"]
        self.v[:, :, span] = update.tensors["v"]
        if update.is_delta:
            assert weights is not None
            xbc = update.tensors["xbc"].to(self.conv.device)
            dt = update.tensors["dt"].to(self.conv.device)
            for layer, own in enumerate(weights):
                dispatch.replay(self.ssm[layer], self.conv[layer], xbc[layer], dt[layer], own)
        else:
            self.conv.copy_(update.tensors["conv"])
            self.ssm.copy_(update.tensors["ssm"])
        self.position = update.position

    def _update(self, start: int, tensors: dict[str, Tensor]) -> StateUpdate:
        span = slice(start, self.position)
        kv = {"k": self.k[:, :, span], "v": self.v[:, :, span]}
        return StateUpdate(start, self.position, {**tensors, **kv})

    def _check_shapes(self, update: StateUpdate) -> None:
        count = update.position - update.start
        attention, kv_heads, _, width = self.k.shape
        mamba, heads = self.ssm.shape[:2]
        expected: dict[str, tuple[int, ...]] = dict.fromkeys(
            ("k", "v"), (attention, kv_heads, count, width)
        )
        if update.is_delta:
            expected |= {"xbc": (mamba, count, self.conv.shape[2]), "dt": (mamba, count, heads)}
        else:
            expected |= {"conv": tuple(self.conv.shape), "ssm": tuple(self.ssm.shape)}
        for name, shape in expected.items():
            source = update.tensors.get(name)
            if source is None or tuple(source.shape) != shape:
                got = "nothing" if source is None else f"shape {list(source.shape)}"
                raise ValueError(f"{name}: got {got}, expected shape {list(shape)}")

"""A row's context state: one snapshot per Mamba layer, a short log after it, and K/V.

The snapshot stands at `position`: SSM states and conv histories after that many tokens. The log
holds the Mamba layers' raw projections of the tokens after it, K/V covers snapshot and log. A
forward pass only appends to log and K/V; `advance` replays the log into the snapshot. The same
class is the denoiser's mirror, which is filled by `apply` and never has a log; its K/V may run
ahead of its snapshot while a prompt is still being read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.attention import KeyValuePages
from twotower.kernels.replay import ReplayWeights
from twotower.towers.update import StateUpdate, UpdateKind, UpdatePlan, plan_update

if TYPE_CHECKING:
    from twotower.towers.memory import StatePool
    from twotower.towers.protocols import LayerSink


@dataclass(frozen=True)
class LayerLog:
    """Raw projections of a Mamba layer: xbc [n, Cd] before the conv, dt [n, H] before softplus."""

    xbc: Tensor
    dt: Tensor


class ContextState:
    """State of one row in a pool: a slot, `conv` [M, K-1, Cd] and `ssm` [M, H, P, N] fp32, and
    pages of K/V for `capacity` tokens. `length` tokens are covered by K/V: those of the snapshot
    and those of the log. Made by `StatePool.open`, given back by `release`."""

    def __init__(self, pool: StatePool, slot: int, pages: list[int], capacity: int) -> None:
        self.capacity = capacity
        self.position = 0
        self.length = 0
        self.pages = pages
        self.conv = pool.conv[slot].zero_()
        self.ssm = pool.ssm[slot].zero_()
        self._pool = pool
        self._slot = slot
        self._released = False
        self._log: list[LayerLog] = []
        # The part of the log that the last `advance` replayed, for a delta, and where it began.
        self._replayed: list[LayerLog] = []
        self._replayed_from = 0

    @property
    def num_bytes(self) -> int:
        """Bytes that the row holds: its slot, its pages, shared or not, and its log."""
        logs = [*self._log, *self._replayed]
        held = [self.conv, self.ssm, *(part for log in logs for part in (log.xbc, log.dt))]
        pages = len(self.pages) * self._pool.page_bytes
        return pages + sum(tensor.nbytes for tensor in held)

    def context_kv(self, layer: int, seen: int) -> KeyValuePages:
        """An attention layer's K/V of the first `seen` tokens, where they stand."""
        return self._pool.layer_kv(layer, self.pages, seen)

    def kv(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """An attention layer's K and V of tokens start..stop-1, [nkv, n, hd] each; views where
        the tokens' pages are neighbours."""
        k, v = self._gather(start, stop)
        return k[layer], v[layer]

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts one attention layer's K/V [nkv, n, hd] of a pass behind what is there; they count
        once `append` has taken the pass."""
        assert not self._released
        self._write(layer, k, v)

    def append(self, log: list[LayerLog], count: int) -> None:
        """Takes the log of a pass over `count` tokens, whose K/V the pass has written."""
        assert self.length == self.position, "the log must be replayed before the next pass"
        assert self.length + count <= self.capacity
        self._log, self._replayed = log, []
        self.length += count

    def advance(
        self, weights: Sequence[ReplayWeights], count: int, sink: LayerSink | None = None
    ) -> None:
        """Replays the first `count` tokens of the log into the snapshot.

        `sink` takes each layer's new `conv` and `ssm` before the next layer is replayed.
        """
        assert not self._released
        assert 0 <= count <= self.length - self.position
        done = [LayerLog(log.xbc[:count], log.dt[:count]) for log in self._log if count]
        for layer, own in enumerate(weights):
            if done:
                xbc, dt = done[layer].xbc, done[layer].dt
                dispatch.replay(self.ssm[layer], self.conv[layer], xbc, dt, own)
            if sink is not None:
                sink.put("conv", layer, self.conv[layer])
                sink.put("ssm", layer, self.ssm[layer])
        if not count:
            return
        plan = plan_update(self._pool.config, self.position, self.position + count)
        # What a sink took needs no export; kept otherwise only where it may become a delta.
        self._replayed = done if sink is None and plan.kind == "delta" else []
        self._replayed_from = self.position
        self.position += count
        rest = self.length - self.position
        self._log = [LayerLog(log.xbc[count:], log.dt[count:]) for log in self._log if rest]

    def truncate(self) -> None:
        """Drops what is left of the log, and K/V behind `position`."""
        self._log = []
        self.length = self.position

    def export(self, start: int) -> StateUpdate:
        """What a mirror at `start` needs, partly as views: send or copy it before the next pass.

        A delta if the last `advance` began at `start` and its log is smaller than the snapshot.
        """
        k, v = self._gather(start, self.position)
        held = {"conv": self.conv, "ssm": self.ssm, "k": k, "v": v}
        tensors = {name: list(tensor) for name, tensor in held.items()}
        kind: UpdateKind = "snapshot"
        if self._replayed and self._replayed_from == start:
            kind = "delta"
            tensors["xbc"] = [log.xbc for log in self._replayed]
            tensors["dt"] = [log.dt for log in self._replayed]
            self._replayed = []
        plan = UpdatePlan(kind, start, self.position)
        return StateUpdate(plan, {name: tensors[name] for name in plan.shapes(self._pool.config)})

    def apply(self, update: StateUpdate, weights: Sequence[ReplayWeights] | None = None) -> None:
        """Moves a mirror on by an update; `weights` are the sender's, for deltas.

        Raises ValueError, and changes nothing, if the update does not fit on what is there.
        """
        self._check_order(update.plan)
        self._check_shapes(update)
        delta = update.plan.kind == "delta"
        if delta and (weights is None or len(weights) != self.ssm.shape[0]):
            raise ValueError("update: got a delta, expected a snapshot without replay weights")
        tensors = {name: self._moved(shares) for name, shares in update.tensors.items()}
        for layer, (k, v) in enumerate(
            zip(tensors.get("k", ()), tensors.get("v", ()), strict=True)
        ):
            self._write(layer, k, v)
        if delta:
            for layer, own in enumerate(weights or ()):
                xbc, dt = tensors["xbc"][layer], tensors["dt"][layer]
                dispatch.replay(self.ssm[layer], self.conv[layer], xbc, dt, own)
        elif "ssm" in tensors:
            for layer in range(len(self.ssm)):
                self.conv[layer].copy_(tensors["conv"][layer])
                self.ssm[layer].copy_(tensors["ssm"][layer])
        self.length = update.plan.position
        if update.plan.kind != "kv":
            self.position = self.length

    def restore(self, conv: Tensor, ssm: Tensor, pages: Sequence[int], position: int) -> None:
        """Starts an empty state from a snapshot at `position`, whose K/V stand in `pages`.

        Full pages become shared, and the state's own in their places go back to the pool; a partly
        filled one is copied. Raises ValueError if the state is not empty or too small.
        """
        if self.length or position > self.capacity:
            raise ValueError(
                f"position: got {position}, expected at most the capacity {self.capacity} of a "
                f"state that holds no tokens, not {self.length}"
            )
        full, rest = divmod(position, self._pool.page_tokens)
        self._pool.pages.share(pages[:full])
        self._pool.pages.free(self.pages[:full])
        self.pages[:full] = pages[:full]
        if rest:
            self._pool.copy_page(pages[full], self.pages[full], rest)
        self.conv.copy_(conv)
        self.ssm.copy_(ssm)
        self.position = self.length = position

    def release(self) -> None:
        """Gives slot and pages back to the pool; a second time it does nothing.

        Not while a pass still reads or writes the state: the next row may get its memory.
        """
        if self._released:
            return
        self._released = True
        self._log, self._replayed = [], []
        self._pool.slots.free(self._slot)
        self._pool.pages.free(self.pages)

    def _gather(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of tokens start..stop-1 in all layers, [A, nkv, n, hd] each."""
        runs = self._pool.runs(self.pages, start, stop) or [slice(0, 0)]
        k, v = ([held[:, :, run] for run in runs] for held in (self._pool.k, self._pool.v))
        return (k[0], v[0]) if len(runs) == 1 else (torch.cat(k, dim=2), torch.cat(v, dim=2))

    def _moved(self, shares: Sequence[Tensor]) -> Sequence[Tensor]:
        """Layers' shares on the state's device."""
        if all(share.device == self.conv.device for share in shares):
            return shares
        # One transfer: each layer's own would cost more in launches than in bytes.
        return list(torch.stack(list(shares)).to(self.conv.device))

    def _write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts one attention layer's K/V [nkv, n, hd] behind what is there."""
        at, end = 0, self.length + k.shape[-2]
        for run in self._pool.runs(self.pages, self.length, end):
            part = slice(at, at + run.stop - run.start)
            self._pool.k[layer, :, run] = k[:, part]
            self._pool.v[layer, :, run] = v[:, part]
            at = part.stop

    def _check_order(self, plan: UpdatePlan) -> None:
        if plan.start != self.length or not plan.start <= plan.position <= self.capacity:
            raise ValueError(
                f"update: got tokens {plan.start}..{plan.position}, expected a start at "
                f"{self.length} and an end of at most {self.capacity}"
            )
        if plan.kind == "delta" and plan.start != self.position:
            raise ValueError(
                f"update: got a delta from token {plan.start}, expected a start at the snapshot, "
                f"which stands at {self.position}"
            )

    def _check_shapes(self, update: StateUpdate) -> None:
        expected = update.plan.shapes(self._pool.config)
        for name in update.tensors:
            if name not in expected:
                raise ValueError(f"{name}: got a tensor, expected none in a {update.plan.kind}")
        for name, shape in expected.items():
            shares = update.tensors.get(name)
            if shares is None:
                raise ValueError(f"{name}: got nothing, expected shape {list(shape)}")
            got = [list(share.shape) for share in shares]
            if got != [list(shape[1:])] * shape[0]:
                raise ValueError(f"{name}: got layers of shapes {got}, expected {list(shape)}")

"""A row's context state: a snapshot per Mamba layer, a short log after it, and K/V.

The snapshot stands at `position`: SSM states and conv histories after that many tokens. The log
holds the Mamba layers' raw projections of the tokens after it, K/V covers snapshot and log. A
forward pass only appends to log and K/V; `advance` replays the log into the snapshot. The same
class is the denoiser's mirror, which is filled by `apply` and never has a log; its K/V may run
ahead of its snapshot while a prompt is still being read. Where a mirror follows (`follow`), what
has been replayed since is kept apart until it is sent.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower.kernels.replay import ReplayWeights
from twotower.kernels.rows import Rows
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.tensors import StateTensors
from twotower.towers.state.unsent_log import UnsentLog
from twotower.towers.state.update import StateUpdate, UpdatePlan


class ContextState:
    """State of a row in a pool: a slot, `conv` [M, K-1, Cd] and `ssm` [M, H, P, N] fp32, and
    pages of K/V for `capacity` tokens. `length` tokens are covered by K/V: those of the snapshot
    and those of the log. Made by `StatePool.open`, given back by `release`."""

    def __init__(self, pool: StateTensors, slot: int, pages: list[int], capacity: int) -> None:
        self.capacity = capacity
        self.position = 0
        self.length = 0
        self.pages = pages
        self.conv = pool.conv[slot].zero_()
        self.ssm = pool.ssm[slot].zero_()
        self.pool = pool
        self.slot = slot
        self._released = False
        self._log: PassLog | None = None
        # What has been replayed and the mirror lacks; None where no mirror follows.
        self._unsent: UnsentLog | None = None
        pool.write_pages(slot, pages)

    @property
    def num_bytes(self) -> int:
        """Bytes that the row holds: its slot, its pages, shared or not, and its logs."""
        log = 0 if self._log is None else self._log.num_bytes
        unsent = 0 if self._unsent is None else self._unsent.num_bytes
        slot = self.conv.nbytes + self.ssm.nbytes
        return len(self.pages) * self.pool.page_bytes + slot + log + unsent

    def kv(self, layer: int, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """An attention layer's K and V of tokens start..stop-1, [nkv, n, hd] each; views where
        the tokens' pages are neighbours."""
        k, v = self.kv_layers(start, stop)
        return k[layer], v[layer]

    def kv_layers(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """K and V of all A attention layers, [A, nkv, n, hd] each; views where `kv` gives views."""
        runs = self.pool.runs(self.pages, start, stop) or [slice(0, 0)]
        k, v = ([held[:, :, run] for run in runs] for held in (self.pool.k, self.pool.v))
        return (k[0], v[0]) if len(runs) == 1 else (torch.cat(k, dim=2), torch.cat(v, dim=2))

    def write_kv(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Puts one attention layer's K/V [nkv, n, hd] behind what is there; they count once
        `append` has taken the tokens."""
        assert not self._released
        at, end = 0, self.length + k.shape[-2]
        for run in self.pool.runs(self.pages, self.length, end):
            part = slice(at, at + run.stop - run.start)
            self.pool.k[layer, :, run] = k[:, part]
            self.pool.v[layer, :, run] = v[:, part]
            at = part.stop

    def append(self, log: PassLog | None, count: int) -> None:
        """Takes the log of a pass over `count` tokens, None without Mamba layers; the pass has
        written their K/V."""
        assert not self._released
        assert self.length == self.position, "the log must be replayed before the next pass"
        assert self.length + count <= self.capacity
        self._log = log
        self.length += count

    def advance(self, weights: ReplayWeights | None, count: int) -> None:
        """Replays the first `count` tokens of the log into the snapshot."""
        assert 0 <= count <= self.length - self.position
        if self._log is not None and weights is not None and count:
            self._replay(self._log, weights, count)
        self.advanced(count)

    def advanced(self, count: int, *, exported: bool = False) -> None:
        """Moves `position` after a replay of the first `count` tokens of the log.

        With `exported` a link has these tokens already. Otherwise a copy of their log is kept if a
        mirror follows.
        """
        assert not self._released
        if not count:
            return
        log = self._log
        self._keep(log, count, exported)
        self.position += count
        rest = self.length - self.position
        self._log = log.part(count, count + rest).copy() if log is not None and rest else None

    def stepped(
        self, count: int = 1, log: PassLog | None = None, *, exported: bool = False
    ) -> None:
        """Moves `position` and `length` after a pass read `count` tokens into K/V and snapshot;
        `log` is its log of them, which is needed if the state `keeps_log`. `exported` as above."""
        assert not self._released
        assert self.length == self.position
        assert self.length + count <= self.capacity
        self._keep(log, count, exported)
        self.length = self.position = self.length + count

    def follow(self, *, takes_shares: bool = True) -> None:
        """Tells that a mirror stands where the snapshot stands: if its link takes shares, the log
        of what is replayed from now on is kept for the next update, as long as that is smaller
        than a snapshot."""
        self._unsent = UnsentLog(self.pool.config, self.position) if takes_shares else None

    @property
    def keeps_log(self) -> bool:
        """True if the log of the next tokens is kept for a mirror."""
        return self._unsent is not None and self._unsent.kept

    def own_log(self) -> None:
        """Copies the log out of the pass that it is a part of, to be kept."""
        if self._log is not None:
            self._log = self._log.copy()

    def truncate(self) -> None:
        """Drops what is left of the log, and K/V behind `position`."""
        self._log = None
        self.length = self.position

    def plan(self, start: int) -> UpdatePlan:
        """The update that `export` gives for a mirror at `start`: a delta if the log is kept from
        there on, and has tokens."""
        unsent = self._unsent
        delta = unsent is not None and unsent.kept and unsent.start == start < self.position
        return UpdatePlan("delta" if delta else "snapshot", start, self.position)

    def export(self, start: int) -> StateUpdate:
        """The update for a mirror at `start`, partly views: send or copy it before the next
        pass, and then say `follow`."""
        plan, (k, v) = self.plan(start), self.kv_layers(start, self.position)
        tensors = {"conv": self.conv, "ssm": self.ssm, "k": k, "v": v}
        if plan.kind == "delta":
            assert self._unsent is not None
            log = self._unsent.whole()
            tensors |= {"xbc": log.xbc, "dt": log.dt}
        shapes = plan.shapes(self.pool.config)
        return StateUpdate(plan, {name: list(tensors[name]) for name in shapes})

    def apply(self, update: StateUpdate, weights: ReplayWeights | None = None) -> None:
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
            self.write_kv(layer, k, v)
        if delta:
            assert weights is not None
            log = PassLog(torch.stack(list(tensors["xbc"])), torch.stack(list(tensors["dt"])))
            self._replay(log, weights, update.plan.count)
        elif "ssm" in tensors:
            for layer in range(len(self.ssm)):
                self.conv[layer].copy_(tensors["conv"][layer])
                self.ssm[layer].copy_(tensors["ssm"][layer])
        self.length = update.plan.position
        if update.plan.kind != "kv":
            self.position = self.length

    def restore(self, conv: Tensor, ssm: Tensor, pages: Sequence[int], position: int) -> None:
        """Starts an empty state from a snapshot at `position`, whose K/V stand in `pages`.

        Full pages become shared, and the state's pages in their place go back to the pool; a partly
        filled page is copied. Raises ValueError if the state is not empty or too small.
        """
        if self.length or position > self.capacity:
            raise ValueError(
                f"position: got {position}, expected at most the capacity {self.capacity} of a "
                f"state that holds no tokens, not {self.length}"
            )
        full, rest = divmod(position, self.pool.page_tokens)
        self.pool.pages.share(pages[:full])
        self.pool.pages.free(self.pages[:full])
        self.pages[:full] = pages[:full]
        self.pool.write_pages(self.slot, self.pages)
        if rest:
            self.pool.copy_page(pages[full], self.pages[full], rest)
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
        self._log = self._unsent = None
        self.pool.slots.free(self.slot)
        self.pool.pages.free(self.pages)

    def _keep(self, log: PassLog | None, count: int, exported: bool) -> None:
        """Keeps the next `count` tokens' log for the mirror that follows, if there is one. What
        was exported it gets elsewhere, and says so by `follow`."""
        if exported:
            self._unsent = None
        elif self._unsent is not None:
            self._unsent.add(log, count)

    def _replay(self, log: PassLog, weights: ReplayWeights, count: int) -> None:
        """Moves the snapshot over the first `count` tokens of a log of this row alone."""
        rows = rows_of([self], [log.xbc.shape[1]], [0])
        counts = torch.tensor([count], dtype=torch.int32, device=self.conv.device)
        log.replay(self.pool, weights, rows, counts)

    def _moved(self, shares: Sequence[Tensor]) -> Sequence[Tensor]:
        """Layers' shares on the state's device."""
        if all(share.device == self.conv.device for share in shares):
            return shares
        # One transfer: a transfer for each layer would cost more in launches than in bytes.
        return list(torch.stack(list(shares)).to(self.conv.device))

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
        expected = update.plan.shapes(self.pool.config)
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


def rows_of(
    states: Sequence[ContextState], lengths: Sequence[int], context_lens: Sequence[int]
) -> Rows:
    """The rows of a pass over `lengths` new tokens of each state, of whose context attention sees
    `context_lens` tokens. All states live in one pool."""
    pool = states[0].pool
    assert all(state.pool is pool for state in states), "states of one pass share a pool"
    slots = [state.slot for state in states]
    return Rows.build(lengths, slots, context_lens, pool.page_table, pool.page_tokens)

"""The log of a pass: raw projections of the Mamba layers, and their replay into snapshots."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from twotower.kernels import dispatch
from twotower.kernels.replay import ReplayWeights
from twotower.kernels.rows import Rows
from twotower.towers.state.tensors import StateTensors

_ALL_LAYERS = slice(None)


@dataclass(frozen=True)
class PassLog:
    """Raw projections of all M Mamba layers over T tokens: xbc [M, T, Cd] before the conv, dt
    [M, T, H] before softplus. Where they are views of whole projections, z before them, these are
    `projected` [M, T, Di + Cd + H], into which a pass may write."""

    xbc: Tensor
    dt: Tensor
    projected: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of xbc and dt."""
        return self.xbc.nbytes + self.dt.nbytes

    def part(self, start: int, stop: int) -> PassLog:
        """Tokens start..stop-1, views."""
        whole = None if self.projected is None else self.projected[:, start:stop]
        return PassLog(self.xbc[:, start:stop], self.dt[:, start:stop], whole)

    def copy(self) -> PassLog:
        """A copy: views would keep the whole pass's projections alive."""
        return PassLog(self.xbc.clone(), self.dt.clone())

    def replay(
        self,
        pool: StateTensors,
        weights: ReplayWeights,
        rows: Rows,
        counts: Tensor,
        layers: slice = _ALL_LAYERS,
    ) -> None:
        """Moves the snapshots of `rows` in `pool` over the first counts[row] (int32 [B]) of each
        row's tokens, for a run of the Mamba layers. `rows` are those of the pass."""
        dispatch.replay(
            pool.ssm[:, layers],
            pool.conv[:, layers],
            self.xbc[layers],
            self.dt[layers],
            weights.layers(layers),
            rows,
            counts,
        )

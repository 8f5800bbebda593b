"""The link between towers of one process: a reference, or a copy to the other device."""

from __future__ import annotations

from torch import Tensor

from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.errors import UnavailableError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.update import UpdateBuilder, UpdatePlan


class LocalLink:
    """Hands states to a denoiser engine in the same process and event loop; fulfils `StateLink`.

    `shared` towers read one copy of a state; otherwise the denoiser's mirrors follow `context`.
    """

    def __init__(self, context: ContextTower, denoiser: DenoiserEngine, shared: bool) -> None:
        self._tower = context
        self._denoiser = denoiser
        self._shared = shared
        self._rows: dict[str, _LocalWriter | None] = {}
        if not shared:
            denoiser.follow(context.replay_tensors())

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        self._rows[row_id] = None

    def forget(self, row_id: str) -> None:
        """Stops to carry a row and gives up an unfinished update; an unknown row is fine."""
        writer = self._rows.pop(row_id, None)
        if writer is not None:
            writer.abort()

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        """Starts the row's next update; the update of a row that is not open goes nowhere.

        Raises ValueError if the update before it has not finished.
        """
        last = self._rows.get(row_id)
        if last is not None and not last.ended:
            raise ValueError(f"row {row_id!r}: got a new update before the last one has finished")
        builder = None if self._shared else self._builder(plan)
        writer = _LocalWriter(self._denoiser, row_id, state, builder)
        if row_id in self._rows:
            self._rows[row_id] = writer
        else:
            writer.abort()
        return writer

    def _builder(self, plan: UpdatePlan) -> UpdateBuilder:
        tower, device = self._tower, self._denoiser.tower.device
        return UpdateBuilder(tower.config, plan, device, tower.dtype)


class _LocalWriter:
    """An update of a row: with a builder its shares are gathered on the denoiser's device, without
    the denoiser reads the state itself once it has the update's tokens."""

    def __init__(
        self,
        denoiser: DenoiserEngine,
        row_id: str,
        state: ContextState,
        builder: UpdateBuilder | None,
    ) -> None:
        self.takes_shares = builder is not None
        self.ended = False
        self._denoiser = denoiser
        self._row_id = row_id
        self._state = state
        self._builder = builder

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        if self._builder is not None and not self.ended:
            self._builder.put(name, layer, tensor)

    async def finish(self) -> None:
        if self.ended:
            return
        if self._builder is not None and not self._builder.complete:
            raise ValueError(f"row {self._row_id!r}: got an update that lacks shares")
        self.ended = True
        if self._builder is None:
            self._denoiser.adopt(self._row_id, self._state)
            return
        try:
            self._denoiser.receive(self._row_id, self._builder.update())
        except ValueError as error:
            raise UnavailableError(f"the denoiser tower refused an update: {error}") from None

    def abort(self) -> None:
        self.ended = True

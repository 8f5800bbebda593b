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
        self._rows: dict[str, _Copy | _Adoption | None] = {}
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
        """Starts the row's next update; one of a row that is not open is passed over.

        Raises ValueError if the one before it has not finished.
        """
        last = self._rows.get(row_id)
        if last is not None and not last.ended:
            raise ValueError(f"row {row_id!r}: got a new update before the last one has finished")
        writer = (
            _Adoption(self._denoiser, row_id, state)
            if self._shared
            else _Copy(self._denoiser, row_id, self._builder(plan))
        )
        if row_id in self._rows:
            self._rows[row_id] = writer
        else:
            writer.abort()
        return writer

    def _builder(self, plan: UpdatePlan) -> UpdateBuilder:
        tower, device = self._tower, self._denoiser.tower.device
        return UpdateBuilder(tower.config, plan, device, tower.dtype)


class _Adoption:
    """Lets the denoiser read the state itself once it has the update's tokens."""

    takes_shares = False

    def __init__(self, denoiser: DenoiserEngine, row_id: str, state: ContextState) -> None:
        self._denoiser = denoiser
        self._row_id = row_id
        self._state = state
        self.ended = False

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """The state has it already."""

    async def finish(self) -> None:
        if not self.ended:
            self.ended = True
            self._denoiser.adopt(self._row_id, self._state)

    def abort(self) -> None:
        self.ended = True


class _Copy:
    """Gathers an update on the denoiser's device."""

    takes_shares = True

    def __init__(self, denoiser: DenoiserEngine, row_id: str, builder: UpdateBuilder) -> None:
        self._denoiser = denoiser
        self._row_id = row_id
        self._builder = builder
        self.ended = False

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        if not self.ended:
            self._builder.put(name, layer, tensor)

    async def finish(self) -> None:
        if self.ended:
            return
        if not self._builder.complete:
            raise ValueError(f"row {self._row_id!r}: got an update that lacks shares")
        self.ended = True
        try:
            self._denoiser.receive(self._row_id, self._builder.update())
        except ValueError as error:
            raise UnavailableError(f"the denoiser tower refused an update: {error}") from None

    def abort(self) -> None:
        self.ended = True

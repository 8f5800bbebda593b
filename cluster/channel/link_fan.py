"""The context tower's links to its denoiser towers: each row's state goes to one of them.

A link may break and be replaced while rows run. Updates that cannot be delivered are dropped, and
the row is marked: its context state goes on, and its mirror is sent whole once the row has been
moved to a link that works.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from twotower.towers.errors import UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.update import UpdatePlan


class Link(StateLink, Protocol):
    """A link to one denoiser tower, which may break."""

    def check(self) -> None:
        """Raises UnavailableError once the link is broken."""

    async def close(self) -> None:
        """Ends the link; updates on the way fail."""


class LinkFan:
    """Fulfils `StateLink` for all rows; a row that was not assigned goes over link 0."""

    def __init__(self) -> None:
        self._links: dict[int, Link] = {}
        self._index: dict[str, int] = {}
        self._lost: set[str] = set()

    async def connect(self, index: int, link: Link) -> None:
        """Puts a link in place; the one before it ends, and its rows are lost until moved."""
        last = self._links.get(index)
        self._links[index] = link
        if last is not None:
            self._lost |= {row_id for row_id, own in self._index.items() if own == index}
            await last.close()

    def broken(self) -> list[int]:
        """Links that do not work any more."""
        return [index for index, link in self._links.items() if _is_broken(link)]

    def assign(self, row_id: str, index: int) -> None:
        """Which link a row that is about to be opened will take."""
        self._index[row_id] = index

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        index = self._index.setdefault(row_id, 0)
        self._links[index].open(row_id)

    def move(self, row_id: str, index: int) -> None:
        """Carries a row over another link from now on, or over its own as if it were new."""
        self._links[self._index[row_id]].forget(row_id)
        self._index[row_id] = index
        self._links[index].open(row_id)
        self._lost.discard(row_id)

    def forget(self, row_id: str) -> None:
        """Stops to carry a row; an unknown row is fine."""
        index = self._index.pop(row_id, None)
        self._lost.discard(row_id)
        if index is not None:
            self._links[index].forget(row_id)

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        """Starts the row's next update; a lost row's goes nowhere."""
        link = self._links[self._index.get(row_id, 0)]
        if row_id in self._lost or _is_broken(link):
            self.lose(row_id)
            return _Nowhere()
        return _Forgiving(self, row_id, link.begin(row_id, state, plan))

    def lose(self, row_id: str) -> None:
        """Takes note that the row's mirror has missed an update."""
        if row_id in self._index:
            self._lost.add(row_id)

    async def close(self) -> None:
        """Ends all links."""
        for link in self._links.values():
            await link.close()


def _is_broken(link: Link) -> bool:
    try:
        link.check()
    except UnavailableError:
        return True
    return False


class _Nowhere:
    """An update that nobody will get."""

    takes_shares = False

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Dropped."""

    async def finish(self) -> None:
        """At once."""

    def abort(self) -> None:
        """Nothing to give up."""


class _Forgiving:
    """An update whose failure loses the mirror and not the row."""

    def __init__(self, fan: LinkFan, row_id: str, writer: UpdateWriter) -> None:
        self.takes_shares = writer.takes_shares
        self._fan = fan
        self._row_id = row_id
        self._writer = writer

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self._writer.put(name, layer, tensor)

    async def finish(self) -> None:
        try:
            await self._writer.finish()
        except UnavailableError:
            self._fan.lose(self._row_id)

    def abort(self) -> None:
        self._writer.abort()

"""The context tower's links to its denoiser towers: each row's state goes to one of them.

A link may break and be replaced while rows run. Updates that cannot be delivered are dropped, and
the row is marked: its context state goes on, and its mirror is sent whole once the row has been
moved to a link that works.
"""

from __future__ import annotations

from collections import Counter
from typing import Protocol

from torch import Tensor

from twotower.cluster.topology import Transport
from twotower.towers.errors import UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.update import UpdatePlan


class Link(StateLink, Protocol):
    """A link to one denoiser tower, which may break; `transport` carries its bytes."""

    transport: Transport

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
            self._lost |= {
                row_id for row_id, link_index in self._index.items() if link_index == index
            }
            await last.close()

    @property
    def connected(self) -> bool:
        """True once there is a link."""
        return bool(self._links)

    def broken(self) -> list[int]:
        """Indices of the links that do not work any more."""
        return [index for index, link in self._links.items() if _is_broken(link)]

    def transports(self) -> Counter[Transport]:
        """How many links there are of each transport."""
        return Counter(link.transport for link in self._links.values())

    def assign(self, row_id: str, index: int) -> None:
        """Sets the link of a row that is about to be opened."""
        self._index[row_id] = index

    def open(self, row_id: str) -> None:
        """Starts to carry a row."""
        index = self._index.setdefault(row_id, 0)
        self._links[index].open(row_id)

    def move(self, row_id: str, index: int) -> None:
        """Carries a row over another link from now on, or over the same one as if it were new."""
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
        """Starts the row's next update; that of a lost row is dropped."""
        link = self._links[self._index.get(row_id, 0)]
        if row_id in self._lost or _is_broken(link):
            self.lose(row_id)
            return _DroppingWriter()
        return _ForgivingWriter(self, row_id, link.begin(row_id, state, plan))

    def lose(self, row_id: str) -> None:
        """Notes that the row's mirror has missed an update."""
        if row_id in self._index:
            self._lost.add(row_id)

    async def close(self) -> None:
        """Closes every link."""
        for link in self._links.values():
            await link.close()


def _is_broken(link: Link) -> bool:
    try:
        link.check()
    except UnavailableError:
        return True
    return False


class _DroppingWriter:
    """A no-op writer, for the update of a lost row."""

    takes_shares = False

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        """Drops the share."""

    async def finish(self) -> None:
        """Returns at once."""

    def abort(self) -> None:
        """Does nothing."""


class _ForgivingWriter:
    """A writer whose failure loses the row's mirror and not the row."""

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

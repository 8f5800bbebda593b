"""The passes that read a row, and the K/V that is sent while later passes compute."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress

from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import StateLink, UpdateWriter
from twotower.towers.state.update import UpdatePlan


def prefill_pieces(
    prompt: Sequence[int],
    generated: Sequence[int],
    params: GenerationParams,
    chunk: int,
) -> list[list[int]]:
    """The passes that read a row: its prompt on a grid of `chunk`, then what was generated in the
    units in which it was committed.

    The last token of a mock_ar row is a pass by itself. The last generated token of a verified
    row is not read: it is the head of the next draft.
    """
    tokens = list(prompt)
    unit = 1 if params.traits.unit == "token" else params.block_size
    tail = [tokens.pop()] if params.traits.holds_prompt_end else []
    pieces = [tokens[i : i + chunk] for i in range(0, len(tokens), chunk)]
    if tail:
        pieces.append(tail)
    read = generated[:-1] if params.traits.holds_output_end else generated
    pieces += [list(read[i : i + unit]) for i in range(0, len(read), unit)]
    return pieces


async def send_state(writer: UpdateWriter, state: ContextState, start: int) -> None:
    """Sends the update of a mirror at `start` to where the state stands: its `plan` from there."""
    try:
        if writer.takes_shares:
            for name, layer, part in state.export(start).parts():
                writer.put(name, layer, part)
        await writer.finish()
    finally:
        writer.abort()


class KvFeed:
    """Sends K/V of a prompt's earlier pieces while later ones are read, one update at a time."""

    def __init__(self, link: StateLink, row_id: str, state: ContextState) -> None:
        self.sent = 0
        self._link = link
        self._row_id = row_id
        self._state = state
        self._sending: asyncio.Task[None] | None = None

    def push(self) -> None:
        """Starts to send what was read since, unless an update is on its way."""
        if self._sending is None or self._sending.done():
            self._raise_failure()
            self._sending = asyncio.ensure_future(self._send(self._state.position))

    async def flush(self) -> None:
        """Waits until K/V of all tokens read so far are sent."""
        if self._sending is not None:
            await self._sending
        if self.sent < self._state.position:
            await self._send(self._state.position)

    async def close(self) -> None:
        """Stops; an update on its way is given up."""
        if self._sending is not None:
            self._sending.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await self._sending

    async def _send(self, position: int) -> None:
        plan = UpdatePlan("kv", self.sent, position)
        writer = self._link.begin(self._row_id, self._state, plan)
        try:
            k, v = self._state.kv_layers(self.sent, position)
            for layer in range(len(k)):
                writer.put("k", layer, k[layer])
                writer.put("v", layer, v[layer])
            await writer.finish()
        finally:
            writer.abort()
        self.sent = position

    def _raise_failure(self) -> None:
        if self._sending is not None:
            self._sending.result()

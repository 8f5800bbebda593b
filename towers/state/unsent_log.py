"""The log of the tokens that a mirror of a row's context state lacks."""

from __future__ import annotations

import torch

from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.state.pass_log import PassLog
from twotower.towers.state.update import most_delta_tokens


class UnsentLog:
    """Copies of the log of the tokens from `start`, where the mirror stands, up to `position`.

    They become one delta, however many passes have read the tokens. Once a snapshot would be
    smaller they are dropped: `kept` is false then, and stays so.
    """

    def __init__(self, config: TwoTowerConfig, start: int) -> None:
        self.start = start
        self.position = start
        self.kept = True
        self._most = most_delta_tokens(config)
        self._parts: list[PassLog] = []

    @property
    def num_bytes(self) -> int:
        """Bytes of the copies."""
        return sum(part.num_bytes for part in self._parts)

    def add(self, log: PassLog | None, count: int) -> None:
        """Takes the first `count` tokens of a pass's log, which are the next; None: they are not
        to be had."""
        if not self.kept or not count:
            return
        self.position += count
        if log is None or self.position - self.start > self._most:
            self.kept, self._parts = False, []
        else:
            self._parts.append(log.part(0, count).copy())

    def whole(self) -> PassLog:
        """The log from `start` to `position`, of at least one token; only while it is kept."""
        assert self.kept
        if len(self._parts) > 1:
            xbc = torch.cat([part.xbc for part in self._parts], dim=1)
            dt = torch.cat([part.dt for part in self._parts], dim=1)
            self._parts = [PassLog(xbc, dt)]
        return self._parts[0]

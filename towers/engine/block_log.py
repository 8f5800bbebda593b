"""The log into which passes over blocks and drafts project, one for all programs of a tower."""

from __future__ import annotations

from twotower.towers.model.context_tower import ContextTower
from twotower.towers.state.pass_log import PassLog


class BlockLog:
    """The whole log of a context tower's passes over fixed buffers, no two of which run at a time.

    It is as large as the largest pass: a log for each program would be gigabytes. It grows in
    powers of two, and those that older programs keep are together less than the last.
    """

    def __init__(self, tower: ContextTower) -> None:
        self._tower = tower
        self._tokens = 0
        self._log: PassLog | None = None

    def part(self, tokens: int, most: int) -> PassLog | None:
        """The log's first `tokens` tokens, None without Mamba layers. Where it must grow it gets
        room for `most`, if that is more."""
        if tokens > self._tokens:
            self._tokens = 1 << (max(tokens, most) - 1).bit_length()
            self._log = self._tower.new_log(self._tokens, whole=True)
        return None if self._log is None else self._log.part(0, tokens)

"""Runs single rows through real engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower.towers.context import ContextTower
from twotower.towers.denoiser import DenoiserTower
from twotower.towers.engine import ContextEngine, DenoiserEngine
from twotower.towers.generation import generate_blocks
from twotower.towers.link import LocalLink
from twotower.towers.params import GenerationParams
from twotower.towers.protocols import Block


@dataclass(frozen=True)
class Pair:
    """Both engines of one process."""

    context: ContextEngine
    denoiser: DenoiserEngine

    @classmethod
    def of(
        cls,
        context: ContextTower,
        denoiser: DenoiserTower,
        *,
        shared: bool = True,
        threaded: bool = False,
    ) -> Pair:
        reader = DenoiserEngine(denoiser, threaded=threaded)
        link = LocalLink(context, reader, shared)
        return cls(ContextEngine(context, link, threaded=threaded), reader)

    async def blocks(
        self,
        row_id: str,
        prompt: Sequence[int],
        params: GenerationParams,
        generated: Sequence[int] = (),
    ) -> list[Block]:
        """All blocks of a row."""
        rows = generate_blocks(self.context, self.denoiser, row_id, prompt, params, generated)
        return [block async for block in rows]

    def assert_empty(self) -> None:
        """No row, no waiting work and no byte of state is left on either side."""
        for engine in (self.context, self.denoiser):
            stats = engine.stats()
            assert engine.num_rows == stats["rows"] == stats["waiting"] == 0
            assert stats["state_bytes"] == 0
        assert not self.context._next
        assert not self.denoiser._arrived


def tokens_of(blocks: Sequence[Block]) -> list[int]:
    """The tokens of all blocks in a row."""
    return [token for block in blocks for token in block.token_ids]

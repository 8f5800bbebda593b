"""Runs single rows through real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

# Rows short enough that a thousand of them fit into the pool of a test.
# Prompts of tests are short: pieces are too, so that there are several.
OPTIONS = EngineOptions(max_num_seqs=1024, max_context=512, prefix_cache_mib=0, prefill_chunk=64)
PROMPT = [5, 3, 17, 3, 9]

Towers = tuple[ContextTower, DenoiserTower]
_by_ar: dict[tuple[ContextTower, tuple[int, ...], GenerationParams], list[int]] = {}


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
        options: EngineOptions = OPTIONS,
    ) -> Pair:
        pool = None if shared else options.pool_for(denoiser)
        reader = DenoiserEngine(denoiser, options, pool=pool, threaded=threaded)
        link = LocalLink(context, reader, shared)
        return cls(ContextEngine(context, link, options, threaded=threaded), reader)

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
        """No row, no waiting work, no slot and no page is left on either side."""
        if self.context.cache is not None:
            self.context.cache.clear()
        for engine in (self.context, self.denoiser):
            stats = engine.stats()
            assert engine.num_rows == stats.rows == stats.pending_work == 0
            if engine.pool is not None:
                assert stats.slots_used == stats.pages_used == stats.state_bytes == 0
        assert self.context.stats().queued_rows == 0


def tokens_of(blocks: Sequence[Block]) -> list[int]:
    """The tokens of all blocks in a row."""
    return [token for block in blocks for token in block.token_ids]


def tokens_by_ar(pair: Pair, prompt: Sequence[int], params: GenerationParams) -> list[int]:
    """The row's tokens in mode `ar`, which knows no drafts; decoded once for each context tower."""
    how = replace(params, mode="ar", acceptance="strict", draft_source="any", draft_steps=1)
    key = (pair.context.tower, tuple(prompt), how)
    if key not in _by_ar:
        _by_ar[key] = tokens_of(asyncio.run(pair.blocks("ar", prompt, how)))
    return _by_ar[key]


def params_of(mode: Any = "mask_diffusion", **changes: Any) -> GenerationParams:
    """Parameters of a short row with a seed, with changes. Drafts come from the denoiser alone:
    where a policy chooses, passes and last bits of values follow the pace of the machine."""
    base = {"mode": mode, "max_tokens": 40, "seed": 11, "draft_source": "denoiser"}
    return GenerationParams(**(base | changes))

"""Rows whose denoiser mirrors are brought up to date now and then, round by round."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tests.support.comparing import assert_same_bits
from tests.support.random_model import small_config
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.engine import state_of
from twotower.towers.request.params import GenerationParams
from twotower.towers.state.context_state import ContextState

# Two Mamba layers with states so large that a delta of 34 tokens is smaller than they are.
CONFIG = small_config(layer_pattern="M*E-M*", mamba_head_dim=32, n_groups=1, ssm_state_size=64)
PROMPT = [5, 3, 17, 3, 9]
PARAMS = GenerationParams(mode="verified", max_tokens=80, block_size=8, seed=3, temperature=1.0)
CAPACITY = PARAMS.context_tokens(len(PROMPT))


async def ar_tokens(context: ContextEngine, params: GenerationParams = PARAMS) -> list[int]:
    """What the context tower alone gives a row."""
    rows = generate_blocks(context, None, "ar", PROMPT, replace(params, mode="ar"))
    return [token async for block in rows for token in block.token_ids]


@dataclass
class LazyRow:
    """A row that is open on the context side, and the tokens that it is going to have."""

    context: ContextEngine
    row_id: str
    own: Sequence[int]
    chooser: random.Random

    @classmethod
    async def start(
        cls, context: ContextEngine, row_id: str, own: Sequence[int], seed: int = 0
    ) -> LazyRow:
        """Opens and prefills a row, which the denoiser has opened already."""
        await context.open(row_id, CAPACITY)
        await context.prefill(row_id, PROMPT, [], PARAMS)
        return cls(context, row_id, own, random.Random(seed))

    @property
    def state(self) -> ContextState:
        return state_of(self.context._rows[self.row_id].state)

    @property
    def mirrored(self) -> int:
        return self.context._rows[self.row_id].mirrored

    async def verify(self, accepted: int, size: int = 8) -> None:
        """Checks a draft of which the tower accepts so many tokens."""
        begin = self.state.position - len(PROMPT)
        draft = list(self.own[begin : begin + size])
        if accepted < size:
            draft[accepted] = (draft[accepted] + 1) % CONFIG.vocab_size
        await self.context.verify(self.row_id, draft, PARAMS)
        assert self.state.position == len(PROMPT) + begin + accepted

    async def step(self) -> None:
        """Reads a token without a draft."""
        await self.context.decode(self.row_id, 1, replace(PARAMS, mode="ar"))

    async def advance(self, tokens: int) -> None:
        """Random rounds until the state has so many tokens more."""
        end = self.state.position + tokens
        while (left := end - self.state.position) > 0:
            if self.chooser.random() < 0.4:
                await self.step()
            else:
                # The first token of a draft is known, so at least that one is accepted.
                await self.verify(min(self.chooser.randint(1, 8), left))


def assert_mirrored(row: LazyRow, denoiser: DenoiserEngine) -> None:
    """The denoiser's mirror has the bits of the row's state."""
    mirror, state = state_of(denoiser._rows[row.row_id].state), row.state
    assert mirror is not state
    assert mirror.position == mirror.length == state.position == row.mirrored
    assert_same_bits(mirror.ssm, state.ssm)
    assert_same_bits(mirror.conv, state.conv)
    pairs = zip(
        mirror.kv_layers(0, mirror.position), state.kv_layers(0, state.position), strict=True
    )
    for got, want in pairs:
        assert_same_bits(got, want)

"""Rounds of verified and auto: whoever drafts, the output is ar's, and passes are saved."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.rows import OPTIONS, Pair, tokens_by_ar, tokens_of
from twotower.towers.decoding.draft_policy import STEP, Round
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block, DraftCosts
from twotower.towers.engine import draft_rounds
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

LOOPING = [5, 3, 17, 3, 9] * 8
PROMPTS = ([9], LOOPING, list(range(24)) * 3)
GREEDY = GenerationParams(mode="verified", max_tokens=45, block_size=8, seed=11)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.9)
PENALIZED = replace(
    SAMPLED, frequency_penalty=0.5, presence_penalty=0.5, logit_bias=((4, 5.0), (5, 5.0))
)
# Rows of few tokens, so that lookups find much, right and wrong.
FEW = replace(SAMPLED, top_k=2, logit_bias=((4, 30.0), (5, 30.0)))
DRAWS = {"greedy": GREEDY, "sampled": SAMPLED, "penalized": PENALIZED, "few": FEW}


@pytest.fixture
def pair(context_tower: ContextTower, denoiser_tower: DenoiserTower) -> Pair:
    return Pair.of(context_tower, denoiser_tower)


class Drawn:
    """A policy that draws its rounds."""

    def __init__(self, seed: int, asks: Sequence[Any]) -> None:
        self.random = random.Random(seed)
        self.asks = asks

    def choose(self, match: int, room: int, _costs: DraftCosts) -> Round:
        if self.asks and self.random.random() < 0.3:
            return Round("denoiser", asks=self.random.choice(self.asks))
        if match and room and self.random.random() < 0.8:
            return Round("lookup", self.random.randint(1, room))
        return STEP

    def learn(self, *_: Any) -> None:
        pass

    def learn_draft(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "looping", "long"])
@pytest.mark.parametrize(
    "changes", [{}, {"draft_source": "lookup"}, {"mode": "auto"}], ids=["any", "lookup", "auto"]
)
def test_the_output_is_that_of_ar(
    pair: Pair, changes: dict[str, Any], prompt: list[int], draw: str
) -> None:
    params = replace(DRAWS[draw], **changes)
    blocks = asyncio.run(pair.blocks("row", prompt, params))
    assert tokens_of(blocks) == tokens_by_ar(pair, prompt, params)
    assert blocks[-1].finish_reason == "length"
    pair.assert_empty()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("draw", ["penalized", "few"])
def test_whatever_is_chosen_the_output_is_that_of_ar(
    context_tower: ContextTower,
    denoiser_tower: DenoiserTower,
    monkeypatch: pytest.MonkeyPatch,
    shared: bool,
    draw: str,
) -> None:
    pair = Pair.of(context_tower, denoiser_tower, shared=shared)
    seeds = iter(range(100))
    monkeypatch.setattr(draft_rounds, "policy_of", lambda *_, **__: Drawn(next(seeds), ["checked"]))
    params = replace(DRAWS[draw], mode="auto")
    want = tokens_by_ar(pair, LOOPING, params)
    for number in range(4):
        blocks = asyncio.run(pair.blocks(f"row-{number}", LOOPING, params))
        assert tokens_of(blocks) == want
        assert sum(block.nfe for block in blocks) > 0
        assert sum(block.lookup_drafted_tokens for block in blocks) > 0
    pair.assert_empty()


def test_a_round_gives_what_is_accepted_and_one_more(pair: Pair) -> None:
    params = replace(FEW, draft_source="lookup", max_tokens=60)
    blocks = asyncio.run(pair.blocks("row", LOOPING, params))
    for block in blocks[:-1]:
        # The first token needs no round; the last block is cut.
        first = block is blocks[0]
        rounds = block.context_passes - first
        assert len(block.token_ids) == first + rounds + block.accepted_tokens
        assert block.accepted_tokens == block.lookup_accepted_tokens <= block.lookup_drafted_tokens
        assert block.drafted_tokens == block.lookup_drafted_tokens
        assert list(block.commit_steps) == sorted(block.commit_steps)
    assert [block.start for block in blocks[1:]] == [block.end for block in blocks[:-1]]
    assert sum(block.lookup_accepted_tokens for block in blocks) > 0
    # Where nothing pays, a block is made of steps alone.
    assert "lookup" in {block.drafted_by for block in blocks} <= {"", "lookup"}
    assert sum(block.context_passes for block in blocks) < 60


def test_probabilities_are_the_context_towers(pair: Pair) -> None:
    blocks = asyncio.run(pair.blocks("row", LOOPING, SAMPLED))
    got = [value for block in blocks for value in block.log_probs]
    scores = asyncio.run(pair.context.score([*LOOPING, *tokens_of(blocks)])).log_probs
    assert got == pytest.approx(scores[len(LOOPING) - 1 :], abs=2e-3)


@pytest.mark.parametrize("kept", [1, 9, 20])
def test_a_resumed_row_has_the_same_tail(pair: Pair, kept: int) -> None:
    whole = tokens_of(asyncio.run(pair.blocks("row", LOOPING, FEW)))
    tail = asyncio.run(pair.blocks("row", LOOPING, FEW, whole[:kept]))
    assert tokens_of(tail) == whole[kept:]
    assert tail[0].start == len(LOOPING) + kept
    pair.assert_empty()


def test_rows_together_have_the_tokens_of_each_alone(pair: Pair) -> None:
    how = [replace(params, mode="auto", seed=seed) for seed, params in enumerate(DRAWS.values())]
    alone = [tokens_of(asyncio.run(pair.blocks("row", LOOPING, params))) for params in how]

    async def together() -> list[list[Block]]:
        rows = [pair.blocks(f"row-{at}", LOOPING, params) for at, params in enumerate(how)]
        return await asyncio.gather(*rows)

    assert [tokens_of(blocks) for blocks in asyncio.run(together())] == alone


def test_an_eos_ends_the_row_within_a_draft(pair: Pair) -> None:
    params = replace(GREEDY, draft_source="lookup")
    whole = tokens_by_ar(pair, LOOPING, params)
    for eos in sorted({whole[0], whole[20], whole[40]}):
        blocks = asyncio.run(pair.blocks("row", LOOPING, replace(params, eos_token_id=eos)))
        assert tokens_of(blocks) == whole[: whole.index(eos) + 1]
        assert blocks[-1].finish_reason == "stop"
    pair.assert_empty()


def test_a_context_tower_alone_serves_lookups(
    context_tower: ContextTower, denoiser_tower: DenoiserTower
) -> None:
    linked = Pair.of(context_tower, denoiser_tower)
    pair = replace(linked, context=ContextEngine(context_tower, None, OPTIONS))

    async def run(params: GenerationParams) -> list[Block]:
        return [b async for b in generate_blocks(pair.context, None, "row", LOOPING, params)]

    for params in (GREEDY, replace(GREEDY, mode="auto", quality="fast")):
        blocks = asyncio.run(run(params))
        assert tokens_of(blocks) == tokens_by_ar(pair, LOOPING, GREEDY)
        assert sum(block.nfe for block in blocks) == 0
    with pytest.raises(ValueError, match="needs a denoiser"):
        asyncio.run(run(replace(GREEDY, draft_source="denoiser")))
    pair.assert_empty()


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_drafts_of_any_length(pair: Pair, block_size: int) -> None:
    params = replace(FEW, block_size=block_size, max_tokens=33)
    blocks = asyncio.run(pair.blocks("row", LOOPING, params))
    assert tokens_of(blocks) == tokens_by_ar(pair, LOOPING, params)

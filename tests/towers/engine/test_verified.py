"""Verified mode: whatever is drafted, the output is the context tower's own."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from tests.support.rows import Pair, tokens_by_ar, tokens_of
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

PROMPTS = ([9], [5, 3, 17, 3, 9], list(range(70)))
GREEDY = GenerationParams(
    mode="verified", max_tokens=45, block_size=8, seed=11, draft_source="denoiser"
)
SAMPLED = replace(GREEDY, temperature=1.0, top_p=0.9)
# Rows of three tokens, of which the counts choose.
PENALIZED = replace(
    GREEDY,
    frequency_penalty=1.5,
    presence_penalty=0.5,
    logit_bias=((4, 60.0), (5, 60.0), (6, 60.0)),
)


@pytest.fixture
def pair(context_tower: ContextTower, denoiser_tower: DenoiserTower) -> Pair:
    return Pair.of(context_tower, denoiser_tower)


class Drafts:
    """A denoiser that drafts what it is told to; it needs no state."""

    def __init__(self, own: Sequence[int], start: int, wrong_at: Sequence[int]) -> None:
        self.own, self.start, self.wrong_at = list(own), start, set(wrong_at)
        self.known: list[tuple[int, ...]] = []

    async def open(self, row_id: str, capacity: int) -> None:
        pass

    async def denoise_block(
        self,
        _row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int] = (),
        *_: Any,
    ) -> Block:
        self.known.append(tuple(known))
        begin = position - self.start
        size = params.block_size
        tokens = (self.own[begin : begin + size] + [0] * size)[:size]
        for place in range(len(known), size):
            if begin + place in self.wrong_at:
                tokens[place] = (tokens[place] + 1) % 24
        return Block(position, tuple(tokens), (0,) * size, (1.0,) * size, nfe=1)

    async def next_token(self, *_args: Any) -> Block:
        raise AssertionError("mock_ar only")

    async def release(self, row_id: str) -> None:
        pass


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    ("draft_steps", "prompt"), [(1, PROMPTS[0]), (3, PROMPTS[1]), (8, PROMPTS[2])]
)
def test_the_output_is_that_of_ar(
    pair: Pair, params: GenerationParams, draft_steps: int, prompt: list[int]
) -> None:
    params = replace(params, draft_steps=draft_steps, max_tokens=21)
    blocks = asyncio.run(pair.blocks("row", prompt, params))
    assert tokens_of(blocks) == tokens_by_ar(pair, prompt, params)
    assert all(block.nfe <= draft_steps for block in blocks)
    assert blocks[-1].finish_reason == "length"
    pair.assert_empty()


@pytest.mark.parametrize("params", [SAMPLED, PENALIZED], ids=["sampled", "penalized"])
@pytest.mark.parametrize("wrong_at", [(), (0,), (3,), (7, 8, 9), range(45)], ids=str)
def test_any_draft_gives_the_output_of_ar(
    pair: Pair, wrong_at: Sequence[int], params: GenerationParams
) -> None:
    prompt = PROMPTS[1]
    own = tokens_by_ar(pair, prompt, replace(params, max_tokens=60))
    drafts = Drafts(own, len(prompt), wrong_at)
    pair.context.link = None

    async def run() -> list[Block]:
        rows = generate_blocks(pair.context, drafts, "row", prompt, params)
        return [block async for block in rows]

    blocks = asyncio.run(run())
    assert tokens_of(blocks) == own[:45]
    # The first draft is all masks; later ones begin with the token that ended the block before.
    heads = [block.token_ids[-1:] for block in blocks]
    assert drafts.known == [(), *heads[:-1]]
    # Up to the first wrong token all are accepted, and the tower's own one comes on top.
    position = 0
    for block in blocks[:-1]:
        known = int(position > 0)
        begin = position - known
        wrong = min((w for w in wrong_at if begin + known <= w < begin + 8), default=begin + 8)
        assert block.drafted_tokens == 8 - known
        assert block.accepted_tokens == wrong - position
        assert len(block.token_ids) == wrong - position + 1
        position = wrong + 1


def test_a_perfect_draft_saves_passes(pair: Pair) -> None:
    prompt = PROMPTS[1]
    own = tokens_by_ar(pair, prompt, replace(GREEDY, max_tokens=60))
    pair.context.link = None
    drafts = Drafts(own, len(prompt), ())

    async def run() -> list[Block]:
        return [b async for b in generate_blocks(pair.context, drafts, "row", prompt, GREEDY)]

    blocks = asyncio.run(run())
    # 9 tokens from the first draft of 8, then 8 new ones from each: 9 + 4 * 8 + 4 = 45.
    assert [len(block.token_ids) for block in blocks] == [9, 8, 8, 8, 8, 4]
    assert sum(block.context_passes for block in blocks) == 1 + 6


@pytest.mark.parametrize("params", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_probabilities_are_the_context_towers(pair: Pair, params: GenerationParams) -> None:
    prompt = PROMPTS[1]
    verified = asyncio.run(pair.blocks("row", prompt, params))
    ar = asyncio.run(pair.blocks("row", prompt, replace(params, mode="ar")))
    got = [value for block in verified for value in block.log_probs]
    want = [value for block in ar for value in block.log_probs]
    # Passes over several tokens round differently than those over one.
    assert got == pytest.approx(want, abs=2e-3)
    scores = asyncio.run(pair.context.score([*prompt, *tokens_of(verified)])).log_probs
    assert got == pytest.approx(scores[len(prompt) - 1 :], abs=2e-3)


@pytest.mark.parametrize("kept", [1, 8, 20])
def test_a_resumed_row_has_the_same_tail(pair: Pair, kept: int) -> None:
    params = replace(SAMPLED, max_tokens=29)
    whole = tokens_of(asyncio.run(pair.blocks("row", PROMPTS[2], params)))
    tail = asyncio.run(pair.blocks("row", PROMPTS[2], params, whole[:kept]))
    assert tokens_of(tail) == whole[kept:]
    assert tail[0].start == len(PROMPTS[2]) + kept
    pair.assert_empty()


@pytest.mark.parametrize("shared", [True, False])
def test_an_eos_ends_the_row_and_min_tokens_puts_it_off(
    context_tower: ContextTower, denoiser_tower: DenoiserTower, shared: bool
) -> None:
    pair = Pair.of(context_tower, denoiser_tower, shared=shared)
    whole = tokens_of(asyncio.run(pair.blocks("row", PROMPTS[1], SAMPLED)))
    eos = whole[10]
    stopping = replace(SAMPLED, eos_token_id=eos)
    stopped = asyncio.run(pair.blocks("row", PROMPTS[1], stopping))
    assert tokens_of(stopped) == whole[: whole.index(eos) + 1]
    assert stopped[-1].finish_reason == "stop"
    later = tokens_of(asyncio.run(pair.blocks("row", PROMPTS[1], replace(stopping, min_tokens=30))))
    assert eos not in later[:30]
    assert len(later) >= 31
    assert later == tokens_by_ar(pair, PROMPTS[1], replace(stopping, min_tokens=30))
    pair.assert_empty()


def test_a_block_of_one_token_is_plain_decoding(pair: Pair) -> None:
    params = replace(GREEDY, block_size=1, max_tokens=12)
    blocks = asyncio.run(pair.blocks("row", PROMPTS[1], params))
    assert tokens_of(blocks) == tokens_by_ar(pair, PROMPTS[1], params)

"""Blocks of mask_diffusion that begin with a token of the context tower, in real engines."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from tests.support.rows import OPTIONS, PROMPT, Pair, Towers, params_of, tokens_of
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.request.params import GenerationParams

# Draws of every kind that a sampler makes.
DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0},
    {"temperature": 1.0, "top_p": 0.8, "top_logprobs": 3},
    {"temperature": 0.7, "frequency_penalty": 1.5, "logit_bias": {7: 2.0}},
    {"presence_penalty": 2.0, "min_tokens": 24, "eos_token_id": 9},
]
RULES = ["leftmost", "product"]


def run(pair: Pair, params: GenerationParams, generated: list[int] | None = None) -> Any:
    blocks = asyncio.run(pair.blocks("row", PROMPT, params, generated or []))
    pair.assert_empty()
    return blocks


def on_device(pair: Pair) -> Pair:
    """Engines of the same towers over fixed buffers."""
    denoiser = DenoiserEngine(pair.denoiser.tower, OPTIONS, device_steps=True)
    link = LocalLink(pair.context.tower, denoiser, shared=True)
    return Pair(ContextEngine(pair.context.tower, link, OPTIONS, device_steps=True), denoiser)


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("device", [False, True])
def test_the_first_token_of_a_block_is_that_of_ar(
    pair: Pair, how: dict[str, Any], device: bool
) -> None:
    """After the same prompt and output: token, confidence, log-probability and alternatives."""
    pair = on_device(pair) if device else pair
    params = params_of(max_tokens=24, block_size=8, **how)
    output: list[int] = []
    for block in run(pair, params):
        ar = run(pair, replace(params, mode="ar"), output)[0]
        assert block.start == len(PROMPT) + len(output)
        assert block.token_ids[0] == ar.token_ids[0]
        assert block.commit_steps[0] == 0
        assert block.confidences[0] == pytest.approx(ar.confidences[0], rel=1e-5)
        assert block.log_probs[0] == pytest.approx(ar.log_probs[0], rel=1e-4)
        assert len(block.top_log_probs) == (8 if params.top_logprobs else 0)
        if params.top_logprobs:
            wanted = [token for token, _ in ar.top_log_probs[0]]
            assert [token for token, _ in block.top_log_probs[0]] == wanted
        assert (block.nfe > 0, block.context_passes) == (True, 1)
        output += block.token_ids
    assert len(output) == 24


@pytest.mark.parametrize("how", DRAWS)
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_row_has_the_same_tokens(pair: Pair, how: dict[str, Any], rule: str) -> None:
    params = params_of(max_tokens=29, block_size=8, commit_rule=rule, **how)
    whole = tokens_of(run(pair, params))
    for done in range(8, len(whole), 8):
        assert [*whole[:done], *tokens_of(run(pair, params, whole[:done]))] == whole


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_size", [1, 2, 5, 16])
def test_a_prefix_from_the_cache_gives_the_same_tokens(
    towers: Towers, rule: str, block_size: int
) -> None:
    cached = Pair.of(*towers, options=replace(OPTIONS, prefix_cache_mib=8))
    params = params_of(max_tokens=21, block_size=block_size, commit_rule=rule, temperature=1.0)

    async def twice() -> list[Any]:
        return [await cached.blocks(f"{index}", PROMPT, params) for index in range(2)]

    first, second = asyncio.run(twice())
    assert (first[0].cached_tokens, second[0].cached_tokens) == (0, len(PROMPT))
    assert tokens_of(first) == tokens_of(second) == tokens_of(run(Pair.of(*towers), params))


@pytest.mark.parametrize("device", [False, True])
def test_blocks_of_one_token_are_ar(pair: Pair, device: bool) -> None:
    pair = on_device(pair) if device else pair
    params = params_of(max_tokens=12, block_size=1, temperature=1.0)
    blocks = run(pair, params)
    assert tokens_of(blocks) == tokens_of(run(pair, replace(params, mode="ar")))
    assert sum(block.nfe for block in blocks) == 0


def test_an_eos_that_the_context_tower_draws_ends_the_row(pair: Pair) -> None:
    """The bias makes EOS certain as soon as it may be drawn."""
    how = {"max_tokens": 24, "block_size": 8, "eos_token_id": 9, "logit_bias": {9: 100.0}}
    first, last = run(pair, params_of(min_tokens=8, **how))
    assert 9 not in first.token_ids
    assert (len(first.token_ids), last.token_ids) == (8, (9,))
    assert (first.nfe > 0, last.nfe, last.finish_reason) == (True, 0, "stop")


def test_more_draft_steps_commit_the_leading_run(pair: Pair) -> None:
    """Of drafts of several steps nothing behind the run is fixed before the last step."""
    params = params_of("verified", max_tokens=32, block_size=8, draft_steps=3)
    ar = tokens_of(run(pair, replace(params, mode="ar")))
    steps: list[tuple[int, ...]] = []
    denoise = pair.denoiser.denoise_block

    async def watched(*how: Any) -> Any:
        block = await denoise(*how)
        steps.append(block.commit_steps)
        return block

    pair.denoiser.denoise_block = watched  # type: ignore[method-assign]
    for threshold in (0.01, 0.1, 0.5):
        chosen = replace(params, confidence_threshold=threshold)
        assert tokens_of(run(pair, chosen)) == ar
    assert all(list(commits) == sorted(commits) for commits in steps)
    assert max(map(max, steps)) == 2

"""Penalties, biases, alternatives and drafts in the engines, against counts and logits by hand."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rows import OPTIONS, PROMPT, Pair, params_of, tokens_of
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.sampling import Draw, Drawn, draw_tokens
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

MODES: list[Any] = ["mask_diffusion", "ar", "mock_ar", "verified"]
# Rows of four tokens, of which the counts choose: one that is wrong gives another row.
SHIFTS: dict[str, Any] = {
    "presence_penalty": 0.75,
    "frequency_penalty": 1.5,
    "logit_bias": {4: 60.0, 7: 60.5, 9: 59.5, 12: 60.0},
}


@pytest.fixture
def pair(context_tower: ContextTower, denoiser_tower: DenoiserTower) -> Pair:
    return Pair.of(context_tower, denoiser_tower)


@dataclass
class Recorder:
    """Every draw of an engine with its logits [M, V], and what came of it."""

    seen: list[tuple[Tensor, Draw, Drawn]] = field(default_factory=list)

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> list[Any]:
        drawn = draw_tokens(logits, draws)
        start = 0
        for draw, each in zip(draws, drawn, strict=True):
            assert isinstance(each, Drawn)
            lines = logits[start : start + len(draw.positions)].clone()
            start += len(draw.positions)
            self.seen.append((lines, draw, each))
        return drawn


@pytest.fixture
def denoiser_draws(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("twotower.towers.engine.denoiser_engine.draw_tokens", recorder)
    return recorder


def shifted(logits: Sequence[float], params: GenerationParams, output: Sequence[int]) -> Tensor:
    """Scores by the rule, token by token."""
    counts, bias = Counter(output), dict(params.logit_bias)
    return torch.tensor(
        [
            logit
            + bias.get(token, 0.0)
            - params.frequency_penalty * counts[token]
            - params.presence_penalty * (counts[token] > 0)
            for token, logit in enumerate(logits)
        ]
    )


def run(pair: Pair, params: GenerationParams, generated: Sequence[int] = ()) -> list[Block]:
    blocks = asyncio.run(pair.blocks("row", PROMPT, params, generated))
    pair.assert_empty()
    return blocks


@pytest.mark.parametrize("mode", ["ar", "verified"])
def test_each_token_is_the_best_of_its_scores(pair: Pair, mode: Any) -> None:
    params = params_of(mode, max_tokens=24, block_size=8, **SHIFTS)
    tokens = tokens_of(run(pair, params))
    assert tokens != tokens_of(run(pair, params_of(mode, max_tokens=24, block_size=8)))
    vocab = pair.context.tower.config.vocab_size
    scores = asyncio.run(pair.context.score([*PROMPT, *tokens], vocab))
    for index, token in enumerate(tokens):
        # Log-probabilities are the logits but for a number of the position.
        logits = dict(scores.top_log_probs[len(PROMPT) + index - 1])
        want = shifted([logits[i] for i in range(vocab)], params, tokens[:index])
        assert want[token] >= want.max() - 1e-4, index


def test_a_step_counts_what_earlier_steps_have_committed(
    pair: Pair, denoiser_draws: Recorder
) -> None:
    how = {"max_tokens": 32, "block_size": 16, "steps_per_block": 6}
    params = params_of(**how, commit_rule="released", **SHIFTS)
    blocks = run(pair, params)
    assert len({step for block in blocks for step in block.commit_steps}) > 3
    mask = pair.denoiser.tower.config.mask_token_id
    output: list[int] = []
    steps = iter(denoiser_draws.seen)
    for block in blocks:
        for step in range(block.nfe):
            lines, draw, drawn = next(steps)
            committed = [
                token
                for token, at in zip(block.token_ids, block.commit_steps, strict=True)
                if at < step
            ]
            lines[:, mask] = -torch.inf
            for line, position, token in zip(lines, draw.positions, drawn.token_ids, strict=True):
                want = shifted(line.tolist(), params, [*output, *committed])
                assert token == int(want.argmax()), (position, step)
        output += block.token_ids


def test_mock_ar_counts_all_output_before(pair: Pair, denoiser_draws: Recorder) -> None:
    params = params_of("mock_ar", max_tokens=12, **SHIFTS)
    tokens = tokens_of(run(pair, params))
    for index, (lines, _, drawn) in enumerate(denoiser_draws.seen):
        want = shifted(lines[0].tolist(), params, tokens[:index])
        assert drawn.token_ids == [int(want.argmax())] == [tokens[index]]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "top_p": 0.9}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_steps", [1, 3])
def test_verified_is_ar_with_penalties_too(
    pair: Pair, how: dict[str, Any], draft_steps: int
) -> None:
    how = {"max_tokens": 15, "block_size": 8, "draft_steps": draft_steps, **how}
    params = params_of("verified", **SHIFTS, **how)
    assert tokens_of(run(pair, params)) == tokens_of(run(pair, replace(params, mode="ar")))


@pytest.mark.parametrize("draft_steps", [1, 4])
def test_a_draft_is_penalized_as_its_check_will_be(
    pair: Pair, denoiser_draws: Recorder, draft_steps: int
) -> None:
    """Position by position: by the output and what the draft has committed before it."""
    how = {"max_tokens": 6, "block_size": 8, "draft_steps": draft_steps, "provisional": True}
    params = params_of("verified", **SHIFTS, **how)
    mask = pair.denoiser.tower.config.mask_token_id
    steps = iter(denoiser_draws.seen)
    output: list[int] = []
    committed: dict[int, int] = {}
    for item in watched(pair, params):
        lines, draw, drawn = next(steps)
        lines[:, mask] = -torch.inf
        for line, position, token in zip(lines, draw.positions, drawn.token_ids, strict=True):
            before = [committed[place] for place in sorted(committed) if place < position]
            assert token == int(shifted(line.tolist(), params, [*output, *before]).argmax())
        if isinstance(item, Block):
            output += item.token_ids
            committed = {}
        else:
            places = enumerate(zip(item.token_ids, item.masked, strict=True), start=item.start)
            fresh = len(PROMPT) + len(output)
            committed = {
                place: token for place, (token, hid) in places if not hid and place >= fresh
            }


@pytest.mark.parametrize("mode", MODES)
def test_a_resumed_row_counts_what_it_had(pair: Pair, mode: Any) -> None:
    params = params_of(mode, max_tokens=32, block_size=8, temperature=1.0, **SHIFTS)
    whole = tokens_of(run(pair, params))
    assert [*whole[:16], *tokens_of(run(pair, params, whole[:16]))] == whole


def mixed() -> list[GenerationParams]:
    """Rows of every mode: plain, shifted, with alternatives, with drafts."""
    kinds: list[dict[str, Any]] = [{"temperature": 1.0}, SHIFTS, {"top_logprobs": 3}]
    return [
        params_of(mode, max_tokens=9, block_size=8, steps_per_block=4, seed=index, **kind)
        for index, kind in enumerate(kinds)
        for mode in MODES
    ]


def engines(pair: Pair, device_steps: bool) -> Pair:
    denoiser = DenoiserEngine(pair.denoiser.tower, OPTIONS, device_steps=device_steps)
    link = LocalLink(pair.context.tower, denoiser, shared=True)
    context = ContextEngine(pair.context.tower, link, OPTIONS, device_steps=device_steps)
    return Pair(context, denoiser)


@pytest.mark.parametrize("device_steps", [False, True], ids=["host", "device"])
def test_rows_together_have_the_bits_that_they_have_alone(pair: Pair, device_steps: bool) -> None:
    made = engines(pair, device_steps)

    async def all_rows() -> list[list[Block]]:
        rows = enumerate(mixed())
        return await asyncio.gather(
            *(made.blocks(f"{index}", PROMPT, params) for index, params in rows)
        )

    together = asyncio.run(all_rows())
    for params, blocks in zip(mixed(), together, strict=True):
        assert blocks == run(pair, params), params


@pytest.mark.parametrize("mode", MODES)
def test_alternatives_change_nothing_else(pair: Pair, mode: Any) -> None:
    params = params_of(mode, max_tokens=20, block_size=8, temperature=1.0)
    plain, wide = run(pair, params), run(pair, replace(params, top_logprobs=5))
    assert [replace(block, top_log_probs=()) for block in wide] == plain
    for block in wide:
        assert [len(line) for line in block.top_log_probs] == [5] * len(block.token_ids)
        for token, value, line in zip(
            block.token_ids, block.log_probs, block.top_log_probs, strict=True
        ):
            found = dict(line)
            assert found.get(token, value) == value
            assert token in found or value <= min(found.values())


def test_alternatives_are_of_the_step_that_committed(pair: Pair, denoiser_draws: Recorder) -> None:
    how = {"max_tokens": 16, "block_size": 16, "steps_per_block": 5, "commit_rule": "released"}
    params = params_of(**how, top_logprobs=4)
    (block,) = run(pair, params)
    mask = pair.denoiser.tower.config.mask_token_id
    for offset, step in enumerate(block.commit_steps):
        lines, draw, _ = denoiser_draws.seen[step]
        line = lines[list(draw.positions).index(block.start + offset)].double()
        line[mask] = -torch.inf
        values, ids = torch.log_softmax(line, dim=-1).topk(4)
        assert [token for token, _ in block.top_log_probs[offset]] == ids.tolist()
        got = [value for _, value in block.top_log_probs[offset]]
        assert got == pytest.approx(values.tolist(), abs=1e-5)


def test_alternatives_of_a_text(pair: Pair) -> None:
    text = [*PROMPT, *range(5, 20)]
    scores = asyncio.run(pair.context.score(text, 3))
    vocab = pair.context.tower.config.vocab_size
    every = asyncio.run(pair.context.score(text, vocab))
    assert scores.log_probs == every.log_probs == asyncio.run(pair.context.score(text)).log_probs
    assert asyncio.run(pair.context.score(text)).top_log_probs == []
    for index, (few, all_of_them) in enumerate(
        zip(scores.top_log_probs, every.top_log_probs, strict=True)
    ):
        assert few == all_of_them[:3]
        assert dict(all_of_them)[text[index + 1]] == scores.log_probs[index]
        total = torch.tensor([value for _, value in all_of_them]).exp().sum()
        assert float(total) == pytest.approx(1.0, abs=1e-5)


Items = list[Block | ProvisionalBlock]


def watched(pair: Pair, params: GenerationParams) -> Items:
    async def row() -> Items:
        blocks = generate_blocks(pair.context, pair.denoiser, "row", PROMPT, params)
        return [item async for item in blocks]

    return asyncio.run(row())


@pytest.mark.parametrize("device_steps", [False, True], ids=["host", "device"])
@pytest.mark.parametrize("mode", ["mask_diffusion", "verified"])
def test_drafts_fill_towards_their_block(pair: Pair, mode: Any, device_steps: bool) -> None:
    made = engines(pair, device_steps)
    length = 32 if mode == "mask_diffusion" else 5
    params = params_of(mode, max_tokens=length, steps_per_block=6, draft_steps=6, provisional=True)
    items = watched(made, params)
    blocks = [item for item in items if isinstance(item, Block)]
    assert blocks == run(pair, replace(params, provisional=False))
    mask = pair.denoiser.tower.config.mask_token_id
    drafts: list[ProvisionalBlock] = []
    for item in items:
        if isinstance(item, ProvisionalBlock):
            drafts.append(item)
            continue
        assert [draft.step for draft in drafts] == list(range(item.nfe - 1))
        for draft, following in pairwise(drafts):
            kept = [i for i in range(16) if not draft.masked[i]]
            assert len(kept) < sum(not masked for masked in following.masked)
            for i in kept:
                assert (draft.token_ids[i], draft.confidences[i]) == (
                    following.token_ids[i],
                    following.confidences[i],
                )
        for draft in drafts:
            if mode == "mask_diffusion":
                early = tuple(step > draft.step for step in item.commit_steps)
                assert (draft.start, draft.masked) == (item.start, early)
            hidden = [i for i in range(16) if draft.masked[i]]
            unknown = [(draft.token_ids[i], draft.confidences[i]) for i in hidden]
            if device_steps:
                assert unknown == [(mask, 0.0)] * len(hidden)
            else:
                assert all(token != mask and 0.0 < share <= 1.0 for token, share in unknown)
        drafts = []


def test_a_row_that_is_left_at_a_draft_is_free(pair: Pair) -> None:
    params = params_of(max_tokens=32, steps_per_block=6, provisional=True)

    async def leave() -> None:
        rows = generate_blocks(pair.context, pair.denoiser, "row", PROMPT, params)
        async with aclosing(rows):
            assert isinstance(await anext(rows), ProvisionalBlock)
        pair.assert_empty()

    asyncio.run(asyncio.wait_for(leave(), 10))


def test_blocks_say_how_long_they_took(pair: Pair) -> None:
    for mode in MODES:
        for index, block in enumerate(run(pair, params_of(mode, max_tokens=32))):
            assert block.timing is not None
            assert block.timing.denoise_s > 0.0
            assert (block.timing.prefill_s > 0.0) == (index == 0)

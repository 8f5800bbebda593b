"""Drafts accepted by a mix of both towers, in real engines."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.in_process import load_local
from benchmarks.verified import decode, speed, token_ids
from tests.support.rows import OPTIONS, PROMPT, Pair, Towers, params_of, tokens_of
from twotower.kernels.philox import uniforms
from twotower.towers.decoding.sampling import Draw, Drawn, Sampler, draw_tokens
from twotower.towers.decoding.services import Block
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.errors import NumericalError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.request.params import GenerationParams

SAMPLED: dict[str, Any] = {"temperature": 1.0}
# Rows of four tokens, of which the counts choose: one that is wrong gives another row.
PENALIZED: dict[str, Any] = {
    "presence_penalty": 0.75,
    "frequency_penalty": 1.5,
    "logit_bias": {4: 60.0, 7: 60.5, 9: 59.5, 12: 60.0},
}
KINDS: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED, "penalized": PENALIZED}


def mixed(mix: float, **changes: Any) -> GenerationParams:
    how: dict[str, Any] = {"acceptance": "mix", "mix_ratio": mix, "draft_source": "denoiser"}
    return params_of("verified", **({"block_size": 8} | how | changes))


def run(
    pair: Pair, params: GenerationParams, generated: Sequence[int] = (), prompt: Any = PROMPT
) -> list[Block]:
    blocks = asyncio.run(pair.blocks("row", prompt, params, generated))
    pair.assert_empty()
    return blocks


@dataclass(frozen=True)
class Place:
    """A drafted token with the logits [V] that it was drawn from and what its penalties counted."""

    token: int
    logits: Tensor
    counted: list[int]


@dataclass
class Drafts:
    """The denoiser's passes over drafts, each with the places that it drew."""

    passes: list[dict[int, Place]] = field(default_factory=list)

    def __call__(self, logits: Tensor, draws: Sequence[Draw]) -> list[Any]:
        (draw,), drawn = draws, draw_tokens(logits, draws)
        assert isinstance(drawn[0], Drawn)
        drafted = draw.drafted or [[]] * len(draw.positions)
        counted = [[*draw.output, *tokens] for tokens in drafted]
        lines = logits.double().clone()
        lines[:, draw.excluded_token] = -torch.inf
        places = map(Place, drawn[0].token_ids, lines, counted)
        self.passes.append(dict(zip(draw.positions, places, strict=True)))
        return drawn

    def draft(self, nfe: int) -> list[Place]:
        """The next draft, which took so many passes: each position as in the last that drew it."""
        found: dict[int, Place] = {}
        for drawn in self.passes[:nfe]:
            found |= drawn
        del self.passes[:nfe]
        return [found[position] for position in sorted(found)]


@pytest.fixture
def drafts(monkeypatch: pytest.MonkeyPatch) -> Drafts:
    recorder = Drafts()
    monkeypatch.setattr("twotower.towers.engine.denoiser_engine.draw_tokens", recorder)
    return recorder


def scores_by_hand(
    logits: Tensor, params: GenerationParams, position: int, output: Sequence[int]
) -> Tensor:
    """A token's scores [V] in fp64: bias, penalties, temperature, noise."""
    scores = logits.double().clone()
    for token, bias in params.logit_bias:
        scores[token] += bias
    for token in set(output):
        scores[token] -= params.frequency_penalty * list(output).count(token)
        scores[token] -= params.presence_penalty
    if params.temperature == 0:
        return torch.log_softmax(scores, dim=-1)
    key = Sampler.from_params(params).key
    signed = key - (1 << 64) if key >> 63 else key
    noise = uniforms(*(torch.tensor([n]) for n in (signed, position, 0, 2)), len(scores))[0]
    gumbel = -torch.log(-torch.log(noise.double()))
    return torch.log_softmax(scores / params.temperature, dim=-1) + gumbel


@pytest.mark.parametrize("draft_steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_follows_the_formula(
    pair: Pair, drafts: Drafts, kind: str, draft_steps: int
) -> None:
    """From the denoiser's logits as they were and the context tower's of a plain reading."""
    mix = 0.5
    params = mixed(mix, draft_steps=draft_steps, **KINDS[kind])
    output: list[int] = []
    relaxed, rejected = 0, 0
    for block in run(pair, params):
        draft = drafts.draft(block.nfe)
        tokens = [place.token for place in draft]
        first = len(PROMPT) + len(output)
        assert block.drafted_tokens == len(draft)
        logits = asyncio.run(pair.context.logits([*PROMPT, *output, *tokens]))[first - 1 :]
        for index, token in enumerate(block.token_ids):
            before = [*output, *tokens[:index]]
            own = scores_by_hand(logits[index], params, first + index, before)
            if index < len(draft):
                place = draft[index]
                theirs = scores_by_hand(place.logits, params, first + index, place.counted)
                assert place.token == int(theirs.argmax())
                target = mix * theirs + (1 - mix) * own
                # Passes of other lengths round differently.
                margin = float(target.max() - target[place.token])
                assert margin < 1e-3 if index < block.accepted_tokens else margin > -1e-3
            if index == block.accepted_tokens:
                assert own[token] >= own.max() - 1e-3
                rejected += index < len(draft)
            else:
                assert token == tokens[index]
                relaxed += token != int(own.argmax())
        output += block.token_ids
    assert relaxed > 2
    assert rejected > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_nothing_is_strict(pair: Pair, kind: str) -> None:
    params = mixed(0.0, draft_steps=3, max_tokens=24, **KINDS[kind])
    strict = replace(params, acceptance="strict", mix_ratio=0.3)
    assert run(pair, params) == run(pair, strict)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_of_all_takes_every_draft(pair: Pair, drafts: Drafts, kind: str) -> None:
    params = mixed(1.0, draft_steps=2, **KINDS[kind])
    blocks = run(pair, params)
    # The first draft has 8 new tokens, later ones begin with the context tower's own.
    assert [len(block.token_ids) for block in blocks] == [9, 8, 8, 8, 7]
    for block in blocks:
        tokens = [place.token for place in drafts.draft(block.nfe)]
        assert block.accepted_tokens == block.drafted_tokens == len(tokens)
        assert list(block.token_ids[: len(tokens)]) == tokens[: len(block.token_ids)]
    strict = replace(params, acceptance="strict")
    assert sum(block.accepted_tokens for block in run(pair, strict)) < 20


@pytest.mark.parametrize("kind", KINDS)
def test_probabilities_are_the_context_towers(pair: Pair, kind: str) -> None:
    params = mixed(0.5, top_logprobs=3, **KINDS[kind])
    blocks = run(pair, params)
    tokens = tokens_of(blocks)
    scores = asyncio.run(pair.context.score([*PROMPT, *tokens], 3))
    got = [value for block in blocks for value in block.log_probs]
    # Passes of other lengths round differently.
    assert got == pytest.approx(scores.log_probs[len(PROMPT) - 1 :], abs=2e-3)
    shares = [value for block in blocks for value in block.confidences]
    assert torch.log(torch.tensor(shares)).tolist() == pytest.approx(got, abs=1e-4)
    tops = [dict(line) for block in blocks for line in block.top_log_probs]
    assert [len(line) for line in tops] == [3] * len(tokens)
    best = [line[0][1] for line in scores.top_log_probs[len(PROMPT) - 1 :]]
    assert [max(line.values()) for line in tops] == pytest.approx(best, abs=2e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_resumed_after_a_block_has_the_same_tail(pair: Pair, kind: str) -> None:
    params = mixed(0.5, max_tokens=30, **KINDS[kind])
    blocks = run(pair, params)
    assert len(blocks) > 4
    for count in (1, len(blocks) // 2, len(blocks) - 1):
        kept = tokens_of(blocks[:count])
        tail = run(pair, params, kept)
        assert tokens_of(tail) == tokens_of(blocks[count:])
        assert [block.accepted_tokens for block in tail] == [
            block.accepted_tokens for block in blocks[count:]
        ]


def company() -> list[GenerationParams]:
    """Rows of every mode beside mixed ones."""
    modes: list[Any] = ["mask_diffusion", "ar", "mock_ar", "verified"]
    # Of the denoiser alone: rounds that a policy chooses follow the pace of the machine.
    how: dict[str, Any] = {"draft_source": "denoiser", "max_tokens": 16, "block_size": 8}
    others = [params_of(mode, seed=3, **how) for mode in modes]
    kinds = [*KINDS.values(), {"temperature": 0.8, "top_p": 0.9, "top_logprobs": 2}]
    relaxed = [mixed(0.3, seed=4, max_tokens=16, **kind) for kind in kinds]
    return [*relaxed, mixed(1.0, max_tokens=16), *others]


@pytest.mark.parametrize("device_steps", [False, True], ids=["host", "device"])
def test_rows_together_have_the_bits_that_they_have_alone(pair: Pair, device_steps: bool) -> None:
    denoiser = DenoiserEngine(pair.denoiser.tower, OPTIONS, device_steps=device_steps)
    link = LocalLink(pair.context.tower, denoiser, shared=True)
    made = Pair(
        ContextEngine(pair.context.tower, link, OPTIONS, device_steps=device_steps), denoiser
    )

    async def all_rows() -> list[list[Block]]:
        rows = enumerate(company())
        return await asyncio.gather(
            *(made.blocks(f"{index}", PROMPT, params) for index, params in rows)
        )

    together = asyncio.run(all_rows())
    made.assert_empty()
    for params, blocks in zip(company(), together, strict=True):
        assert blocks == run(pair, params), params


def test_a_copied_mirror_gives_the_same(pair: Pair, towers: Towers) -> None:
    params = mixed(0.5, **SAMPLED)
    assert run(Pair.of(*towers, shared=False), params) == run(pair, params)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_without_scores_is_checked_strictly(pair: Pair, kind: str) -> None:
    """Drafts of lookups have none."""
    params = replace(mixed(0.5, **KINDS[kind]), seed=5).for_prompt(len(PROMPT))
    own = tokens_of(run(pair, replace(params, mode="ar", max_tokens=12)))
    draft = [*own[:4], (own[4] + 1) % 24, *own[5:8]]

    async def checked() -> Block:
        await pair.context.open("row", 64)
        await pair.context.prefill("row", PROMPT, (), params)
        block = await pair.context.verify("row", draft, params)
        await pair.context.release("row")
        return block

    pair.context.link = None
    block = asyncio.run(checked())
    assert block.accepted_tokens == 4
    assert list(block.token_ids) == own[:5]


def test_strict_drafts_carry_no_scores(pair: Pair) -> None:
    async def draft(params: GenerationParams) -> Block:
        await pair.context.open("row", 64)
        await pair.denoiser.open("row", 64)
        await pair.context.prefill("row", PROMPT, (), params)
        block = await pair.denoiser.denoise_block("row", len(PROMPT), params)
        await pair.denoiser.release("row")
        await pair.context.release("row")
        return block

    relaxed = mixed(0.3)
    scored = asyncio.run(draft(relaxed)).draft_scores
    assert scored is not None
    assert scored.token_ids.shape == (8, 24)  # all that there are
    assert asyncio.run(draft(replace(relaxed, acceptance="strict"))).draft_scores is None
    assert asyncio.run(draft(replace(relaxed, mode="mask_diffusion"))).draft_scores is None


def test_logits_that_are_not_finite_fail_their_row_alone(towers: Towers) -> None:
    """Only rows that read a certain token meet a NaN."""
    context, denoiser = towers
    params = mixed(0.5, max_tokens=16)
    want = run(Pair.of(*towers), params)
    harmless = {*PROMPT, *tokens_of(want)}
    embedding = context.weights.embedding.clone()
    wrong = min(set(range(24)) - harmless)
    embedding[wrong] = torch.nan
    bad = ContextTower(context.config, replace(context.weights, embedding=embedding))
    pair = Pair.of(bad, denoiser)

    async def both() -> list[Any]:
        rows = (pair.blocks("good", PROMPT, params), pair.blocks("bad", [wrong, 5], params))
        return list(await asyncio.gather(*rows, return_exceptions=True))

    good, failed = asyncio.run(both())
    assert isinstance(failed, NumericalError)
    assert good == want
    pair.assert_empty()


@pytest.mark.slow
def test_the_shipped_model_commits_more_tokens_a_pass() -> None:
    """Real towers, real text: 1.53 and 1.66 over 100 prompts."""
    local = load_local(None, 20, 256)
    prompts = token_ids(local, 20)
    strict = GenerationParams(mode="verified", max_tokens=64, draft_source="denoiser")
    speeds = {
        params.acceptance: speed(prompts, *decode(local, prompts, params))["tokens_per_pass"]
        for params in (strict, replace(strict, acceptance="mix", mix_ratio=0.3))
    }
    assert 1.2 < speeds["strict"] < speeds["mix"] - 0.03
    assert speeds["mix"] < 2.5

"""Rows in real engines: any prompt and mode, limits, cancels and resumes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.rows import PROMPT, Pair, Towers, params_of, tokens_of
from tests.support.statistics import chi_square
from twotower.towers.decoding.services import Block
from twotower.towers.engine.prefill import prefill_pieces
from twotower.towers.errors import CapacityError

MODES = ["mask_diffusion", "ar", "mock_ar", "verified"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_resumed_row_has_the_same_tail(pair: Pair, mode: str, temperature: float) -> None:
    params = params_of(mode, max_tokens=30, block_size=8, temperature=temperature, top_p=0.95)
    whole = tokens_of(asyncio.run(pair.blocks("row", PROMPT, params)))
    for kept in (8, 24) if mode == "mask_diffusion" else (1, 17):
        tail = asyncio.run(pair.blocks("row", PROMPT, params, whole[:kept]))
        assert tokens_of(tail) == whole[kept:]
        assert tail[0].start == len(PROMPT) + kept
    pair.assert_empty()


def test_a_resumed_block_has_the_same_steps_and_confidences(pair: Pair) -> None:
    params = params_of(temperature=0.7, confidence_threshold=0.4, max_tokens=48)
    whole = asyncio.run(pair.blocks("row", [*PROMPT] * 15, params))
    tail = asyncio.run(pair.blocks("row", [*PROMPT] * 15, params, tokens_of(whole[:1])))
    for got, want in zip(tail, whole[1:], strict=True):
        assert got.token_ids == want.token_ids
        assert got.commit_steps == want.commit_steps
        assert got.confidences == want.confidences
        assert got.nfe == want.nfe


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompt", [[9], [3], [3, 3, 3], [0] * 65])
def test_any_prompt_and_any_number_of_tokens(pair: Pair, mode: str, prompt: list[int]) -> None:
    blocks = asyncio.run(pair.blocks("row", prompt, params_of(mode, max_tokens=19, block_size=8)))
    assert len(tokens_of(blocks)) == 19
    assert blocks[-1].finish_reason == "length"
    longer = asyncio.run(pair.blocks("row", prompt, params_of(mode, max_tokens=24, block_size=8)))
    assert tokens_of(longer)[:19] == tokens_of(blocks)
    pair.assert_empty()


def test_a_prompt_may_hold_the_mask_id(pair: Pair) -> None:
    """It is an ordinary token there: replacing it changes what follows."""
    params = params_of("ar", max_tokens=8, temperature=1.0)
    with_mask = tokens_of(asyncio.run(pair.blocks("row", [5, 3, 17], params)))
    without = tokens_of(asyncio.run(pair.blocks("row", [5, 4, 17], params)))
    assert with_mask != without


def test_only_autoregressive_rows_emit_the_mask_id(
    towers: Towers,
) -> None:
    pair = Pair.of(*towers)

    async def tokens(mode: str) -> list[int]:
        rows = [
            pair.blocks(f"{mode}{seed}", [1], params_of(mode, temperature=2.0, seed=seed))
            for seed in range(6)
        ]
        return [token for blocks in await asyncio.gather(*rows) for token in tokens_of(blocks)]

    assert 3 in asyncio.run(tokens("ar"))
    assert 3 in asyncio.run(tokens("mock_ar"))
    diffused = asyncio.run(tokens("mask_diffusion"))
    assert 3 not in diffused
    assert len(set(diffused)) > 15


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_tokens_follow_the_softmax_of_the_logits(
    towers: Towers, temperature: float
) -> None:
    """First tokens of many seeds, against the softmax of the prompt's last logits."""
    context, denoiser = towers
    pair = Pair.of(context, denoiser)
    state = context.new_state(len(PROMPT))
    prompt = PROMPT
    logits = context.logits(context.forward([prompt], [state])[-1:])[0].double()
    want = torch.softmax(logits / temperature, dim=-1)

    async def draw() -> list[int]:
        rows = [
            pair.blocks(
                f"{seed}",
                prompt,
                params_of("ar", max_tokens=1, temperature=temperature, seed=seed),
            )
            for seed in range(1000)
        ]
        return [token for blocks in await asyncio.gather(*rows) for token in tokens_of(blocks)]

    drawn = asyncio.run(draw())
    assert len(drawn) == 1000
    assert chi_square(drawn, want) > 1e-3
    pair.assert_empty()


@pytest.mark.parametrize("mode", MODES)
def test_a_seed_gives_the_same_alone_and_in_a_batch(pair: Pair, mode: str) -> None:
    prompts = [[7], PROMPT, [*PROMPT, 1, 2], [4, 3]]

    def row(seed: int) -> Any:
        params = params_of(mode, max_tokens=20, temperature=1.0, seed=seed)
        return pair.blocks(f"row{seed}", prompts[seed % 4], params)

    async def together() -> list[list[Block]]:
        return list(await asyncio.gather(*(row(seed) for seed in range(8))))

    batch = asyncio.run(together())
    for seed in (0, 3, 6):
        alone = asyncio.run(row(seed))
        assert tokens_of(alone) == tokens_of(batch[seed])
        assert [b.confidences for b in alone] == [b.confidences for b in batch[seed]]
    assert len({tuple(tokens_of(blocks)) for blocks in batch}) == 8


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("turns", [0, 1, 4, 15])
def test_a_cancelled_row_leaves_nothing_and_disturbs_nobody(
    pair: Pair, mode: str, turns: int
) -> None:
    async def run() -> list[Block]:
        params = params_of(mode, max_tokens=24)
        bad = asyncio.ensure_future(pair.blocks("bad", [*PROMPT] * 15, params))
        good = asyncio.ensure_future(pair.blocks("good", PROMPT, params_of(max_tokens=24)))
        for _ in range(turns):
            await asyncio.sleep(0)
        bad.cancel()
        with pytest.raises(asyncio.CancelledError):
            await bad
        # "good" has begun, or has not.
        assert max(pair.context.num_rows, pair.denoiser.num_rows) <= 1
        return await good

    blocks = asyncio.run(run())
    alone = asyncio.run(pair.blocks("alone", PROMPT, params_of(max_tokens=24)))
    assert tokens_of(blocks) == tokens_of(alone)
    pair.assert_empty()


def test_a_cancelled_row_is_freed_while_its_pass_runs(
    towers: Towers,
) -> None:
    pair = Pair.of(*towers, threaded=True)
    tower = pair.denoiser.tower
    slow = tower.forward

    def delayed(*args: Any, **kwargs: Any) -> Tensor:
        time.sleep(0.02)
        return slow(*args, **kwargs)

    async def run() -> None:
        task = asyncio.ensure_future(pair.blocks("row", PROMPT, params_of()))
        await asyncio.sleep(0.1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert pair.context.num_rows == pair.denoiser.num_rows == 0

    tower.forward = delayed  # type: ignore[method-assign]
    try:
        asyncio.run(run())
    finally:
        tower.forward = slow  # type: ignore[method-assign]


@pytest.mark.parametrize("length", [1, 2, 64, 65, 66, 140])
def test_scores_are_the_log_softmax_of_one_pass(pair: Pair, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 24, (length,), generator=generator).tolist()
    tower = pair.context.tower
    logits = tower.logits(tower.forward([tokens], [tower.new_state(length)])).double()
    table = torch.log_softmax(logits, dim=-1)
    want = [float(table[i, token]) for i, token in enumerate(tokens[1:])]
    assert asyncio.run(pair.context.score(tokens)).log_probs == pytest.approx(want, abs=2e-3)
    pair.assert_empty()


@pytest.mark.parametrize("length", [1, 64, 65, 140])
def test_logits_are_those_of_one_pass(pair: Pair, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    tokens = torch.randint(0, 24, (length,), generator=generator).tolist()
    tower = pair.context.tower
    want = tower.logits(tower.forward([tokens], [tower.new_state(length)]))
    got = asyncio.run(pair.context.logits(tokens))
    torch.testing.assert_close(got, want, atol=2e-3, rtol=0.0)
    pair.assert_empty()


def test_committed_tokens_never_change_and_t_is_the_rows_own(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    tower = pair.denoiser.tower
    forward = tower.forward
    seen: dict[int, list[tuple[list[int], float]]] = {}

    def watched(tokens: Any, timesteps: Any, states: Any) -> Tensor:
        for row, t, state in zip(tokens, timesteps, states, strict=True):
            seen.setdefault(state.position, []).append((list(row), t))
        return forward(tokens, timesteps, states)

    monkeypatch.setattr(tower, "forward", watched)
    params = params_of(
        block_size=8, temperature=0.9, confidence_threshold=0.3, commit_rule="released"
    )

    async def run() -> list[Block]:
        other = asyncio.ensure_future(pair.blocks("other", [1] * 70, params))
        blocks = await pair.blocks("row", PROMPT, params)
        await other
        return blocks

    for block in asyncio.run(run()):
        calls = seen[block.start]
        assert len(calls) == block.nfe == max(block.commit_steps) + 1
        for step, (tokens, t) in enumerate(calls):
            assert t == sum(own >= step for own in block.commit_steps) / 8
            for place, own in enumerate(block.commit_steps):
                assert tokens[place] == (block.token_ids[place] if own < step else 3)


@pytest.mark.parametrize("mode", MODES)
def test_an_eos_ends_its_own_row(pair: Pair, mode: str) -> None:
    params = params_of(mode, max_tokens=40)
    whole = tokens_of(asyncio.run(pair.blocks("row", PROMPT, params)))
    eos = whole[len(whole) // 2]
    stopping = params_of(mode, max_tokens=40, eos_token_id=eos)

    async def run() -> list[list[Block]]:
        rows = [pair.blocks("a", PROMPT, stopping), pair.blocks("b", PROMPT, params)]
        return list(await asyncio.gather(*rows))

    stopped, other = asyncio.run(run())
    assert tokens_of(stopped) == whole[: whole.index(eos) + 1]
    assert stopped[-1].finish_reason == "stop"
    assert tokens_of(other) == whole
    pair.assert_empty()


def test_passes_are_counted(pair: Pair) -> None:
    prompt = [*range(24)] * 3
    blocks = asyncio.run(pair.blocks("row", prompt, params_of(max_tokens=48)))
    assert [block.context_passes for block in blocks] == [2, 1, 1]
    assert pair.context.stats().passes == 4
    assert pair.denoiser.stats().passes == sum(block.nfe for block in blocks)
    assert pair.context.stats().pass_tokens == 72 + 32
    blocks = asyncio.run(pair.blocks("row", prompt, params_of("ar", max_tokens=20)))
    # The last token is drawn but never read.
    assert sum(block.context_passes for block in blocks) == 2 + 19


def test_a_row_is_open_once_and_a_release_is_forgiving(towers: Towers) -> None:
    pair = Pair.of(*towers, shared=False)

    async def run() -> None:
        for engine in (pair.context, pair.denoiser):
            assert engine.pool is not None
            await engine.release("unknown")
            await engine.open("row", 10)
            with pytest.raises(ValueError, match="row_id: row is open already"):
                await engine.open("row", 10)
            assert engine.stats().state_bytes > 0
            await engine.release("row")
            await engine.release("row")
        pair.assert_empty()

    asyncio.run(run())


def test_a_row_beyond_the_memory_is_refused(towers: Towers) -> None:
    pair = Pair.of(*towers, shared=False)

    async def run() -> None:
        for engine in (pair.context, pair.denoiser):
            with pytest.raises(CapacityError, match="expected at most 4096 tokens"):
                await engine.open("row", 10**15)
        pair.assert_empty()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("mode", "prompt", "generated", "lengths"),
    [
        ("mask_diffusion", 64, 0, [64]),
        ("mask_diffusion", 65, 16, [64, 1, 8, 8]),
        ("ar", 130, 3, [64, 64, 2, 1, 1, 1]),
        ("mock_ar", 1, 0, [1]),
        ("mock_ar", 65, 2, [64, 1, 1, 1]),
        ("mock_ar", 66, 0, [64, 1, 1]),
    ],
)
def test_prompts_are_cut_on_a_fixed_grid(
    mode: str, prompt: int, generated: int, lengths: list[int]
) -> None:
    tokens, done = list(range(prompt)), list(range(1000, 1000 + generated))
    pieces = prefill_pieces(tokens, done, params_of(mode, block_size=8), 64)
    assert [len(piece) for piece in pieces] == lengths
    assert [token for piece in pieces for token in piece] == tokens + done


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar"])
def test_a_copied_mirror_gives_what_a_shared_state_gives(towers: Towers, mode: str) -> None:
    results: list[Sequence[Block]] = []
    for shared in (True, False):
        for threaded in (False, True):
            pair = Pair.of(*towers, shared=shared, threaded=threaded)
            params = params_of(mode, max_tokens=20, temperature=0.5)
            results.append(asyncio.run(pair.blocks("row", PROMPT * 20, params)))
            pair.assert_empty()
    assert all(blocks == results[0] for blocks in results)

"""A pair over the tower actors' own classes and a real link, in one process without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path

import pytest

from twotower import TwoTower
from twotower.cluster.services.actors import ContextTowerActor, DenoiserTowerActor
from twotower.cluster.services.tower_services import PairServices
from twotower.cluster.topology import PairTopology
from twotower.deployments.pair.tower_pair import Job, TowerPair
from twotower.towers.decoding.services import Block, ProvisionalBlock
from twotower.towers.engine.options import EngineOptions
from twotower.towers.request.params import GenerationParams

TINY = Path(__file__).parents[2] / "golden" / "tiny_a"
TOPOLOGY = PairTopology(
    model_path=str(TINY),
    device="cpu",
    dtype="float32",
    engine=EngineOptions(max_num_seqs=3, max_context=256, prefix_cache_mib=0),
    cpus_per_tower=0.4,
    gpus_per_tower=0.0,
    num_threads=1,
)
DIFFUSION = GenerationParams(max_tokens=40, block_size=8, steps_per_block=4, seed=5)
PROMPTS = ([5, 6, 7, 8], list(range(10, 90)), [3, 4], [9])
MODES = (
    DIFFUSION,
    replace(DIFFUSION, mode="ar", temperature=1.0),
    replace(DIFFUSION, mode="mock_ar", max_tokens=6),
    replace(DIFFUSION, mode="verified", temperature=1.0),
)


Actors = tuple[ContextTowerActor, DenoiserTowerActor]


async def linked_towers() -> Actors:
    context, denoiser = ContextTowerActor(TOPOLOGY), DenoiserTowerActor(TOPOLOGY)
    await context.load()
    await denoiser.load()
    link = await denoiser.listen("secret")
    await context.connect(0, replace(link, epoch=1))
    return context, denoiser


@pytest.fixture
async def pair() -> AsyncIterator[TowerPair]:
    actors = await linked_towers()
    made = paired(actors)
    await made.check_health()
    yield made
    await settled(made)
    await closed(actors)


def paired(actors: Actors) -> TowerPair:
    async def start() -> PairServices:
        return PairServices(*actors)

    return TowerPair(start)


async def closed(actors: Actors) -> None:
    for actor in actors:
        await actor.close()


async def settled(pair: TowerPair) -> None:
    """Waits until nothing of any row is left on either side; fails after ten seconds."""
    for _ in range(1000):
        context, denoiser = (await pair.stats()).values()
        left = [context["rows"], denoiser["rows"], denoiser["mirrors"]]
        left += [context["slots_used"], denoiser["slots_used"], denoiser["pages_used"]]
        if not any(left):
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"rows left: {left}")


def job(
    number: int, prompt: list[int], params: GenerationParams, generated: tuple[int, ...] = ()
) -> Job:
    return Job(f"row-{number}", tuple(prompt), generated, params)


async def tokens_of(pair: TowerPair, asked: Job) -> list[int]:
    blocks = [block async for block in pair.generate(asked)]
    assert [block.finish_reason is None for block in blocks] == [True] * (len(blocks) - 1) + [False]
    return [token for block in blocks for token in block.token_ids]


async def test_concurrent_rows_get_what_they_get_in_one_process(pair: TowerPair) -> None:
    asked = [
        job(i, prompt, params)
        for i, (prompt, params) in enumerate(zip(PROMPTS, MODES, strict=True))
    ]
    together = await asyncio.gather(*(tokens_of(pair, one) for one in asked))
    model = await asyncio.to_thread(TwoTower.from_pretrained, TINY)
    for one, got in zip(asked, together, strict=True):
        options = {
            name: getattr(one.params, name)
            for name in (
                "mode",
                "max_tokens",
                "block_size",
                "steps_per_block",
                "temperature",
                "seed",
            )
        }
        alone = await asyncio.to_thread(model.generate, [list(one.prompt)], **options)
        assert got == alone[0].token_ids


async def test_a_resumed_row_ends_as_the_undisturbed_one(pair: TowerPair) -> None:
    whole = await tokens_of(pair, job(0, PROMPTS[1], DIFFUSION))
    rest = await tokens_of(pair, job(1, PROMPTS[1], DIFFUSION, tuple(whole[:16])))
    assert rest == whole[16:]


@pytest.mark.parametrize("params", MODES, ids=["mask_diffusion", "ar", "mock_ar", "verified"])
async def test_closing_a_stream_frees_its_row(pair: TowerPair, params: GenerationParams) -> None:
    async with aclosing(pair.generate(job(0, PROMPTS[1], params))) as blocks:
        first = await anext(blocks)
        assert isinstance(first, Block)
    await settled(pair)


@pytest.mark.parametrize("params", [DIFFUSION, MODES[3]], ids=["mask_diffusion", "verified"])
async def test_a_pair_hands_drafts_on(pair: TowerPair, params: GenerationParams) -> None:
    params = replace(params, max_tokens=16, draft_steps=4, draft_source="denoiser")
    asked = replace(params, provisional=True)
    items = [item async for item in pair.generate(job(0, PROMPTS[0], asked))]
    blocks = [item for item in items if isinstance(item, Block)]
    assert blocks == [block async for block in pair.generate(job(1, PROMPTS[0], params))]
    drafts = [item for item in items if isinstance(item, ProvisionalBlock)]
    assert len(drafts) == sum(block.nfe - 1 for block in blocks) > 0
    assert all(any(draft.masked) for draft in drafts)


async def test_closing_a_stream_at_a_draft_frees_its_row(pair: TowerPair) -> None:
    asked = replace(DIFFUSION, max_tokens=120, provisional=True)
    async with aclosing(pair.generate(job(0, PROMPTS[1], asked))) as items:
        assert isinstance(await anext(items), ProvisionalBlock)
    await settled(pair)


@pytest.mark.parametrize("delay", [0.0, 0.001, 0.005, 0.02, 0.05, 0.1])
async def test_cancelling_at_any_moment_frees_the_row(pair: TowerPair, delay: float) -> None:
    long = replace(DIFFUSION, max_tokens=120)
    tasks = [asyncio.create_task(tokens_of(pair, job(i, PROMPTS[1], long))) for i in range(5)]
    await asyncio.sleep(delay)
    for task in tasks[:4]:
        task.cancel()
    await asyncio.gather(*tasks[:4], return_exceptions=True)
    survivor = await tasks[4]
    assert survivor == await tokens_of(pair, job(9, PROMPTS[1], long))


async def test_signals_follow_the_rows(pair: TowerPair) -> None:
    """Three slots: of five rows two wait, and nothing is free until they have ended."""
    idle = await pair.record_autoscaling_stats()
    assert (idle["rows"], idle["queued_rows"], idle["free_slots"]) == (0, 0, 3)
    assert "denoiser_pass_s" not in idle
    long = replace(DIFFUSION, max_tokens=120)
    streams = [pair.generate(job(i, PROMPTS[0], long)) for i in range(5)]
    tasks = [asyncio.create_task(anext(stream)) for stream in streams]
    await asyncio.wait(tasks[:3])
    busy = await pair.record_autoscaling_stats()
    assert (busy["rows"], busy["queued_rows"], busy["free_slots"]) == (3, 2, 0)
    assert busy["passes"] > idle["passes"]
    assert 0 < busy["denoiser_pass_s"] < 10
    assert 0 < busy["context_pass_s"] < 10
    for task, stream in zip(tasks, streams, strict=True):
        task.cancel()
        await asyncio.wait([task])
        await stream.aclose()
    await settled(pair)
    ended = await pair.record_autoscaling_stats()
    assert (ended["rows"], ended["queued_rows"], ended["free_slots"]) == (0, 0, 3)


async def test_a_pair_that_has_not_started_says_nothing() -> None:
    async def never() -> PairServices:
        raise AssertionError("a question starts no towers")

    assert await TowerPair(never).record_autoscaling_stats() == {}


async def test_score(pair: TowerPair) -> None:
    model = await asyncio.to_thread(TwoTower.from_pretrained, TINY)
    scores = await pair.score(PROMPTS[1], 2)
    assert [len(line) for line in scores.top_log_probs] == [2] * (len(PROMPTS[1]) - 1)
    assert scores.log_probs == await asyncio.to_thread(model.score, PROMPTS[1])

"""Steps whose decisions the device takes: the bits, tokens and costs of the host's loop."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.random_model import small_config, write_checkpoint
from twotower.kernels.dispatch import force
from twotower.towers.checkpoint.weights import load_context_tower, load_denoiser_tower
from twotower.towers.decoding.draft_policy import STEP, Round
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.sampling import Sampler
from twotower.towers.decoding.services import Block, DraftCosts
from twotower.towers.decoding.unmasking import CommitRule, ReplayRule, ThresholdRule
from twotower.towers.engine import context_blocks, denoiser_steps, draft_rounds
from twotower.towers.engine import cuda_graph as captured
from twotower.towers.engine.block_log import BlockLog
from twotower.towers.engine.buckets import GRAPH_TOKENS, MAX_LENGTH, ROW_BUCKETS
from twotower.towers.engine.context_engine import ContextEngine
from twotower.towers.engine.cuda_graph import CapturedGraph, GraphMemory
from twotower.towers.engine.denoiser_engine import DenoiserEngine
from twotower.towers.engine.device_drafts import on_device
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.engine.options import EngineOptions
from twotower.towers.errors import NumericalError
from twotower.towers.model.context_tower import ContextTower
from twotower.towers.model.denoiser_tower import DenoiserTower
from twotower.towers.request.params import GenerationParams

CPU = torch.device("cpu")
OPTIONS = EngineOptions(max_num_seqs=160, max_context=256, prefix_cache_mib=0)
Towers = tuple[ContextTower, DenoiserTower]
Request = tuple[list[int], GenerationParams]


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Towers:
    config = small_config(layer_pattern="M*E-M*")
    folder = write_checkpoint(tmp_path_factory.mktemp("small"), config)
    return load_context_tower(folder), load_denoiser_tower(folder)


class ByTokens:
    """Rounds of all kinds, chosen by what the row holds: the same on every path and machine."""

    def __init__(self, params: GenerationParams, with_denoiser: bool) -> None:
        self.asks = with_denoiser and params.uses_denoiser

    def choose(self, match: int, room: int, _costs: DraftCosts) -> Round:
        if match and room:
            return Round("lookup", 1 + (3 * match + room) % room)
        return Round("denoiser", asks="checked") if self.asks and room % 2 else STEP

    def learn(self, *_: Any) -> None:
        pass

    def learn_draft(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def rounds_by_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(params: GenerationParams, *_: Any, with_denoiser: bool) -> ByTokens:
        return ByTokens(params, with_denoiser)

    monkeypatch.setattr(draft_rounds, "policy_of", chosen)


def params_of(mode: Any = "mask_diffusion", **changes: Any) -> GenerationParams:
    return GenerationParams(**({"mode": mode, "max_tokens": 40, "seed": 11} | changes))


def engines(
    towers: Towers,
    device_steps: bool,
    *,
    shared: bool = True,
    options: EngineOptions = OPTIONS,
    rule: Callable[[GenerationParams], CommitRule] | None = None,
) -> tuple[ContextEngine, DenoiserEngine]:
    context, denoiser = towers
    pool = None if shared else options.pool_for(denoiser)
    filling = DenoiserEngine(denoiser, options, pool=pool, device_steps=device_steps, rule=rule)
    link = LocalLink(context, filling, shared)
    return ContextEngine(context, link, options, device_steps=device_steps), filling


def decode(
    towers: Towers, requests: Sequence[Request], device_steps: bool, **changes: Any
) -> list[list[Block]]:
    """All requests at once."""
    reading, filling = engines(towers, device_steps, **changes)

    async def row(index: int) -> list[Block]:
        prompt, params = requests[index]
        blocks = generate_blocks(reading, filling, f"{index}", prompt, params)
        return [block async for block in blocks]

    async def rows() -> list[list[Block]]:
        return list(await asyncio.gather(*map(row, range(len(requests)))))

    done = asyncio.run(rows())
    assert reading.num_rows == filling.num_rows == 0
    return done


MANY: list[Request] = [
    (
        list(range(4, 6 + index % 5)),
        params_of(
            mode,
            block_size=(8, 16, 5, 1, 33)[index % 5],
            steps_per_block=(16, 4, 300)[index % 3],
            confidence_threshold=threshold,
            temperature=temperature,
            top_p=0.9 if index % 4 == 3 else None,
            min_tokens=7 * (index % 2),
            eos_token_id=9,
            draft_steps=1 + index % 3,
            commit_rule=("leftmost", "released", "product")[index % 3],
            first_token=(None, "context", "denoiser", None)[index % 4],
            seed=index,
            max_tokens=12 + index,
        ),
    )
    for index, (mode, temperature, threshold) in enumerate(
        (mode, temperature, threshold)
        for mode in ("mask_diffusion", "verified", "ar", "mock_ar")
        for temperature in (0.0, 1.0)
        for threshold in (0.0, 0.2, 1.0)
    )
]


@pytest.mark.parametrize("shared", [True, False])
def test_blocks_are_those_of_the_host(towers: Towers, shared: bool) -> None:
    """Modes, block lengths, filters and limits mixed, all rows in the same passes."""
    assert decode(towers, MANY, True, shared=shared) == decode(towers, MANY, False)


def test_only_extensions_that_draw_go_through_the_head(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    draw = context_blocks._Program._draw_next

    def counted(program: Any) -> None:
        drawn.append(len(program._slots))
        draw(program)

    monkeypatch.setattr(context_blocks._Program, "_draw_next", counted)
    how = {"max_tokens": 17, "block_size": 8}
    released, started = (params_of(commit_rule=rule, **how) for rule in ("released", "leftmost"))
    both: list[Request] = [([5, 6], released), ([5, 6], started)]
    alone = decode(towers, both[:1], True)
    assert drawn == []
    alone += decode(towers, both[1:], True)
    assert drawn == [1, 1]
    assert decode(towers, both, True) == alone


def test_drafts_that_are_all_accepted_stay_on_the_device(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mix of 1 looks at no scores."""
    how = {"acceptance": "mix", "mix_ratio": 1.0, "draft_source": "denoiser", "block_size": 8}
    params = params_of("verified", temperature=1.0, **how)
    want = decode(towers, [([5, 6], params)], False)
    assert sum(block.accepted_tokens for block in want[0]) > 20

    def refused(_: Any, works: Sequence[Any]) -> Sequence[Any]:
        assert not works
        return ()

    monkeypatch.setattr(DenoiserEngine, "_draw", refused)
    assert decode(towers, [([5, 6], params)], True) == want


def test_a_row_alone_is_the_row_among_others(towers: Towers) -> None:
    together = decode(towers, MANY[:12], True)
    for request, want in zip(MANY[:12], together, strict=True):
        assert decode(towers, [request], True) == [want]


def test_more_rows_than_the_largest_bucket(towers: Towers) -> None:
    count = ROW_BUCKETS[-1] + 7
    requests = [
        ([4 + row % 17], params_of(mode, max_tokens=6, block_size=4, seed=row))
        for row, mode in zip(range(count), ["mask_diffusion", "ar"] * count, strict=False)
    ]
    wide = replace(OPTIONS, max_num_batched_tokens=4096)
    assert decode(towers, requests, True, options=wide) == decode(towers, requests, False)


@pytest.mark.parametrize("schedule", [(1,) * 16, (16,), (5, 1, 10), (3, 4)])
def test_a_recorded_schedule_is_followed_to_the_letter(
    towers: Towers, schedule: tuple[int, ...]
) -> None:
    def rule(_: GenerationParams) -> CommitRule:
        return ReplayRule(schedule)

    request = ([5, 7], params_of(max_tokens=32, commit_rule="released"))
    (blocks,) = decode(towers, [request], True, rule=rule)
    assert [blocks] == decode(towers, [request], False, rule=rule)
    want = schedule if sum(schedule) == 16 else (*schedule, 16 - sum(schedule))
    for block in blocks:
        assert tuple(block.commit_steps.count(step) for step in range(block.nfe)) == want


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
def test_logits_that_are_not_finite_fail_their_row_alone(towers: Towers, mode: str) -> None:
    """Only rows that read a certain token meet a NaN."""
    context, denoiser = towers
    healthy = ([5, 6], params_of(mode, max_tokens=16))
    want = decode(towers, [healthy], False)
    harmless = {token for block in want[0] for token in block.token_ids} | {5, 6}
    wrong = min(set(range(4, 24)) - harmless)
    embedding = context.weights.embedding.clone()
    embedding[wrong] = float("nan")
    bad = replace(context.weights, embedding=embedding)
    pair = (ContextTower(context.config, bad), denoiser)
    reading, filling = engines(pair, True)

    async def row(row_id: str, prompt: list[int]) -> list[Block]:
        blocks = generate_blocks(reading, filling, row_id, prompt, healthy[1])
        return [block async for block in blocks]

    async def both() -> list[Any]:
        rows = row("good", healthy[0]), row("bad", [5, wrong, 6])
        return list(await asyncio.gather(*rows, return_exceptions=True))

    good, failed = asyncio.run(both())
    assert isinstance(failed, NumericalError)
    assert [good] == want
    assert reading.num_rows == filling.num_rows == 0


GREEDY = Sampler(0.0, None, None, None, key=1)


@pytest.mark.parametrize(
    ("rule", "sampler", "length", "wanted"),
    [
        (ThresholdRule(0.5, 16), GREEDY, 16, True),
        (ThresholdRule(0.5, 16), GREEDY, MAX_LENGTH, True),
        (ThresholdRule(0.5, 16), GREEDY, MAX_LENGTH + 1, False),
        (ReplayRule((1,) * 16), GREEDY, 16, True),
        (ReplayRule((1,) * 64), GREEDY, 64, False),
        (ThresholdRule(0.5, 16), replace(GREEDY, temperature=1.0), 16, True),
        (ThresholdRule(0.5, 16), replace(GREEDY, temperature=1.0, top_k=5), 16, False),
        # Filters mean nothing to a greedy row.
        (ThresholdRule(0.5, 16), replace(GREEDY, top_k=5), 16, True),
    ],
)
def test_what_the_device_can_decide(
    rule: CommitRule, sampler: Sampler, length: int, wanted: bool
) -> None:
    assert on_device(rule, sampler, length) is wanted


def test_padding_beside_blocks_of_another_length(towers: Towers) -> None:
    """Three rows fill a bucket of four: its padding must not read the timestep of slot 0, whose
    block is longer than theirs, nor that of a longer block that was cancelled there."""
    long = ([5, 9], params_of(max_tokens=33, block_size=33))
    short = [([7, 8, index], params_of(max_tokens=10, block_size=5)) for index in range(3)]
    got = decode(towers, [long, *short], True)
    assert got == decode(towers, [long, *short], False)

    reading, filling = engines(towers, True)

    async def row(name: str, request: Request) -> list[Block]:
        return [block async for block in generate_blocks(reading, filling, name, *request)]

    async def beside_a_cancelled_one() -> list[list[Block]]:
        first = asyncio.ensure_future(row("long", long))
        while filling.stats().passes < 2:
            await asyncio.sleep(0)
        # Its slot stays as it was left while the others hold the next three.
        others = [asyncio.ensure_future(row(f"{index}", own)) for index, own in enumerate(short)]
        while reading.stats().slots_used < 4:
            await asyncio.sleep(0)
        first.cancel()
        return list(await asyncio.gather(*others))

    assert asyncio.run(beside_a_cancelled_one()) == got[1:]


def test_only_so_many_programs_are_kept(towers: Towers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block lengths are the clients': buffers and graphs of all that were ever asked for would
    fill a device."""
    monkeypatch.setattr(captured, "MAX_PROGRAMS", 3)
    closed: list[int] = []
    monkeypatch.setattr(CapturedGraph, "close", lambda _: closed.append(1))
    requests = [
        ([5, 9], params_of(max_tokens=size, block_size=size, commit_rule="released"))
        for size in range(1, 7)
    ]
    reading, filling = engines(towers, True)

    async def rows() -> list[list[Block]]:
        return [
            [block async for block in generate_blocks(reading, filling, f"{index}", *request)]
            for index, request in enumerate(requests)
        ]

    got = asyncio.run(rows())
    assert filling._steps is not None
    assert len(filling._steps._programs) == 3
    # The pass and three sizes of its head, which may coincide.
    assert len(closed) == sum(
        1 + len({-(-size // share) for share in (4, 2, 1)}) for size in range(1, 4)
    )
    assert got == [decode(towers, [request], False)[0] for request in requests]


def test_programs_that_are_dropped_are_gone_at_once(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their buffers are a device's memory, and no collection may come for a long while."""
    monkeypatch.setattr(captured, "MAX_PROGRAMS", 2)
    requests = [([5, 9], params_of(max_tokens=2 * size, block_size=size)) for size in range(1, 9)]
    gc.collect()
    gc.disable()
    try:
        reading, filling = engines(towers, True)

        async def rows() -> None:
            for index, request in enumerate(requests):
                async for _ in generate_blocks(reading, filling, f"{index}", *request):
                    pass

        asyncio.run(rows())
        alive = [type(own) for own in gc.get_objects()]
        assert alive.count(denoiser_steps._Program) == 2
        assert alive.count(context_blocks._Program) <= 2
    finally:
        gc.enable()


def test_logs_of_blocks_grow_a_few_times_only(towers: Towers) -> None:
    context, _ = towers
    pool = OPTIONS.pool_for(context)
    log = BlockLog(context)
    blocks = context_blocks.ContextBlocks(context, GraphMemory(CPU), log)
    made = []
    new_log = context.new_log
    try:
        context.new_log = lambda n, **own: made.append(n) or new_log(n, **own)  # type: ignore
        for length in range(1, MAX_LENGTH + 1):
            blocks.warm_up(pool, length, 160)
        blocks.warm_up(pool, MAX_LENGTH + 1, 160)
    finally:
        del context.new_log
    assert made == [128, 256, 512, 1024, 2048]
    assert made[-1] == GRAPH_TOKENS


def test_a_capture_without_room_costs_the_graph_and_nothing_else(
    towers: Towers, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def full(_: CapturedGraph) -> None:
        tried.append(1)
        raise torch.OutOfMemoryError("no room")

    request = ([5, 9], params_of(max_tokens=64, steps_per_block=16, confidence_threshold=1.0))
    want = decode(towers, [request], True)
    monkeypatch.setattr(CapturedGraph, "ready", False)
    monkeypatch.setattr(CapturedGraph, "capture", full)
    assert decode(towers, [request], True) == want
    # 64 steps of the denoiser, tried again after every eighth.
    assert 4 <= len(tried) <= 8


def test_warming_up_prepares_every_bucket_and_changes_no_row(towers: Towers) -> None:
    request = MANY[0]
    reading, filling = engines(towers, True, shared=False)
    reading.warm_up()
    filling.warm_up(request[1].block_size)

    async def row() -> list[Block]:
        blocks = generate_blocks(reading, filling, "row", *request)
        return [block async for block in blocks]

    assert [asyncio.run(row())] == decode(towers, [request], False)


# Padding's tokens hold whatever stood in memory; numpy, here the interpreter's, warns of that.
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
@pytest.mark.parametrize("mode", ["ar", "mask_diffusion"])
def test_with_the_kernels_instead_of_the_references(tmp_path: Path, mode: str) -> None:
    """The whole step through Triton, under its interpreter where there is no GPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = write_checkpoint(tmp_path, small_config(layer_pattern="M*E"))
    kernels = (
        load_context_tower(folder, device, for_triton=True),
        load_denoiser_tower(folder, device, for_triton=True),
    )
    request = ([5, 9, 4], params_of(mode, max_tokens=6, block_size=4, temperature=0.8))
    with force("triton"):
        got = decode(kernels, [request], True)
    want = decode((load_context_tower(folder), load_denoiser_tower(folder)), [request], False)
    assert [block.token_ids for block in got[0]] == [block.token_ids for block in want[0]]

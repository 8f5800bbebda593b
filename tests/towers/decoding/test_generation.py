"""The block loop with scripted towers: exact tokens out, exact calls in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from twotower.towers.decoding.generation import committed, cut, generate_blocks
from twotower.towers.decoding.services import (
    UNKNOWN_COSTS,
    Block,
    BlockTiming,
    DraftCosts,
    Extended,
    Prefilled,
    ProvisionalBlock,
    Scores,
    Token,
    Watcher,
)
from twotower.towers.errors import CapacityError, NumericalError, UnavailableError
from twotower.towers.request.params import GenerationParams

PROMPT = [7, 8, 9]
EOS = 2


@dataclass
class Script:
    """The output that both towers pretend to make, and what they were asked to do.

    `fail` maps a call, such as "denoise" or "extend", to the error that it raises; the number
    after it says at which of these calls. `told` is the output that each call was given, `drafts`
    the number of drafts of a block for those who watch it.
    """

    output: Sequence[int]
    fail: dict[str, Exception] = field(default_factory=dict)
    calls: list[Any] = field(default_factory=list)
    rows: dict[str, set[str]] = field(default_factory=lambda: {"context": set(), "denoiser": set()})
    counts: dict[str, int] = field(default_factory=dict)
    told: list[tuple[int, ...]] = field(default_factory=list)
    drafts: int = 2

    async def step(self, name: str, *details: Any) -> None:
        self.calls.append((name, *details))
        await asyncio.sleep(0)
        self.counts[name] = self.counts.get(name, 0) + 1
        error = self.fail.get(name) or self.fail.get(f"{name} {self.counts[name]}")
        if error is not None:
            raise error

    def part(self, position: int, count: int) -> tuple[int, ...]:
        start = position - len(PROMPT)
        return tuple(self.output[start : start + count])


class Side:
    """What both scripted towers share: rows that are opened and released."""

    def __init__(self, script: Script, name: str) -> None:
        self.script = script
        self.rows = script.rows[name]
        self.name = name

    async def open(self, row_id: str, capacity: int) -> int:
        await self.script.step(f"{self.name} open", capacity)
        self.rows.add(row_id)
        return 7

    async def release(self, row_id: str) -> None:
        await self.script.step(f"{self.name} release")
        self.rows.discard(row_id)


class ScriptedContext(Side):
    """A context tower whose every call is written down."""

    position = 0

    async def prefill(
        self, row_id: str, prompt: Sequence[int], generated: Sequence[int], params: GenerationParams
    ) -> Prefilled:
        assert row_id in self.rows
        assert params.seed is not None
        self.position = len(prompt) + len(generated)
        await self.script.step("prefill", *prompt, *generated)
        return Prefilled(5, first=self._first(params))

    async def extend(
        self, row_id: str, token_ids: Sequence[int], params: GenerationParams, output: Sequence[int]
    ) -> Extended:
        assert row_id in self.rows
        await self.script.step("extend", *token_ids)
        self.position += len(token_ids)
        if params.starts_with_context:
            self.script.told.append(tuple(output))
        return Extended(1, self._first(params))

    def _first(self, params: GenerationParams) -> Token | None:
        """The token at the position where the context ends, if this tower draws it."""
        if not params.starts_with_context:
            return None
        top = ((1, -0.5),) if params.top_logprobs else None
        return Token(*self.script.part(self.position, 1), 0.75, -0.25, top)

    async def decode(
        self,
        row_id: str,
        count: int,
        params: GenerationParams,
        output: Sequence[int] = (),
        _costs: DraftCosts = UNKNOWN_COSTS,
    ) -> Block:
        self.script.told.append(tuple(output))
        assert row_id in self.rows
        assert params.mode == "ar"
        await self.script.step("decode", count)
        tokens = self.script.part(self.position, count)
        start, self.position = self.position, self.position + len(tokens)
        return block_of(tokens, start, nfe=0, passes=len(tokens))

    async def verify(self, *_: Any) -> Block:
        raise NotImplementedError

    async def update_mirror(self, row_id: str) -> None:
        raise NotImplementedError

    async def score(self, *_: Any) -> Scores:
        raise NotImplementedError


class ScriptedDenoiser(Side):
    """A denoiser tower that waits until the context stands where it should."""

    def __init__(self, script: Script, context: ScriptedContext) -> None:
        super().__init__(script, "denoiser")
        self.context = context

    async def denoise_block(
        self,
        row_id: str,
        position: int,
        params: GenerationParams,
        known: Sequence[int],
        output: Sequence[int],
        watch: Watcher | None,
    ) -> Block:
        self.script.told.append(tuple(output))
        assert tuple(known) == self.script.part(position, int(params.starts_with_context))
        assert row_id in self.rows
        await self._at(position)
        for step in range(self.script.drafts if watch else 0):
            assert watch is not None
            watch(draft_of(position, step))
            await asyncio.sleep(0)
        await self.script.step("denoise", position)
        return block_of(self.script.part(position, params.block_size), position, nfe=3)

    async def next_token(
        self,
        row_id: str,
        position: int,
        last_token: int,
        params: GenerationParams,
        output: Sequence[int],
    ) -> Block:
        self.script.told.append(tuple(output))
        assert row_id in self.rows
        assert params.mode == "mock_ar"
        await self._at(position)
        await self.script.step("next", position, last_token)
        return block_of(self.script.part(position, 1), position, nfe=1)

    async def _at(self, position: int) -> None:
        while self.context.position != position:
            await asyncio.sleep(0)


def block_of(tokens: tuple[int, ...], start: int, nfe: int, passes: int = 0) -> Block:
    steps = tuple(range(len(tokens)))
    return Block(start, tokens, steps, tuple(0.1 * (s + 1) for s in steps), nfe, passes)


def draft_of(start: int, step: int) -> ProvisionalBlock:
    return ProvisionalBlock(start, step, (step,), (True,), (0.5,))


def make_row(script: Script, params: GenerationParams, generated: Sequence[int] = ()) -> Any:
    context = ScriptedContext(script, "context")
    denoiser = ScriptedDenoiser(script, context)
    return generate_blocks(context, denoiser, "row", PROMPT, params, generated)


async def collect(
    script: Script, params: GenerationParams, generated: Sequence[int] = ()
) -> list[Block]:
    blocks = [block async for block in make_row(script, params, generated)]
    assert script.rows == {"context": set(), "denoiser": set()}
    return blocks


def params_of(mode: Any = "mask_diffusion", **changes: Any) -> GenerationParams:
    """Blocks of 4; in mode `started` mask_diffusion with a first token of the context tower."""
    rule = {"commit_rule": "released" if mode == "mask_diffusion" else "leftmost"}
    named = {"mode": "mask_diffusion" if mode == "started" else mode}
    return GenerationParams(**{**named, **rule, "block_size": 4, "seed": 1, **changes})


def names(script: Script) -> list[str]:
    return [call[0] for call in script.calls]


async def test_a_diffusion_row_call_by_call() -> None:
    script = Script(range(10, 30))
    blocks = await collect(script, params_of(max_tokens=10))
    assert [block.token_ids for block in blocks] == [(10, 11, 12, 13), (14, 15, 16, 17), (18, 19)]
    assert [block.start for block in blocks] == [3, 7, 11]
    assert [block.finish_reason for block in blocks] == [None, None, "length"]
    assert [block.nfe for block in blocks] == [3, 3, 3]
    assert [block.context_passes for block in blocks] == [5, 1, 1]
    assert blocks[2].commit_steps == (0, 1)
    assert blocks[2].confidences == (0.1, 0.2)
    # The last block is not read: nobody continues from it.
    assert script.calls == [
        ("context open", 15),
        ("denoiser open", 15),
        ("prefill", 7, 8, 9),
        ("denoise", 3),
        ("extend", 10, 11, 12, 13),
        ("denoise", 7),
        ("extend", 14, 15, 16, 17),
        ("denoise", 11),
        ("denoiser release",),
        ("context release",),
    ]


async def test_a_row_with_first_tokens_of_the_context_tower_call_by_call() -> None:
    script = Script(range(10, 30))
    blocks = await collect(script, params_of("started", max_tokens=10))
    assert [block.token_ids for block in blocks] == [(10, 11, 12, 13), (14, 15, 16, 17), (18, 19)]
    assert [block.nfe for block in blocks] == [3, 3, 3]
    assert [block.context_passes for block in blocks] == [5, 1, 1]
    assert [block.confidences[:2] for block in blocks] == [(0.75, 0.2)] * 3
    assert script.calls == [
        ("context open", 15),
        ("denoiser open", 15),
        ("prefill", 7, 8, 9),
        ("denoise", 3),
        ("extend", 10, 11, 12, 13),
        ("denoise", 7),
        ("extend", 14, 15, 16, 17),
        ("denoise", 11),
        ("denoiser release",),
        ("context release",),
    ]


async def test_a_block_of_one_token_of_the_context_tower_needs_no_denoiser() -> None:
    script = Script(range(10, 30))
    how = {"max_tokens": 3, "block_size": 1, "top_logprobs": 1}
    blocks = await collect(script, params_of("started", **how))
    assert [block.token_ids for block in blocks] == [(10,), (11,), (12,)]
    assert [block.nfe for block in blocks] == [0, 0, 0]
    assert [block.context_passes for block in blocks] == [5, 1, 1]
    for block in blocks:
        assert (block.confidences, block.log_probs) == ((0.75,), (-0.25,))
        assert (block.commit_steps, block.top_log_probs) == ((0,), (((1, -0.5),),))
    assert "denoise" not in names(script)


@pytest.mark.parametrize("place", [0, 4])
async def test_an_eos_of_the_context_tower_ends_the_row_without_the_denoiser(place: int) -> None:
    output = [*range(10, 10 + place), EOS, *range(20, 30)]
    script = Script(output)
    blocks = await collect(script, params_of("started", max_tokens=9, eos_token_id=EOS))
    assert [block.token_ids for block in blocks][-1] == (EOS,)
    assert (blocks[-1].finish_reason, blocks[-1].nfe) == ("stop", 0)
    assert names(script).count("denoise") == place // 4


async def test_a_row_is_eased_by_who_waits_when_it_begins() -> None:
    asked: list[int] = []
    seen: list[GenerationParams] = []

    def ease(waiting: int) -> float:
        asked.append(waiting)
        return 0.5

    script = Script(range(10, 30))
    context = ScriptedContext(script, "context")

    class Watched(ScriptedDenoiser):
        async def denoise_block(
            self, row_id: str, position: int, params: GenerationParams, *how: Any
        ) -> Block:
            seen.append(params)
            return await super().denoise_block(row_id, position, params, *how)

    params = params_of(max_tokens=10, steps_per_block=8, min_steps_per_block=2)
    row = generate_blocks(context, Watched(script, context), "row", PROMPT, params, ease=ease)
    blocks = [block async for block in row]
    # Seven wait, says the context tower.
    assert asked == [7]
    assert [block.eased for block in blocks] == [0.5] * 3
    assert [one.steps_per_block for one in seen] == [5] * 3


async def test_the_context_is_extended_while_the_block_is_handed_out() -> None:
    script = Script(range(10, 30))
    row = make_row(script, params_of(max_tokens=8))
    await anext(row)
    assert "extend" not in names(script)
    await asyncio.sleep(0)
    assert names(script)[-1] == "extend"
    await anext(row)
    await row.aclose()


@pytest.mark.parametrize(
    ("mode", "max_tokens", "lengths"),
    [
        ("mask_diffusion", 1, [1]),
        ("mask_diffusion", 4, [4]),
        ("mask_diffusion", 5, [4, 1]),
        ("mask_diffusion", 12, [4, 4, 4]),
        ("started", 1, [1]),
        ("started", 5, [4, 1]),
        ("started", 12, [4, 4, 4]),
        ("ar", 1, [1]),
        ("ar", 6, [4, 2]),
        ("mock_ar", 3, [1, 1, 1]),
    ],
)
async def test_any_number_of_tokens(mode: str, max_tokens: int, lengths: list[int]) -> None:
    blocks = await collect(Script(range(10, 40)), params_of(mode, max_tokens=max_tokens))
    assert [len(block.token_ids) for block in blocks] == lengths
    tokens = [token for block in blocks for token in block.token_ids]
    assert tokens == list(range(10, 10 + max_tokens))
    assert [block.finish_reason for block in blocks] == [None] * (len(lengths) - 1) + ["length"]


@pytest.mark.parametrize("mode", ["mask_diffusion", "started", "ar", "mock_ar"])
@pytest.mark.parametrize("place", range(9))
async def test_the_first_eos_ends_the_row(mode: str, place: int) -> None:
    output = list(range(10, 40))
    output[place] = output[place + 2] = EOS
    script = Script(output)
    blocks = await collect(script, params_of(mode, max_tokens=9, eos_token_id=EOS))
    tokens = [token for block in blocks for token in block.token_ids]
    assert tokens == output[: place + 1]
    assert blocks[-1].finish_reason == "stop"
    assert all(block.finish_reason is None for block in blocks[:-1])
    extended = [token for name, *given in script.calls if name == "extend" for token in given]
    assert EOS not in extended


@pytest.mark.parametrize("mode", ["mask_diffusion", "started", "ar", "mock_ar"])
async def test_an_eos_behind_the_limit_does_not_count(mode: str) -> None:
    output = [10, 11, 12, EOS, 14, 15, 16, 17]
    blocks = await collect(Script(output), params_of(mode, max_tokens=3, eos_token_id=EOS))
    assert blocks[-1].finish_reason == "length"
    assert sum(len(block.token_ids) for block in blocks) == 3


async def test_without_an_eos_id_nothing_stops_a_row() -> None:
    blocks = await collect(Script([EOS] * 8), params_of(max_tokens=8))
    assert blocks[-1].finish_reason == "length"


async def test_an_autoregressive_row_leaves_the_denoiser_alone() -> None:
    script = Script(range(10, 30))
    blocks = await collect(script, params_of("ar", max_tokens=6))
    assert [block.nfe for block in blocks] == [0, 0]
    assert script.calls[:3] == [("context open", 9), ("prefill", 7, 8, 9), ("decode", 4)]
    assert "denoiser open" not in names(script)
    assert "extend" not in names(script)


async def test_a_mock_row_token_by_token() -> None:
    script = Script(range(10, 30))
    blocks = await collect(script, params_of("mock_ar", max_tokens=3))
    assert [block.nfe for block in blocks] == [1, 1, 1]
    assert script.calls[2:8] == [
        ("prefill", 7, 8, 9),
        ("next", 3, 9),
        ("extend", 10),
        ("next", 4, 10),
        ("extend", 11),
        ("next", 5, 11),
    ]


@pytest.mark.parametrize("mode", ["mask_diffusion", "started", "ar", "mock_ar"])
async def test_a_resumed_row_goes_on_where_it_stood(mode: str) -> None:
    output = list(range(10, 40))
    script = Script(output)
    blocks = await collect(script, params_of(mode, max_tokens=11), generated=output[:4])
    assert blocks[0].start == 7
    assert [token for block in blocks for token in block.token_ids] == output[4:11]
    assert blocks[-1].finish_reason == "length"
    assert ("prefill", 7, 8, 9, 10, 11, 12, 13) in script.calls
    if mode == "mock_ar":
        assert ("next", 7, 13) in script.calls
    assert script.calls[0] == ("context open", 3 + (11 if mode in ("ar", "mock_ar") else 12))


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar"])
async def test_a_mode_that_needs_a_denoiser_says_so(mode: str) -> None:
    context = ScriptedContext(Script([]), "context")
    with pytest.raises(ValueError, match=f"mode: {mode} needs a denoiser"):
        await anext(generate_blocks(context, None, "row", PROMPT, params_of(mode)))


async def exhaust(row: AsyncIterator[Block], seen: list[Block]) -> None:
    async for block in row:
        seen.append(block)


@pytest.mark.parametrize(
    ("call", "mode", "blocks"),
    [
        ("context open", "mask_diffusion", 0),
        ("denoiser open", "mask_diffusion", 0),
        ("prefill", "mask_diffusion", 0),
        ("denoise 1", "mask_diffusion", 0),
        ("denoise 3", "mask_diffusion", 2),
        ("extend 1", "mask_diffusion", 1),
        ("prefill", "started", 0),
        ("denoise 2", "started", 1),
        ("extend 1", "started", 1),
        ("decode 2", "ar", 1),
        ("next 2", "mock_ar", 1),
        ("extend 2", "mock_ar", 2),
    ],
)
@pytest.mark.parametrize("error", [CapacityError("full"), NumericalError("nan"), KeyError("row")])
async def test_an_error_ends_the_row_and_frees_it(
    call: str, mode: str, blocks: int, error: Exception
) -> None:
    script = Script(range(10, 40), fail={call: error})
    seen: list[Block] = []
    with pytest.raises(type(error)):
        await exhaust(make_row(script, params_of(mode, max_tokens=16)), seen)
    assert len(seen) == blocks
    assert script.rows == {"context": set(), "denoiser": set()}
    sides = ["context"] if mode == "ar" else ["denoiser", "context"]
    assert names(script)[-len(sides) :] == [f"{side} release" for side in sides]


async def test_a_failing_release_still_frees_the_other_side() -> None:
    script = Script(range(10, 40), fail={"denoiser release": UnavailableError("gone")})
    with pytest.raises(UnavailableError):
        await collect(script, params_of(max_tokens=4))
    assert script.rows["context"] == set()
    assert names(script)[-1] == "context release"


@pytest.mark.parametrize("mode", ["mask_diffusion", "started"])
@pytest.mark.parametrize("turns", range(14))
async def test_a_cancelled_row_is_freed_wherever_it_stands(turns: int, mode: str) -> None:
    script = Script(range(10, 100))
    task = asyncio.ensure_future(collect(script, params_of(mode, max_tokens=40)))
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script.rows == {"context": set(), "denoiser": set()}


@pytest.mark.parametrize("taken", [1, 2])
async def test_a_reader_that_leaves_frees_the_row(taken: int) -> None:
    script = Script(range(10, 100))
    row = make_row(script, params_of(max_tokens=40))
    for _ in range(taken):
        await anext(row)
    await row.aclose()
    assert script.rows == {"context": set(), "denoiser": set()}
    assert names(script)[-2:] == ["denoiser release", "context release"]


async def test_a_reader_that_leaves_does_not_wait_for_a_stuck_context() -> None:
    class StuckContext(ScriptedContext):
        async def extend(self, row_id: str, token_ids: Sequence[int], *_: Any) -> Extended:
            await self.script.step("extend", row_id, *token_ids)
            await asyncio.Event().wait()
            raise AssertionError("nobody sets the event")

    script = Script(range(10, 100))
    context = StuckContext(script, "context")
    denoiser = ScriptedDenoiser(script, context)
    row = generate_blocks(context, denoiser, "row", PROMPT, params_of(max_tokens=40))
    async with asyncio.timeout(5):
        await anext(row)
        await asyncio.sleep(0)
        await row.aclose()
    assert script.rows == {"context": set(), "denoiser": set()}


@pytest.mark.parametrize(
    ("left", "eos", "tokens", "reason"),
    [
        (9, None, (5, 2, 6, 2), None),
        (4, None, (5, 2, 6, 2), "length"),
        (3, None, (5, 2, 6), "length"),
        (9, 2, (5, 2), "stop"),
        (2, 2, (5, 2), "stop"),
        (1, 2, (5,), "length"),
        (9, 7, (5, 2, 6, 2), None),
    ],
)
def test_cutting_a_block(
    left: int, eos: int | None, tokens: tuple[int, ...], reason: str | None
) -> None:
    block = cut(block_of((5, 2, 6, 2), 3, nfe=2), left, eos)
    assert block.token_ids == tokens
    assert block.finish_reason == reason
    assert len(block.commit_steps) == len(block.confidences) == len(tokens)
    assert (block.start, block.nfe) == (3, 2)


PENALIZED: dict[str, Any] = {"frequency_penalty": 0.5, "max_tokens": 10}


@pytest.mark.parametrize("mode", ["mask_diffusion", "ar"])
async def test_with_penalties_every_call_is_told_the_output(mode: Any) -> None:
    script = Script(range(10, 30))
    await collect(script, params_of(mode, **PENALIZED))
    assert script.told == [(), tuple(range(10, 14)), tuple(range(10, 18))]
    script = Script(range(10, 30))
    await collect(script, params_of(mode, presence_penalty=-1.0, max_tokens=10), range(10, 14))
    assert script.told == [tuple(range(10, 14)), tuple(range(10, 18))]
    script = Script(range(10, 30))
    await collect(script, params_of("mock_ar", **PENALIZED | {"max_tokens": 3}))
    assert script.told == [(), (10,), (10, 11)]


async def test_with_penalties_first_tokens_are_part_of_the_output() -> None:
    """The denoiser is told the first token of its block; the extension what it reads."""
    script = Script(range(10, 30))
    await collect(script, params_of("started", **PENALIZED))
    told = [(10,), range(10, 14), range(10, 15), range(10, 18), range(10, 19)]
    assert script.told == [tuple(output) for output in told]
    script = Script(range(10, 30))
    await collect(script, params_of("started", **PENALIZED), range(10, 14))
    assert script.told == [tuple(output) for output in told[2:]]


@pytest.mark.parametrize("mode", ["mask_diffusion", "started", "ar", "mock_ar"])
async def test_without_penalties_no_call_carries_the_output(mode: Any) -> None:
    script = Script(range(10, 30))
    how = {"logit_bias": {3: 1.0}, "top_logprobs": 2}
    await collect(script, params_of(mode, max_tokens=10, **how))
    assert set(script.told) == {()}


async def test_drafts_come_before_their_block() -> None:
    script = Script(range(10, 30))
    items = [item async for item in make_row(script, params_of(max_tokens=8, provisional=True))]
    assert [item for item in items if isinstance(item, ProvisionalBlock)] == [
        draft_of(start, step) for start in (3, 7) for step in (0, 1)
    ]
    kinds = [type(item) for item in items]
    assert kinds == [ProvisionalBlock, ProvisionalBlock, Block] * 2
    assert [item for item in items if isinstance(item, Block)] == await collect(
        Script(range(10, 30)), params_of(max_tokens=8)
    )


async def test_drafts_begin_with_the_token_of_the_context_tower() -> None:
    script = Script(range(10, 30))
    params = params_of("started", max_tokens=8, provisional=True)
    items = [item async for item in make_row(script, params)]
    drafts = [item for item in items if isinstance(item, ProvisionalBlock)]
    assert [draft.start for draft in drafts] == [3, 3, 7, 7]
    assert all(draft.confidences == (0.75,) for draft in drafts)


async def test_a_slow_reader_gets_the_latest_draft() -> None:
    script = Script(range(10, 30), drafts=5)
    row = make_row(script, params_of(max_tokens=8, provisional=True))
    assert await anext(row) == draft_of(3, 0)
    while "denoise" not in names(script):
        await asyncio.sleep(0)
    assert await anext(row) == draft_of(3, 4)
    assert isinstance(await anext(row), Block)
    await row.aclose()


@pytest.mark.parametrize("mode", ["ar", "mock_ar"])
async def test_modes_without_drafts_have_none(mode: Any) -> None:
    wanted = await collect(Script(range(10, 30)), params_of(mode, max_tokens=6))
    got = await collect(Script(range(10, 30)), params_of(mode, max_tokens=6, provisional=True))
    assert got == wanted


async def test_a_reader_that_leaves_at_a_draft_frees_the_row() -> None:
    script = Script(range(10, 30))
    row = make_row(script, params_of(max_tokens=8, provisional=True))
    assert isinstance(await anext(row), ProvisionalBlock)
    await row.aclose()
    assert script.rows == {"context": set(), "denoiser": set()}
    assert "denoise" not in names(script)


async def test_an_error_comes_after_the_drafts_before_it() -> None:
    script = Script(range(10, 30), fail={"denoise": NumericalError("nan")})
    row = make_row(script, params_of(max_tokens=8, provisional=True))
    assert [await anext(row) for _ in range(2)] == [draft_of(3, 0), draft_of(3, 1)]
    with pytest.raises(NumericalError):
        await anext(row)
    assert script.rows == {"context": set(), "denoiser": set()}


async def test_committed_blocks_alone() -> None:
    script = Script(range(10, 30))
    blocks = committed(make_row(script, params_of(max_tokens=8, provisional=True)))
    assert isinstance(await anext(blocks), Block)
    await blocks.aclose()
    assert script.rows == {"context": set(), "denoiser": set()}


class SlowContext(ScriptedContext):
    """Each call takes its own number of hundredths of a second."""

    async def open(self, row_id: str, capacity: int) -> int:
        await asyncio.sleep(0.03)
        return await super().open(row_id, capacity)

    async def prefill(self, *how: Any) -> Prefilled:
        await asyncio.sleep(0.06)
        return await super().prefill(*how)

    async def extend(self, *how: Any) -> Extended:
        await asyncio.sleep(0.04)
        return await super().extend(*how)


class SlowDenoiser(ScriptedDenoiser):
    """As SlowContext; says how long it waited for its mirror."""

    async def denoise_block(self, *how: Any) -> Block:
        asked = time.monotonic()
        await self._at(how[1])
        waited = time.monotonic() - asked
        await asyncio.sleep(0.05)
        block = await super().denoise_block(*how)
        return replace(block, timing=BlockTiming(time.time(), transfer_s=waited))


async def test_the_times_of_a_block() -> None:
    script = Script(range(10, 30))
    context = SlowContext(script, "context")
    before, started = time.time(), time.monotonic()
    row = generate_blocks(
        context, SlowDenoiser(script, context), "row", PROMPT, params_of(max_tokens=8)
    )
    first, second = [block.timing async for block in row]
    elapsed = time.monotonic() - started
    assert first is not None
    assert second is not None
    assert before <= first.begin < second.begin < time.time()
    assert second.begin - first.begin >= 0.03 + 0.06 + 0.05
    assert (first.queue_s >= 0.03, first.prefill_s >= 0.06, first.denoise_s >= 0.05) == (True,) * 3
    assert (first.commit_s, second.queue_s, second.prefill_s) == (0.0, 0.0, 0.0)
    # The block waits for the extension by the block before, beside it.
    assert (second.transfer_s > 0.03, second.denoise_s >= 0.05, second.commit_s >= 0.04) == (
        True,
    ) * 3
    # Nothing but the extension is counted twice.
    phases = [first.queue_s, first.prefill_s, first.transfer_s, first.denoise_s]
    assert sum([*phases, second.transfer_s, second.denoise_s]) <= elapsed


def test_a_block_is_cut_with_its_alternatives() -> None:
    tops = tuple(((token, -0.5),) for token in range(4))
    whole = replace(block_of((1, 2, 3, 4), 3, nfe=1), top_log_probs=tops)
    assert cut(whole, 3, 2).top_log_probs == tops[:2]
    assert whole == replace(whole, timing=BlockTiming(1.0))

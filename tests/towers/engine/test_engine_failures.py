"""Rows in real engines that fail: logits that are not finite, states that do not come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from torch import Tensor

from tests.support.rows import PROMPT, Pair, params_of, tokens_of
from twotower.towers.decoding.generation import generate_blocks
from twotower.towers.decoding.services import Block
from twotower.towers.engine import denoiser_engine as module
from twotower.towers.engine.local_link import LocalLink
from twotower.towers.errors import NumericalError, UnavailableError
from twotower.towers.state.context_state import ContextState
from twotower.towers.state.link import UpdateWriter
from twotower.towers.state.update import UpdatePlan


class PoisonedWriter:
    """Spoils a state when its update is complete, if it has come so far."""

    def __init__(self, writer: UpdateWriter, state: ContextState, after: int) -> None:
        self.writer, self.state, self.after = writer, state, after
        self.takes_shares = writer.takes_shares

    def put(self, name: str, layer: int, tensor: Tensor) -> None:
        self.writer.put(name, layer, tensor)

    async def finish(self) -> None:
        if self.state.length >= self.after:
            self.state.ssm.fill_(float("nan"))
        await self.writer.finish()

    def abort(self) -> None:
        self.writer.abort()


class PoisonedLink(LocalLink):
    """Spoils the states of rows whose name begins with `bad`, after some tokens."""

    def __init__(self, pair: Pair, after: int) -> None:
        super().__init__(pair.context.tower, pair.denoiser, shared=True)
        self.after = after

    def begin(self, row_id: str, state: ContextState, plan: UpdatePlan) -> UpdateWriter:
        writer = super().begin(row_id, state, plan)
        return PoisonedWriter(writer, state, self.after) if row_id.startswith("bad") else writer


@pytest.mark.parametrize("mode", ["mask_diffusion", "mock_ar"])
@pytest.mark.parametrize("after", [0, len(PROMPT) + 16])
def test_logits_that_are_not_finite_fail_their_row_alone(pair: Pair, mode: str, after: int) -> None:
    pair.context.link = PoisonedLink(pair, after)
    params = params_of(mode, max_tokens=33)

    async def run() -> list[Any]:
        rows = [pair.blocks(name, PROMPT, params) for name in ("good", "bad", "fine")]
        return list(await asyncio.gather(*rows, return_exceptions=True))

    good, bad, fine = asyncio.run(run())
    alone = tokens_of(asyncio.run(pair.blocks("alone", PROMPT, params)))
    assert isinstance(bad, NumericalError)
    assert tokens_of(good) == tokens_of(fine) == alone
    pair.assert_empty()


async def exhaust(row: AsyncIterator[Block], seen: list[Block]) -> None:
    async for block in row:
        seen.append(block)


def test_nothing_of_a_failed_block_is_committed(pair: Pair) -> None:
    pair.context.link = PoisonedLink(pair, after=len(PROMPT) + 16)

    async def run() -> list[Block]:
        seen: list[Block] = []
        row = generate_blocks(pair.context, pair.denoiser, "bad", PROMPT, params_of())
        # The context tower has drawn the token at position 21.
        with pytest.raises(NumericalError, match="non-finite logits at position 22, step 0"):
            await exhaust(row, seen)
        return seen

    assert [block.start for block in asyncio.run(run())] == [len(PROMPT)]
    pair.assert_empty()


def test_an_autoregressive_row_fails_alone_too(pair: Pair) -> None:
    params = params_of("ar", max_tokens=20, block_size=5)
    pass_of = pair.context.tower.logits
    rows = {"bad": False}

    def spoiled(hidden: Tensor) -> Tensor:
        logits = pass_of(hidden).clone()
        if rows["bad"] and len(logits) == 2:
            logits[1, 4] = float("inf")
        return logits

    async def run() -> list[Any]:
        good = asyncio.ensure_future(pair.blocks("good", PROMPT, params))
        bad = asyncio.ensure_future(pair.blocks("bad", [*PROMPT, 1], params))
        for _ in range(9):
            await asyncio.sleep(0)
        rows["bad"] = True
        return list(await asyncio.gather(good, bad, return_exceptions=True))

    pair.context.tower.logits = spoiled  # type: ignore[method-assign]
    try:
        results = asyncio.run(run())
    finally:
        pair.context.tower.logits = pass_of  # type: ignore[method-assign]
    failed = [result for result in results if isinstance(result, NumericalError)]
    whole = [result for result in results if isinstance(result, list)]
    assert len(failed) == len(whole) == 1
    assert len(tokens_of(whole[0])) == 20
    pair.assert_empty()


@pytest.mark.parametrize("call", ["score", "logits"])
def test_what_is_read_and_not_finite_is_an_error(pair: Pair, call: str) -> None:
    tower = pair.context.tower
    true_logits = tower.logits
    tower.logits = lambda hidden: true_logits(hidden) * float("nan")  # type: ignore[method-assign]
    try:
        with pytest.raises(NumericalError):
            asyncio.run(getattr(pair.context, call)(PROMPT))
    finally:
        tower.logits = true_logits  # type: ignore[method-assign]


def test_a_denoiser_that_waits_for_a_released_row_is_told(pair: Pair) -> None:
    async def run() -> None:
        await pair.denoiser.open("row", 40)
        waiting = asyncio.ensure_future(pair.denoiser.denoise_block("row", 5, params_of()))
        await asyncio.sleep(0)
        await pair.denoiser.release("row")
        with pytest.raises(UnavailableError, match="released"):
            await waiting
        with pytest.raises(UnavailableError):
            await pair.denoiser.denoise_block("row", 5, params_of())

    asyncio.run(run())
    pair.assert_empty()


def test_a_state_that_never_arrives_is_an_error(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MIRROR_TIMEOUT_S", 0.02)

    async def run() -> None:
        await pair.denoiser.open("row", 40)
        with pytest.raises(UnavailableError, match=r"did not reach token 5 in 0\.02 s"):
            await pair.denoiser.denoise_block("row", 5, params_of())
        await pair.denoiser.release("row")

    asyncio.run(run())


def test_a_context_row_that_is_gone_is_an_error_not_a_crash(pair: Pair) -> None:
    async def run() -> None:
        calls = [
            pair.context.prefill("row", PROMPT, [], params_of()),
            pair.context.extend("row", [1, 2], params_of()),
            pair.context.decode("row", 4, params_of("ar")),
        ]
        for call in calls:
            with pytest.raises(UnavailableError, match="released"):
                await call
        await pair.context.open("row", 60)
        await pair.context.prefill("row", PROMPT, [], params_of("ar"))
        decoding = asyncio.ensure_future(pair.context.decode("row", 40, params_of("ar")))
        for _ in range(5):
            await asyncio.sleep(0)
        await pair.context.release("row")
        with pytest.raises(UnavailableError, match="released"):
            await decoding

    asyncio.run(run())
    pair.assert_empty()

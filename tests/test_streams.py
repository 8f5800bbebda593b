"""`TwoTower.stream` and `astream`: the service's blocks, rows that are freed, shared passes."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from twotower import (
    AsyncGenerationStream,
    GenerationStream,
    ProvisionalBlock,
    TextBlock,
    TwoTower,
)
from twotower.client import Client
from twotower.client import TextBlock as ClientBlock
from twotower.client import Usage as ClientUsage
from twotower.towers.errors import InvalidRequestError, NumericalError
from twotower.towers.request.modes import MODES, TRAITS

PROMPT = [5, 3, 17, 3, 9]
LONG: dict[str, Any] = {"max_tokens": 900, "seed": 1}
SAMPLED: dict[str, Any] = {"max_tokens": 37, "block_size": 4, "temperature": 1.0, "seed": 3}


class Letters:
    """A tokenizer of one letter per id."""

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - 0x4E00 for letter in text]

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(0x4E00 + token) for token in token_ids)


@pytest.fixture(scope="module")
def writing(tiny_a: Path) -> TwoTower:
    model = TwoTower.from_pretrained(tiny_a)
    return TwoTower(model._context, model._denoiser, Letters())


def rows_of(model: TwoTower) -> tuple[int, int]:
    return model._context.num_rows, model._denoiser.num_rows


def wait_until_free(model: TwoTower) -> None:
    """A pass of these towers takes a few milliseconds, a whole long row takes seconds."""
    limit = time.monotonic() + 0.5
    # Towers have no rows either before a row has begun, so it is the calls that have to end.
    while any(thread.name == "twotower-calls" for thread in threading.enumerate()):
        assert time.monotonic() < limit, "the row is not free"
        time.sleep(0.001)
    assert rows_of(model) == (0, 0)


async def read(stream: AsyncGenerationStream) -> list[TextBlock]:
    return [block async for block in stream]


@pytest.fixture(params=["for", "async for"])
def blocks_of(request: pytest.FixtureRequest, writing: TwoTower) -> Any:
    """Reads a stream of either kind to its end: (blocks, stream)."""

    def sync(**how: Any) -> tuple[list[TextBlock], Any]:
        stream = writing.stream(PROMPT, **how)
        return list(stream), stream

    def asynchronous(**how: Any) -> tuple[list[TextBlock], Any]:
        async def run() -> tuple[list[TextBlock], Any]:
            stream = writing.astream(PROMPT, **how)
            return await read(stream), stream

        return asyncio.run(run())

    return sync if request.param == "for" else asynchronous


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_gives_what_generate_gives(writing: TwoTower, blocks_of: Any, mode: Any) -> None:
    # The second time, so that the prefix cache has for both what it will ever have.
    want = [writing.generate([PROMPT], mode=mode, **SAMPLED)[0] for _ in range(2)][1]
    blocks, stream = blocks_of(mode=mode, **SAMPLED)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert [token for block in blocks for token in block.token_ids] == want.token_ids
    assert "".join(block.text for block in blocks) == want.text
    assert stream.token_ids == want.token_ids
    # Where the service chooses who drafts, passes and the last bits of values follow its pace.
    chosen = TRAITS[mode].denoiser == "optional"
    assert stream.log_probs == pytest.approx(want.log_probs, abs=1e-4 if chosen else 0, rel=0)
    assert (stream.seed, stream.prompt_tokens) == (3, len(PROMPT))
    assert (stream.finish_reason, stream.matched_stop) == ("length", None)
    usage = stream.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(PROMPT), 37)
    if not chosen:
        assert (usage.nfe, usage.context_passes) == (want.nfe, want.context_passes)
        assert (usage.accepted_tokens, usage.drafted_tokens) == (0, 0)
    position = len(PROMPT)
    for block in blocks:
        assert block.start == position
        position += len(block.token_ids)
        assert len(block.commit_steps) == len(block.confidences) == len(block.token_ids)
    if mode == "mask_diffusion":
        assert [block.commit_steps for block in blocks] == [b.commit_steps for b in want.blocks]
        assert [block.confidences for block in blocks] == [b.confidences for b in want.blocks]
    assert rows_of(writing) == (0, 0)


def test_a_stop_string_ends_a_stream(writing: TwoTower, blocks_of: Any) -> None:
    free = writing.generate([PROMPT], **SAMPLED)[0]
    stop = free.text[7:10]
    blocks, stream = blocks_of(stop=["zz", stop], **SAMPLED)
    assert "".join(block.text for block in blocks) == free.text[: free.text.index(stop)]
    assert stream.token_ids == free.token_ids[: free.text.index(stop) + 3]
    assert (stream.finish_reason, stream.matched_stop) == ("stop", stop)
    # Nothing is left to do for one that goes on from there.
    rest, again = blocks_of(stop=["zz", stop], generated_token_ids=stream.token_ids, **SAMPLED)
    assert (rest, again.finish_reason, again.matched_stop) == ([], "stop", stop)
    assert again.usage.completion_tokens == len(stream.token_ids)


@pytest.mark.parametrize("mode", MODES)
def test_a_stream_goes_on_after_generated_tokens(blocks_of: Any, mode: Any) -> None:
    whole, _ = blocks_of(mode=mode, **SAMPLED)
    kept = [token for block in whole[:3] for token in block.token_ids]
    rest, stream = blocks_of(mode=mode, generated_token_ids=torch.tensor(kept), **SAMPLED)
    want = [token for block in whole[3:] for token in block.token_ids]
    assert stream.token_ids == want
    assert [(rest[0].index, rest[0].start)] == [(0, len(PROMPT) + len(kept))]
    assert "".join(block.text for block in rest) == "".join(block.text for block in whole[3:])
    assert stream.usage.completion_tokens == 37


@pytest.mark.parametrize(
    ("prompt", "changes", "field"),
    [
        ([], {}, "prompt"),
        (PROMPT, {"max_tokens": 0}, "max_tokens"),
        (PROMPT, {"stop": "x"}, "stop"),
        (PROMPT, {"generated_token_ids": [1]}, "generated_token_ids"),
        (PROMPT, {"generated_token_ids": [-1] * 16}, r"generated_token_ids\[0\]"),
        (PROMPT, {"generated_token_ids": [1] * 64, "max_tokens": 48}, "generated_token_ids"),
        (PROMPT, {"generated_token_ids": "ab"}, "generated_token_ids"),
        (PROMPT, {"stop": [chr(0x4E01)], "generated_token_ids": [1] * 16}, "generated_token_ids"),
    ],
)
async def test_bad_input_is_refused_at_once(
    writing: TwoTower, prompt: Any, changes: dict[str, Any], field: str
) -> None:
    for start in (writing.stream, writing.astream):
        with pytest.raises(InvalidRequestError, match=rf"^{field}.*: got .*expected"):
            start(prompt, **changes)
    assert rows_of(writing) == (0, 0)


def test_an_asynchronous_stream_needs_a_running_loop(writing: TwoTower) -> None:
    with pytest.raises(RuntimeError, match="no running event loop"):
        writing.astream(PROMPT)
    assert rows_of(writing) == (0, 0)


def test_a_stream_that_is_closed_or_dropped_frees_its_row(writing: TwoTower) -> None:
    with closing(writing.stream(PROMPT, **LONG)) as stream:
        first = next(stream)
        assert stream.token_ids == list(first.token_ids)
    assert rows_of(writing) == (0, 0)
    assert list(stream) == []
    assert stream.usage is None
    stream.close()
    for _ in writing.stream(PROMPT, **LONG):
        break
    wait_until_free(writing)
    # Dropped before anything was read, and by the garbage collector.
    writing.stream(PROMPT, **LONG)
    wait_until_free(writing)
    cycle: list[Any] = [writing.stream(PROMPT, **LONG)]
    cycle.append(cycle)
    del cycle
    gc.collect()
    wait_until_free(writing)


async def test_an_asynchronous_stream_frees_its_row_too(writing: TwoTower) -> None:
    stream = writing.astream(PROMPT, **LONG)
    await anext(stream)
    await stream.aclose()
    assert rows_of(writing) == (0, 0)
    assert [block async for block in stream] == []
    await stream.aclose()
    async for _ in writing.astream(PROMPT, **LONG):
        break
    wait_until_free(writing)
    stream = writing.astream(PROMPT, **LONG)
    reading = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0.02)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    wait_until_free(writing)


def test_a_stream_that_another_thread_closes_ends_for_its_reader(writing: TwoTower) -> None:
    stream = writing.stream(PROMPT, **LONG)
    ended: list[str] = []

    def read_on() -> None:
        try:
            for _ in stream:
                pass
        except BaseException as error:
            ended.append(type(error).__name__)
        else:
            ended.append("end")

    reader = threading.Thread(target=read_on)
    reader.start()
    time.sleep(0.02)
    stream.close()
    reader.join(10)
    assert ended == ["end"]
    assert stream.usage is None


async def test_a_stream_that_another_task_closes_ends_for_its_reader(writing: TwoTower) -> None:
    stream = writing.astream(PROMPT, **LONG)
    reading = asyncio.ensure_future(read(stream))
    await asyncio.sleep(0.02)
    await stream.aclose()
    assert isinstance(await reading, list)
    assert stream.usage is None


def test_a_readers_loop_that_closes_frees_the_row(
    writing: TwoTower, caplog: pytest.LogCaptureFixture
) -> None:
    async def leave() -> AsyncGenerationStream:
        return writing.astream(PROMPT, **LONG)

    left = asyncio.run(leave())
    wait_until_free(writing)
    assert left.usage is None
    assert caplog.records == []


async def test_streams_in_one_loop_share_their_passes(writing: TwoTower) -> None:
    """So do those for `for` in one thread, and whatever else is called meanwhile."""
    how: dict[str, Any] = {"mode": "ar", "max_tokens": 64, "seed": 1}
    stats = writing._context.stats
    want = writing.generate([PROMPT], **how)[0]
    alone = stats().passes
    writing.generate([PROMPT], **how)
    alone = stats().passes - alone
    before = stats().passes
    streams = [writing.astream(PROMPT, **how) for _ in range(8)]
    others = [writing.stream(PROMPT, **how) for _ in range(4)]
    result = writing.generate([PROMPT], **how)[0]
    for blocks in await asyncio.gather(*map(read, streams)):
        assert [token for block in blocks for token in block.token_ids] == want.token_ids
    assert [list(stream) for stream in others] == [list(writing.stream(PROMPT, **how))] * 4
    assert result.token_ids == want.token_ids
    # One by one they would take 14 times as many.
    assert stats().passes - before < 5 * alone


def test_streams_in_many_threads(writing: TwoTower) -> None:
    want = {seed: writing.generate([PROMPT], **{**SAMPLED, "seed": seed})[0] for seed in range(6)}
    seen: dict[int, GenerationStream] = {}

    def work(seed: int) -> None:
        stream = writing.stream(PROMPT, **{**SAMPLED, "seed": seed})
        for _ in stream:
            time.sleep(0.001)
        seen[seed] = stream

    threads = [threading.Thread(target=work, args=(seed,)) for seed in want]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert {seed: stream.token_ids for seed, stream in seen.items()} == {
        seed: result.token_ids for seed, result in want.items()
    }


def test_more_streams_than_rows_have_room_wait_for_their_turn(writing: TwoTower) -> None:
    """A stream that nobody reads does not keep its row from its end, nor others from theirs."""
    pool = writing._context._admission.pool
    count = pool.slots.num_free + 3
    streams = [writing.stream(PROMPT, max_tokens=16, seed=1) for _ in range(count)]
    last = list(streams[-1])
    assert [list(stream) for stream in streams[:-1]] == [last] * (count - 1)


def test_what_fails_a_row_is_raised_where_it_is_read(
    writing: TwoTower, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise NumericalError("non-finite logits")

    monkeypatch.setattr("twotower.towers.decoding.output_text.OutputText.take", fail)
    stream = writing.stream(PROMPT, max_tokens=5)
    with pytest.raises(NumericalError, match="non-finite"):
        next(stream)
    assert (list(stream), stream.usage) == ([], None)
    assert rows_of(writing) == (0, 0)

    async def run() -> None:
        with pytest.raises(NumericalError, match="non-finite"):
            await read(writing.astream(PROMPT, max_tokens=5))

    asyncio.run(run())
    assert rows_of(writing) == (0, 0)


def names_of(stream: Any) -> Iterator[str]:
    return (name for name in vars(stream) if not name.startswith("_"))


def kinds_of(items: list[Any]) -> list[str]:
    return [type(item).__name__ for item in items]


@pytest.mark.parametrize("mode", ["mask_diffusion", "verified"])
def test_drafts_come_between_the_blocks(blocks_of: Any, mode: Any) -> None:
    how = {**SAMPLED, "mode": mode, "max_tokens": 8, "draft_steps": 3, "top_logprobs": 2}
    how |= {"draft_source": "denoiser", "commit_rule": "released"}
    # So that the prefix cache has for both what it will ever have.
    blocks_of(**how)
    items, stream = blocks_of(provisional=True, **how)
    blocks = [item for item in items if isinstance(item, TextBlock)]
    plain, again = blocks_of(**how)
    assert blocks == plain
    assert (stream.token_ids, stream.usage) == (again.token_ids, again.usage)
    assert stream.top_log_probs == [line for block in plain for line in block.top_log_probs]
    assert [len(line) for line in stream.top_log_probs] == [2] * 8
    drafts = [item for item in items if isinstance(item, ProvisionalBlock)]
    assert len(drafts) + len(blocks) == len(items)
    assert len(drafts) > len(blocks)
    assert not isinstance(items[0], TextBlock)
    assert isinstance(items[-1], TextBlock)


def test_a_slow_reader_gets_the_latest_draft_of_each_block(writing: TwoTower) -> None:
    how = {**SAMPLED, "max_tokens": 8, "confidence_threshold": 1.0, "commit_rule": "released"}
    stream = writing.stream(PROMPT, provisional=True, **how)
    stream._call.result(timeout=10)
    items: list[Any] = list(stream)
    assert kinds_of(items) == ["ProvisionalBlock", "TextBlock"] * 2
    # Of four steps, a position each, the last makes the block.
    assert [item.step for item in items[::2]] == [2, 2]
    assert [item.start for item in items[::2]] == [item.start for item in items[1::2]] == [5, 9]


async def test_a_slow_reader_of_an_async_stream_too(writing: TwoTower) -> None:
    how = {**SAMPLED, "max_tokens": 8, "confidence_threshold": 1.0, "commit_rule": "released"}
    stream = writing.astream(PROMPT, provisional=True, **how)
    await asyncio.wait_for(asyncio.wrap_future(stream._call), 10)
    items: list[Any] = await read(stream)
    assert kinds_of(items) == ["ProvisionalBlock", "TextBlock"] * 2


def test_names_are_those_of_the_client(writing: TwoTower) -> None:
    """What reads a stream of the service reads one of a model here."""
    with closing(writing.stream(PROMPT, max_tokens=5)) as here:
        local = set(names_of(here))
        list(here)
    with Client("127.0.0.1:1") as client:
        remote = client.generate(PROMPT, resume=False)
        assert local <= set(names_of(remote))
        with pytest.raises(Exception, match=grpc.StatusCode.UNAVAILABLE.name):
            list(remote)
    assert TextBlock is ClientBlock
    assert {field.name for field in fields(ClientUsage)} == set(vars(here.usage))

"""Both clients against a real gRPC server that dies at any message: the stream goes on exactly."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from twotower.client import (
    AsyncClient,
    AsyncGenerationStream,
    Client,
    GenerationStream,
    ServiceError,
    TextBlock,
    completion,
)
from twotower.protos.backoff import backoff_s
from twotower.protos.refusals import (
    INTERNAL_TEXT,
    LOST_TEXT,
    NUMERICAL_TEXT,
    with_retry_after,
)
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc
from twotower.towers.decoding.commit_log import CommitLog
from twotower.towers.decoding.output import begin_output
from twotower.towers.decoding.services import Block
from twotower.towers.request.params import GenerationParams

Code = grpc.StatusCode
PROMPT = [1, 2, 3]
BLOCK = 4
# Characters of one to four bytes, cut by the borders of blocks, and bytes that are none.
OUTPUT = "aß漢🌍é\n\nEND日本".encode() + b"\xff\xfe" + "ü tail".encode()
DEAD_ROUTER = (Code.INTERNAL, "The actor died unexpectedly before finishing this task.")
GONE = (Code.UNAVAILABLE, "no pair of towers is up")
End = tuple[Code, str]


class Bytes:
    """A tokenizer of one id per byte."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: Sequence[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


class Mortal(generation_pb2_grpc.GenerationServicer):
    """Sends a fixed output as the service would, and ends calls as `plan` says.

    Each entry of the plan is for one call: so many messages, then that status; calls after the
    plan go to their end.
    """

    def __init__(self, output: bytes = OUTPUT) -> None:
        self.plan: list[tuple[int, End]] = []
        self.asked: list[pb.GenerateRequest] = []
        self.output = output
        # Added to the starts of the first calls' blocks.
        self.shifts: list[int] = []
        # Steps and threshold of each block of requests with floors.
        self.served: list[tuple[int, float]] = []
        # A call stops before this message, until it is released.
        self.hold_at: int | None = None
        self.held, self.released = threading.Event(), threading.Event()

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        self.asked.append(request)
        count, end = self.plan.pop(0) if self.plan else (1000, None)
        for index, message in enumerate(self._messages(request)):
            if index == count:
                break
            if index == self.hold_at:
                self.held.set()
                self.released.wait(30)
            yield message
        if end is not None:
            context.abort(*end)

    def Score(self, request: Any, _context: Any) -> pb.ScoreResponse:  # noqa: N802
        return pb.ScoreResponse(token_ids=request.tokens.ids, log_probs=[-0.5])

    def _messages(self, request: pb.GenerateRequest) -> Iterator[pb.GenerateResponse]:
        generated = tuple(request.generated_token_ids)
        sampling = request.sampling_params
        params = GenerationParams(max_tokens=len(self.output), stop=tuple(sampling.stop))
        text, log = begin_output(Bytes(), params, 3, generated)
        shift = self.shifts.pop(0) if self.shifts else 0
        seed = sampling.seed if sampling.HasField("seed") else 77
        started = pb.Started(request_id=request.request_id or "drawn", seed=seed, prompt_tokens=3)
        yield pb.GenerateResponse(started=started)
        while log.finish_reason is None:
            cut, shown = text.take(self._block(log.end - 3))
            log.append(cut)
            if shift:
                # As if it had lost count: what it says is not at the place that it says.
                wrong = pb.Block(start=cut.start + shift, token_ids=[9] * BLOCK, text="wrong")
                yield pb.GenerateResponse(block=wrong)
                shift = 0
            block = pb.Block(
                index=log.num_blocks - 1,
                start=cut.start,
                token_ids=cut.token_ids,
                text=shown,
                log_probs=cut.log_probs,
                usage=self._usage(log),
            )
            if sampling.HasField("min_steps_per_block"):
                block.steps_per_block, block.confidence_threshold = self.served.pop(0)
            yield pb.GenerateResponse(block=block)
        complete = pb.Complete(
            finish_reason=log.finish_reason,
            usage=self._usage(log),
            matched_stop=text.matched_stop,
        )
        yield pb.GenerateResponse(complete=complete)

    def _block(self, position: int) -> Block:
        token_ids = tuple(self.output[position : position + BLOCK])
        last = position + BLOCK >= len(self.output)
        return Block(
            position + 3,
            token_ids,
            (0,) * len(token_ids),
            (1.0,) * len(token_ids),
            nfe=2,
            context_passes=1,
            finish_reason="length" if last else None,
            log_probs=tuple(-float(token) for token in token_ids),
        )

    def _usage(self, log: CommitLog) -> pb.Usage:
        return pb.Usage(
            prompt_tokens=3,
            completion_tokens=len(log.token_ids),
            nfe=log.nfe,
            context_passes=log.context_passes,
        )


class Server:
    """A service on a port of its own that can be cut off and brought back."""

    def __init__(self, service: Mortal) -> None:
        self.service = service
        self._pool = ThreadPoolExecutor(8)
        self.port = 0
        self.up()

    def up(self) -> None:
        self._server = grpc.server(self._pool, options=[("grpc.so_reuseport", 0)])
        generation_pb2_grpc.add_GenerationServicer_to_server(self.service, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def down(self) -> None:
        self._server.stop(grace=None).wait()

    def close(self) -> None:
        self.down()
        self._pool.shutdown()


@dataclass
class Result:
    """What is left of a stream after its end."""

    stream: GenerationStream | AsyncGenerationStream
    blocks: list[TextBlock]
    error: ServiceError | None = None

    @property
    def text(self) -> str:
        return "".join(block.text for block in self.blocks)

    def seen(self) -> tuple[object, ...]:
        stream = self.stream
        return (
            self.text,
            stream.token_ids,
            stream.log_probs,
            stream.finish_reason,
            stream.matched_stop,
            stream.usage,
            [block.token_ids for block in self.blocks],
            [(block.index, block.start) for block in self.blocks],
        )


Run = Callable[..., Result]


def run_blocking(server: Server, **options: Any) -> Result:
    with Client(f"127.0.0.1:{server.port}") as client:
        result = Result(client.generate(PROMPT, **options), [])
        try:
            result.blocks.extend(result.stream)  # type: ignore[arg-type]
        except ServiceError as error:
            result.error = error
        return result


def run_async(server: Server, **options: Any) -> Result:
    async def run() -> Result:
        async with AsyncClient(f"127.0.0.1:{server.port}") as client:
            stream = client.generate(PROMPT, **options)
            result = Result(stream, [])
            try:
                async for block in stream:
                    result.blocks.append(block)
            except ServiceError as error:
                result.error = error
            return result

    return asyncio.run(run())


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server(Mortal())
    yield made
    made.close()


@pytest.fixture(params=[run_blocking, run_async], ids=["blocking", "asyncio"])
def run(request: pytest.FixtureRequest) -> Run:
    chosen: Run = request.param
    return chosen


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(completion, "backoff_s", lambda _: 0.0)
    monkeypatch.setattr(completion, "KILLED_PAUSE_S", 0.0)


def messages_of(blocks: int) -> int:
    return 1 + blocks + 1


@pytest.mark.parametrize("stop", [(), ("zzz",), ("\n\n",), ("END", "\n\nENDx"), ("日本",)])
@pytest.mark.usefixtures("hurried")
def test_a_death_at_any_message_changes_nothing(
    run: Run, server: Server, stop: tuple[str, ...]
) -> None:
    whole = run(server, stop=list(stop), logprobs=True)
    matched = whole.stream.matched_stop
    assert whole.stream.finish_reason == ("stop" if matched else "length")
    text = OUTPUT.decode(errors="replace")
    assert whole.text == (text.partition(matched)[0] if matched else text)
    messages = 1 + len(whole.blocks) + 1
    ways = [GONE, DEAD_ROUTER, (Code.CANCELLED, "server stops"), (Code.UNKNOWN, "reset")]
    for count in range(messages + 1):
        server.service.plan = [(count, ways[count % len(ways)])]
        result = run(server, stop=list(stop), logprobs=True)
        assert result.error is None
        assert result.seen() == whole.seen(), count
        # A death after the last message is none.
        assert result.stream.resumes == (count < messages)


@pytest.mark.usefixtures("hurried")
def test_a_death_after_every_block_changes_nothing(run: Run, server: Server) -> None:
    whole = run(server)
    server.service.plan = [(2, GONE)] * len(whole.blocks)
    server.service.asked.clear()
    result = run(server)
    assert result.seen() == whole.seen()
    assert result.stream.resumes == len(whole.blocks)
    first, *others = server.service.asked
    assert (first.request_id, first.sampling_params.HasField("seed")) == ("", False)
    for index, request in enumerate(others):
        assert request.request_id == "drawn"
        assert request.sampling_params.seed == 77
        assert list(request.generated_token_ids) == list(OUTPUT[: BLOCK * (index + 1)])


@pytest.mark.usefixtures("hurried")
def test_what_the_first_block_was_made_with_is_asked_for_again(run: Run, server: Server) -> None:
    """A death before the first block settles nothing, one after it does."""
    server.service.plan = [(1, GONE), (2, GONE)]
    # The call that dies after its first message has drawn up its first block.
    server.service.served = [(3, 0.75), (5, 0.625), *[(9, 0.5)] * 100]
    result = run(server, min_steps_per_block=2, min_confidence_threshold=0.25)
    assert result.error is None
    assert (result.stream.steps_per_block, result.stream.confidence_threshold) == (5, 0.625)
    first, second, third = (request.sampling_params for request in server.service.asked)
    for asked in (first, second):
        assert (asked.min_steps_per_block, asked.min_confidence_threshold) == (2, 0.25)
        assert not asked.HasField("steps_per_block")
    assert (third.steps_per_block, third.confidence_threshold) == (5, 0.625)
    assert not third.HasField("min_steps_per_block")
    assert not third.HasField("min_confidence_threshold")


@pytest.mark.usefixtures("hurried")
def test_a_death_before_the_first_message_repeats_the_request(run: Run, server: Server) -> None:
    server.service.plan = [(0, GONE), (0, GONE)]
    result = run(server, generated_token_ids=list(OUTPUT[:8]), request_id="mine")
    assert bytes(result.stream.token_ids) == OUTPUT[8:]
    assert len(server.service.asked) == 3
    assert all(request == server.service.asked[0] for request in server.service.asked)


def test_a_server_that_comes_back_on_its_port(run: Run, server: Server) -> None:
    """The connection itself is lost in the middle, and nobody listens for a while."""
    whole = run(server)
    server.service.hold_at = 5

    def fail_over() -> None:
        assert server.service.held.wait(30)
        server.down()
        server.service.hold_at = None
        server.service.released.set()
        time.sleep(0.5)
        server.up()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(fail_over)
        result = run(server)
        done.result(timeout=30)
    assert result.error is None
    assert result.seen() == whole.seen()
    assert result.stream.resumes >= 1


LOST = (Code.UNAVAILABLE, LOST_TEXT)


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("end", [LOST, DEAD_ROUTER], ids=["said plainly", "said by Ray"])
def test_what_kills_its_server_twice_is_not_sent_a_third_time(
    run: Run, server: Server, end: End
) -> None:
    server.service.plan = [(0, end)] * 100
    result = run(server)
    assert result.error is not None
    assert (result.error.code, result.error.details) == LOST
    assert len(server.service.asked) == completion.MAX_KILLED == 2


def test_one_that_may_have_killed_its_server_waits(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a proxy to hear of the death: until then it sends every request to the dead server."""
    monkeypatch.setattr(completion, "backoff_s", lambda _: 0.0)
    monkeypatch.setattr(completion, "KILLED_PAUSE_S", 0.3)
    server.service.plan = [(0, LOST), (2, LOST)]
    began = time.monotonic()
    assert run(server).error is None
    assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.usefixtures("hurried")
def test_losses_with_progress_between_them_do_not_add_up(run: Run, server: Server) -> None:
    """Once in every place: before it has begun, after a block, before the resumed one has begun."""
    server.service.plan = [(0, LOST), (1, LOST), (0, LOST), (2, LOST), (0, LOST)]
    result = run(server)
    assert result.error is None
    assert bytes(result.stream.token_ids) == OUTPUT
    assert result.stream.resumes == 5


@pytest.mark.usefixtures("hurried")
def test_a_resumed_request_that_kills_its_server_twice_is_given_up(
    run: Run, server: Server
) -> None:
    server.service.plan = [(3, LOST), *[(0, LOST)] * 100]
    result = run(server)
    assert result.error is not None
    assert bytes(result.stream.token_ids) == OUTPUT[: 2 * BLOCK]
    assert len(server.service.asked) == 3


@pytest.mark.usefixtures("hurried")
def test_a_resumed_request_that_has_grown_too_long_is_given_up(run: Run, server: Server) -> None:
    text = "SERVER: Received message larger than max (4194309 vs. 4194304)"
    server.service.plan = [(3, GONE), (0, (Code.RESOURCE_EXHAUSTED, text))]
    result = run(server)
    assert result.error is not None
    assert result.error.code == Code.INVALID_ARGUMENT
    assert result.error.details == "message: got 4194309, expected at most 4194304 bytes"
    assert len(server.service.asked) == 2


REFUSALS = [
    (Code.INVALID_ARGUMENT, "top_p: got 2"),
    (Code.INVALID_ARGUMENT, "message: got 9 bytes that are no message of this method"),
    (Code.RESOURCE_EXHAUSTED, "too many requests are waiting"),
    (Code.ABORTED, "lost with 8 pairs in a row"),
    (Code.INTERNAL, f"{INTERNAL_TEXT} r-1"),
    (Code.INTERNAL, f"{NUMERICAL_TEXT}: non-finite logits"),
    (Code.UNIMPLEMENTED, "no such method"),
]


@pytest.mark.parametrize("end", REFUSALS, ids=[text for _, text in REFUSALS])
def test_a_refusal_is_no_loss(run: Run, server: Server, end: End) -> None:
    server.service.plan = [(0, end)]
    result = run(server)
    assert result.error is not None
    assert (result.error.code, result.error.details) == end
    assert len(server.service.asked) == 1


def test_a_refusal_says_when_to_try_again(run: Run, server: Server) -> None:
    text = with_retry_after("too many requests are waiting", 2.5)
    server.service.plan = [(0, (Code.RESOURCE_EXHAUSTED, text)), (0, GONE)]
    first, second = run(server), run(server, resume=False)
    assert first.error is not None
    assert second.error is not None
    assert (first.error.retry_after_s, second.error.retry_after_s) == (2.5, None)


@pytest.mark.usefixtures("hurried")
def test_what_was_admitted_once_waits_for_its_place(run: Run, server: Server) -> None:
    full = (Code.RESOURCE_EXHAUSTED, with_retry_after("full", 0.05))
    server.service.plan = [(3, GONE), *[(0, full)] * 5]
    result = run(server)
    assert bytes(result.stream.token_ids) == OUTPUT
    assert result.stream.resumes == 6


def test_without_resume_the_first_loss_is_the_end(run: Run, server: Server) -> None:
    server.service.plan = [(2, GONE)]
    result = run(server, resume=False)
    assert result.error is not None
    assert result.error.code == Code.UNAVAILABLE
    assert bytes(result.stream.token_ids) == OUTPUT[:BLOCK]
    assert (result.stream.seed, result.stream.request_id) == (77, "drawn")


def test_it_gives_up_in_time_with_the_last_error(run: Run, server: Server) -> None:
    server.service.plan = [(2, DEAD_ROUTER)] + [(0, GONE)] * 100
    begin = time.monotonic()
    result = run(server, resume_timeout=0.7)
    assert 0.2 < time.monotonic() - begin < 5
    assert result.error is not None
    assert (result.error.code, result.error.details) == GONE
    assert len(server.service.asked) >= 3


def test_a_service_that_is_not_there_is_soon_given_up(
    run: Run, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(completion, "ADMISSION_TIMEOUT_S", 0.3)
    server.down()
    begin = time.monotonic()
    result = run(server)
    assert time.monotonic() - begin < 5
    assert result.error is not None
    assert result.error.code == Code.UNAVAILABLE
    server.up()


def test_the_timeout_is_for_the_whole(run: Run, server: Server) -> None:
    server.service.plan = [(2, GONE)] + [(0, GONE)] * 100
    begin = time.monotonic()
    result = run(server, timeout=0.7)
    assert time.monotonic() - begin < 5
    assert result.error is not None
    assert result.error.code in (Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED)


@pytest.mark.usefixtures("hurried")
def test_what_is_lost_wherever_it_is_admitted_is_given_up(run: Run, server: Server) -> None:
    server.service.plan = [(1, GONE)] * 100
    assert run(server).error is not None
    assert len(server.service.asked) == completion.MAX_BROKEN


@pytest.mark.usefixtures("hurried")
@pytest.mark.parametrize("shift", [-4, 4], ids=["again", "a gap"])
def test_a_service_that_goes_on_elsewhere(run: Run, server: Server, shift: int) -> None:
    """A block that is there already is dropped; after a gap the stream is taken up anew."""
    whole = run(server)
    server.service.plan = [(4, GONE)]
    server.service.shifts = [0, shift]
    result = run(server)
    assert result.seen()[:3] == whole.seen()[:3]
    assert result.seen()[6:] == whole.seen()[6:]
    assert result.stream.resumes == (1 if shift < 0 else 2)


def test_cancel_ends_the_wait_between_two_streams(server: Server) -> None:
    server.service.plan = [(2, GONE)] + [(0, GONE)] * 100
    with Client(f"127.0.0.1:{server.port}") as client, ThreadPoolExecutor(1) as pool:
        stream = client.generate(PROMPT, resume_timeout=60)
        blocks = iter(stream)
        next(blocks)
        rest = pool.submit(list, blocks)
        time.sleep(0.3)
        stream.cancel()
        with pytest.raises(ServiceError) as caught:
            rest.result(timeout=2)
        assert caught.value.code == Code.CANCELLED
        asked = len(server.service.asked)
        time.sleep(0.5)
        assert len(server.service.asked) == asked


async def test_cancel_and_a_cancelled_task_end_the_asyncio_stream(server: Server) -> None:
    async def read(stream: AsyncGenerationStream) -> None:
        async for _ in stream:
            pass

    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        for whole_task in (False, True):
            server.service.plan = [(2, GONE)] + [(0, GONE)] * 100
            stream = client.generate(PROMPT)
            task = asyncio.create_task(read(stream))
            await asyncio.sleep(0.3)
            if whole_task:
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asyncio.wait_for(task, 2)
            else:
                stream.cancel()
                with pytest.raises(ServiceError, match="CANCELLED"):
                    await asyncio.wait_for(task, 2)


async def test_unary_calls_of_the_asyncio_client(server: Server) -> None:
    async with AsyncClient(f"127.0.0.1:{server.port}") as client:
        assert (await client.score([3, 4])).log_probs == (-0.5,)
        with pytest.raises(ServiceError, match="UNIMPLEMENTED"):
            await client.model_info()


def test_the_schedule_of_tries() -> None:
    assert [backoff_s(tries, lambda: 0.0) for tries in (1, 2, 3, 6, 7, 99)] == [
        0.1,
        0.2,
        0.4,
        3.2,
        5.0,
        5.0,
    ]
    assert backoff_s(3, lambda: 1.0) == pytest.approx(0.2)

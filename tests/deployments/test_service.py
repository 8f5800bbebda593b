"""The whole service in real processes: Ray, Serve's gRPC ingress, two tower actors, the channel."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from safetensors.torch import load_file, save_file

from tests.support.pairs import await_no_rows, await_true, rows_held
from tests.support.processes import own_processes
from twotower import TwoTower
from twotower.client import Client, GenerationStream, ServiceError
from twotower.deployments.config import ServiceConfig
from twotower.deployments.router.router import SERVICE_NAME
from twotower.deployments.server.server import LocalService, free_port
from twotower.protos.refusals import LOST_TEXT
from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
PROMPTS = ([5, 6, 7, 8], list(range(10, 110)))
LONG = 3000
LEAK_SIGNS = ("Traceback", "actor_id", "ray::", "RayTaskError", ".py", "/")
STREAM_FOREVER = f"""
import sys
from twotower.client import Client
for block in Client(sys.argv[1]).generate([5, 6, 7], max_tokens={LONG}, ignore_eos=True):
    print(block.index, flush=True)
"""


@pytest.fixture(scope="module")
def service(tiny_text: Path) -> Iterator[LocalService]:
    config = ServiceConfig(
        model=str(tiny_text),
        grpc_port=free_port(),
        http_port=free_port(),
        num_threads=1,
        max_num_seqs=4,
        max_queued_requests=8,
        health_check_period_s=1.0,
    )
    with LocalService(config) as running:
        yield running


@pytest.fixture
def client(service: LocalService) -> Iterator[Client]:
    with Client(service.address) as connected:
        yield connected


def tokens(client: Client, prompt: list[int], **options: object) -> list[int]:
    stream = client.generate(
        prompt, max_tokens=48, block_size=8, ignore_eos=True, timeout=120, **options
    )
    blocks = list(stream)
    assert [block.index for block in blocks] == list(range(len(blocks)))
    assert stream.usage is not None
    assert stream.usage.completion_tokens == len(stream.token_ids) == 48
    return stream.token_ids


def test_two_clients_get_what_each_gets_alone(service: LocalService, tiny_text: Path) -> None:
    model = TwoTower.from_pretrained(tiny_text)
    alone = [
        model.generate([prompt], max_tokens=48, block_size=8)[0].token_ids for prompt in PROMPTS
    ]

    def ask(prompt: list[int]) -> list[int]:
        with Client(service.address) as own:
            return tokens(own, prompt)

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(ask, PROMPTS)) == alone


def test_choices_of_a_request_are_what_their_seeds_give_alone(client: Client) -> None:
    options = {"max_tokens": 24, "block_size": 8, "temperature": 1.0, "ignore_eos": True}
    stream = client.generate_choices(PROMPTS[0], 3, seed=5, timeout=120, **options)
    assert {number for number, _ in stream} == {0, 1, 2}
    for choice in stream.choices:
        assert choice.seed is not None
        alone = client.generate(PROMPTS[0], seed=choice.seed, timeout=120, **options)
        assert [token for block in alone for token in block.token_ids] == choice.token_ids
    assert len({tuple(choice.token_ids) for choice in stream.choices}) == 3


def test_a_call_has_its_clients_name_and_trace(service: LocalService) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    metadata = (("x-request-id", "mine-7"), ("traceparent", trace))
    with grpc.insecure_channel(service.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=PROMPTS[0]))
        for asked in (request, pb.GenerateRequest(text="")):
            call = stub.Generate(asked, metadata=metadata, timeout=60)
            shown = dict(call.initial_metadata())
            assert (shown["x-request-id"], shown["traceparent"]) == ("mine-7", trace)
            if asked is request:
                assert next(call).started.request_id == "mine-7"
            else:
                assert call.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_rows_of_all_modes_at_once_get_what_each_gets_alone(
    service: LocalService, tiny_text: Path
) -> None:
    """Modes, lengths, seeds and temperatures mixed, with bits compared: floats too. A policy's
    rounds would follow the pace of the machine, and so would last bits."""
    asked: list[tuple[list[int], dict[str, object]]] = [
        (list(range(10, 10 + length)), {"mode": mode, "temperature": heat, "seed": seed})
        for seed, (mode, length, heat) in enumerate(
            [
                ("mask_diffusion", 3, 0.0),
                ("ar", 70, 1.0),
                ("verified", 33, 1.0),
                ("mock_ar", 5, 0.7),
                ("verified", 130, 0.0),
                ("mask_diffusion", 90, 1.0),
            ]
        )
    ]
    model = TwoTower.from_pretrained(tiny_text)
    limits: dict[str, object] = {"max_tokens": 30, "block_size": 8, "draft_source": "denoiser"}

    def ask(
        request: tuple[list[int], dict[str, object]],
    ) -> tuple[list[int], list[tuple[float, ...]]]:
        with Client(service.address) as own:
            stream = own.generate(
                request[0],
                ignore_eos=True,
                timeout=120,
                **limits,
                **request[1],  # type: ignore[arg-type]
            )
            return stream.token_ids, [block.confidences for block in stream]

    with ThreadPoolExecutor(len(asked)) as pool:
        together = list(pool.map(ask, asked))
    for (prompt, options), (token_ids, confidences) in zip(asked, together, strict=True):
        alone = model.generate([prompt], **limits, **options)[0]  # type: ignore[arg-type]
        assert token_ids == alone.token_ids
        # On the wire a probability is a float of 32 bits, as it was in the tower.
        flat = [value for block in confidences for value in block]
        assert flat == [value for block in alone.blocks for value in block.confidences]
    await_no_rows()


def test_a_repeated_prompt_comes_from_the_prefix_cache(client: Client) -> None:
    prompt = list(range(5, 95))
    streams, outputs = [], []
    for _ in range(2):
        stream = client.generate(prompt, max_tokens=16, seed=1, ignore_eos=True, timeout=120)
        outputs.append([token for block in stream for token in block.token_ids])
        streams.append(stream)
    assert outputs[0] == outputs[1]
    first, again = (stream.usage for stream in streams)
    assert first is not None
    assert again is not None
    assert (first.cached_tokens, again.cached_tokens) == (0, len(prompt))
    await_no_rows()


def test_modes_and_resume(client: Client, tiny_text: Path) -> None:
    model = TwoTower.from_pretrained(tiny_text)
    whole = tokens(client, PROMPTS[0], mode="ar", temperature=1.0, seed=3)
    local = model.generate([PROMPTS[0]], mode="ar", max_tokens=48, temperature=1.0, seed=3)
    assert whole == local[0].token_ids
    rest = client.generate(
        PROMPTS[0],
        mode="ar",
        temperature=1.0,
        seed=3,
        max_tokens=48,
        block_size=8,
        ignore_eos=True,
        generated_token_ids=whole[:20],
    )
    list(rest)
    assert rest.token_ids == whole[20:]
    assert client.score(PROMPTS[1]).log_probs == pytest.approx(model.score(PROMPTS[1]), abs=1e-6)


def test_choices_of_one_request_all_get_a_pair(service: LocalService) -> None:
    # Serve's router once found only the first of several calls that a request made at once.
    request = pb.GenerateRequest(
        tokens=pb.TokenIds(ids=PROMPTS[0]), sampling_params=pb.SamplingParams(max_tokens=2), n=4
    )
    with grpc.insecure_channel(service.address) as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        for _ in range(10):
            events = list(stub.Generate(request, timeout=30))
            complete = [event.choice for event in events if event.HasField("complete")]
            assert sorted(complete) == [0, 1, 2, 3]


def test_text_streams(client: Client) -> None:
    stream = client.generate("def test(", max_tokens=32)
    pieces = [block.text for block in stream]
    assert "".join(pieces)
    info = client.model_info()
    assert info.has_tokenizer
    assert info.vocab_size == 512


def test_a_killed_client_leaves_no_row(service: LocalService) -> None:
    command = [sys.executable, "-c", STREAM_FOREVER, service.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"0\n"
            assert rows_held() == (1, 1, 1)
        finally:
            process.send_signal(signal.SIGKILL)
    await_no_rows()


def test_a_deadline_frees_the_row(client: Client) -> None:
    stream = client.generate([5, 6], max_tokens=LONG, ignore_eos=True, timeout=1.0)
    with pytest.raises(ServiceError) as caught:
        list(stream)
    assert caught.value.code == grpc.StatusCode.DEADLINE_EXCEEDED
    await_no_rows()


def test_cancels_at_random_moments_free_their_rows(client: Client) -> None:
    """Right after a message as well: then Serve's own proxy does not notice, and rows stay."""
    moments = random.Random(7)
    for _ in range(24):
        stream = client.generate(PROMPTS[1], max_tokens=LONG, ignore_eos=True)
        blocks = iter(stream)
        for _ in range(moments.randrange(3)):
            next(blocks)
        time.sleep(moments.choice((0.0, 0.002, 0.1)) * moments.random())
        stream.cancel()
    # Far below the time that the rows would take to their end.
    await_true(lambda: rows_held() == (0, 0, 0), "rows are left", timeout_s=15)
    assert tokens(client, PROMPTS[0])


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "prompt: got []"),
        ([5, 9999], {}, "prompt[1]: got 9999"),
        ([5], {"max_tokens": 0}, "max_tokens: got 0"),
        ([5], {"temperature": float("nan")}, "temperature: got nan"),
        ([5], {"mode": "beam"}, "mode: got 'beam'"),
        ([5], {"max_tokens": 100_000}, "max_tokens: got"),
    ],
)
def test_refusals_are_clear_and_clean(
    client: Client, prompt: list[int], options: dict[str, object], named: str
) -> None:
    with pytest.raises(ServiceError) as caught:
        list(client.generate(prompt, **options))  # type: ignore[arg-type]
    assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
    assert named in str(caught.value)
    assert not [sign for sign in LEAK_SIGNS if sign in str(caught.value)]


def test_bytes_that_are_no_message(service: LocalService) -> None:
    with grpc.insecure_channel(service.address) as channel:
        for method in ("Generate", "Score", "GetModelInfo"):
            # A unary method answers a caller that reads a stream as well.
            call = channel.unary_stream(f"/{SERVICE_NAME}/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                list(call(b"\xff\xff\xff", timeout=60))
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            text = "message: got 3 bytes that are no message of this method"
            assert caught.value.details() == text


@pytest.mark.parametrize("size", [400_000, 3_900_000, 80_000_000])
def test_a_prompt_that_cannot_fit_is_refused_at_once(client: Client, size: int) -> None:
    """Before, 3.9 MB stopped every stream for 5 s and 80 MB ended the router."""
    began = time.monotonic()
    for ask in (lambda text: list(client.generate(text)), client.score):
        with pytest.raises(ServiceError) as caught:
            ask("a" * size)
        assert caught.value.code == grpc.StatusCode.INVALID_ARGUMENT
        assert "bytes" in caught.value.details
        assert ", expected at most " in caught.value.details
    assert time.monotonic() - began < 10
    assert client.model_info().vocab_size == 512


def test_health(service: LocalService) -> None:
    with grpc.insecure_channel(service.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAME):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=60)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as caught:
            stub.Check(health_pb2.HealthCheckRequest(service="other"), timeout=60)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE_NAME), timeout=60)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
        listed = stub.List(health_pb2.HealthListRequest(), timeout=60).statuses
        assert set(listed) == {"", SERVICE_NAME}


def test_reflection_lists_the_services(service: LocalService) -> None:
    with grpc.insecure_channel(service.address) as channel:
        names = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {SERVICE_NAME, "grpc.health.v1.Health"} <= set(names)


def test_requests_beyond_the_queue_are_refused(client: Client) -> None:
    streams = [client.generate([5, 6], max_tokens=LONG, ignore_eos=True) for _ in range(40)]
    refused: list[str] = []

    def drain(stream: GenerationStream) -> None:
        try:
            list(stream)
        except ServiceError as error:
            if error.code != grpc.StatusCode.CANCELLED:
                refused.append(str(error))

    with ThreadPoolExecutor(len(streams)) as pool:
        done = [pool.submit(drain, stream) for stream in streams]
        await_true(lambda: len(refused) >= 1, "nothing is refused", timeout_s=90)
        for stream in streams:
            stream.cancel()
        for future in done:
            future.result(timeout=90)
    assert len(refused) < len(streams)
    for text in refused:
        assert text.startswith("RESOURCE_EXHAUSTED")
        assert not [sign for sign in LEAK_SIGNS if sign in text]
    await_no_rows()


def test_a_lost_tower_is_replaced_and_its_stream_goes_on(client: Client, tiny_text: Path) -> None:
    stream = client.generate([5, 6], max_tokens=400, ignore_eos=True, timeout=180)
    blocks = iter(stream)
    next(blocks)
    os.kill(own_process("ray::ContextTowerActor"), signal.SIGKILL)
    rest = list(blocks)
    assert [block.index for block in rest] == list(range(1, 25))
    alone = TwoTower.from_pretrained(tiny_text).generate([[5, 6]], max_tokens=400)
    assert stream.token_ids == alone[0].token_ids
    await_no_rows()


def test_a_router_that_dies_says_nothing_of_itself(service: LocalService) -> None:
    """To any gRPC client; ours goes on by itself."""
    request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[5, 6]))
    request.sampling_params.max_tokens = LONG
    request.sampling_params.ignore_eos = True
    with grpc.insecure_channel(service.address) as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(request, timeout=180)
        assert next(call).WhichOneof("event") == "started"
        os.kill(own_process("ray::ServeReplica:twotower:Router"), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == LOST_TEXT
    with Client(service.address) as client:
        await_true(lambda: answers(client), "no router comes back")
    # Those of the lost router end when the pair has heard of it; test_recovery is about that.
    await_true(lambda: rows_held() == (0, 0, 0), "rows are left")


def answers(client: Client) -> bool:
    try:
        return client.model_info(timeout=10).vocab_size == 512
    except ServiceError:
        return False


def own_process(title: str) -> int:
    """The one process of that title among this process's descendants."""
    found = own_processes(title)
    assert len(found) == 1, found
    return found[0]


def test_a_tower_that_does_not_load_is_named(tiny_text: Path, tmp_path: Path) -> None:
    """Names and shapes are checked before anything starts; values only by the towers."""
    broken = shutil.copytree(tiny_text, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = min(name for name in tensors if name.startswith("denoiser_tower"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, broken / "model.safetensors")
    command = [sys.executable, "-m", "twotower.cli", "serve", "--model", str(broken)]
    ports = ["--grpc-port", str(free_port()), "--http-port", str(free_port())]
    done = subprocess.run(
        command + ports, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2
    assert "ready" not in done.stdout
    assert f"error: the service did not start: {name}: " in done.stderr


def test_the_demo_runs_from_start_to_stop(tiny_text: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.demo", "--model", str(tiny_text), "--max-tokens", "32"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ready on 127.0.0.1:" in done.stdout
    assert "tokens/NFE" in done.stdout
    assert "exit code 0" in done.stdout

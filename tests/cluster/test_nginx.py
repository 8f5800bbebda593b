"""The nginx front as it is in cluster/manifests, run for real before a fake service."""

from __future__ import annotations

import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc

CONFIG = Path(__file__).parents[2] / "cluster" / "manifests" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")
WAIT_S = 20.0

pytestmark = [
    pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian's package nginx-light)"),
    pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl"),
]


class Backend(generation_pb2_grpc.GenerationServicer, health_pb2_grpc.HealthServicer):
    """Sends a block whenever a test lets it, and notes whose calls ended early."""

    def __init__(self) -> None:
        self.next_block = threading.Semaphore(0)
        self.cancelled = threading.Event()

    def Generate(self, request: Any, context: Any) -> Iterator[pb.GenerateResponse]:  # noqa: N802
        context.add_callback(self.cancelled.set)
        yield pb.GenerateResponse(started=pb.Started(request_id=request.request_id, seed=7))
        for index in range(request.sampling_params.max_tokens):
            while not self.next_block.acquire(timeout=0.2):
                if not context.is_active():
                    return
            yield pb.GenerateResponse(block=pb.Block(index=index, token_ids=[index]))
        if request.sampling_params.mode == "full":
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "queue: 256 rows wait already")

    def Score(self, request: Any, _context: Any) -> pb.ScoreResponse:  # noqa: N802
        return pb.ScoreResponse(token_ids=request.tokens.ids)

    def Check(self, _request: Any, _context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)


class Front:
    """Addresses of a running front, and the backend behind it."""

    def __init__(self, folder: Path, backend: Backend) -> None:
        self.backend = backend
        self.folder = folder
        self.tls_port, self.plain_port, self.backend_port = free_ports(3)
        self._root = (folder / "tls.crt").read_bytes()

    def channel(self) -> grpc.Channel:
        credentials = grpc.ssl_channel_credentials(self._root)
        return grpc.secure_channel(f"localhost:{self.tls_port}", credentials)

    def written(self, **changes: str) -> Path:
        """The shipped file with this test's ports and paths in place of an installation's."""
        text = CONFIG.read_text(encoding="utf-8")
        own = {
            "listen 8443 ssl http2": f"listen 127.0.0.1:{self.tls_port} ssl http2",
            "listen 8080": f"listen 127.0.0.1:{self.plain_port}",
            "server 127.0.0.1:9000": f"server 127.0.0.1:{self.backend_port}",
            "/etc/twotower/tls/": f"{self.folder}/",
            "/run/twotower-nginx.pid": f"{self.folder}/nginx.pid",
            "/dev/stdout": f"{self.folder}/access.log",
            **changes,
        }
        for old, new in own.items():
            assert old in text, f"{CONFIG.name} no longer has {old!r}"
            text = text.replace(old, new)
        path = self.folder / "nginx.conf"
        path.write_text(text, encoding="utf-8")
        return path

    def log(self) -> str:
        return (self.folder / "access.log").read_text(encoding="utf-8")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on; all are held until the last is known."""
    probes = [socket.socket() for _ in range(count)]
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
    finally:
        for probe in probes:
            probe.close()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    files = ["-keyout", str(folder / "tls.key"), "-out", str(folder / "tls.crt")]
    command = ["openssl", "req", "-x509", "-days", "1", *key, *subject, *files]
    subprocess.run(command, check=True, capture_output=True, timeout=WAIT_S)
    return folder


@contextmanager
def running(front: Front, *, with_backend: bool = True, **changes: str) -> Iterator[Front]:
    assert NGINX is not None
    config = str(front.written(**changes))
    command = [NGINX, "-c", config, "-p", str(front.folder), "-g", "daemon off;"]
    with ThreadPoolExecutor(8) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(front.backend, server)
        health_pb2_grpc.add_HealthServicer_to_server(front.backend, server)
        if with_backend:
            server.add_insecure_port(f"127.0.0.1:{front.backend_port}")
            server.start()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            try:
                await_port(front.tls_port)
                yield front
            finally:
                process.terminate()
                process.wait(WAIT_S)
                server.stop(None)


def await_port(port: int) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on {port}"
            time.sleep(0.05)


@pytest.fixture
def front(certificate: Path, tmp_path: Path) -> Iterator[Front]:
    for name in ("tls.key", "tls.crt"):
        shutil.copy(certificate / name, tmp_path / name)
    with running(Front(tmp_path, Backend())) as started:
        yield started


def asked(tokens: int, **params: Any) -> pb.GenerateRequest:
    sampling = pb.SamplingParams(max_tokens=tokens, **params)
    return pb.GenerateRequest(request_id="r", sampling_params=sampling)


def refused(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    error: Any = caught.value
    return error.code(), error.details()


def test_the_file_is_valid_without_a_warning(certificate: Path, tmp_path: Path) -> None:
    for name in ("tls.key", "tls.crt"):
        shutil.copy(certificate / name, tmp_path / name)
    config = str(Front(tmp_path, Backend()).written())
    command = [str(NGINX), "-t", "-c", config, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert "[warn]" not in done.stderr


def test_a_stream_arrives_message_by_message(front: Front) -> None:
    """The backend sends the next block only after the client has the one before."""
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        call = stub.Generate(asked(20), timeout=WAIT_S)
        assert next(call).started == pb.Started(request_id="r", seed=7)
        for index in range(20):
            front.backend.next_block.release()
            assert next(call).block.index == index
        assert list(call) == []
        assert call.code() == grpc.StatusCode.OK


def test_many_streams_share_one_connection(front: Front) -> None:
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        calls = [stub.Generate(asked(3), timeout=WAIT_S) for _ in range(6)]
        for call in calls:
            next(call)
        front.backend.next_block.release(18)
        assert [len(list(call)) for call in calls] == [3] * 6


def test_a_status_in_the_middle_of_a_stream_reaches_the_client(front: Front) -> None:
    front.backend.next_block.release(2)
    with front.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(2, mode="full"))
        assert refused(call) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "queue: 256 rows wait already",
        )


def test_a_client_that_goes_is_noticed_behind_the_front(front: Front) -> None:
    with front.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(5), timeout=WAIT_S)
        next(call)
        assert not front.backend.cancelled.is_set()
        call.cancel()
        assert front.backend.cancelled.wait(WAIT_S)


def test_health_is_let_through_and_all_else_is_not(front: Front) -> None:
    with front.channel() as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(), timeout=WAIT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        for method in (
            "/ray.serve.RayServeAPIService/ListApplications",
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        ):
            call = channel.unary_stream(method)(b"", timeout=WAIT_S)
            assert refused(call) == (grpc.StatusCode.UNIMPLEMENTED, "unknown method")


def test_a_prompt_that_is_too_large_is_refused_by_the_front(front: Front) -> None:
    most, large = range(300_000), range(2_000_000)
    with front.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        fits = stub.Score(pb.ScoreRequest(tokens=pb.TokenIds(ids=most)), timeout=WAIT_S)
        assert len(fits.token_ids) == len(most)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Score(pb.ScoreRequest(tokens=pb.TokenIds(ids=large)), timeout=WAIT_S)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert error.details() == "the request is malformed or too large"


def test_one_address_has_so_many_streams_and_no_more(certificate: Path, tmp_path: Path) -> None:
    for name in ("tls.key", "tls.crt"):
        shutil.copy(certificate / name, tmp_path / name)
    own = Front(tmp_path, Backend())
    few = {"limit_conn streams 256": "limit_conn streams 2"}
    with running(own, **few), own.channel() as channel:
        stub = generation_pb2_grpc.GenerationStub(channel)
        held = [stub.Generate(asked(1), timeout=WAIT_S) for _ in range(2)]
        for call in held:
            next(call)
        third = stub.Generate(asked(1), timeout=WAIT_S)
        assert refused(third) == (
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "too many streams from this address",
        )
        own.backend.next_block.release(2)
        assert [len(list(call)) for call in held] == [1, 1]


def test_without_a_proxy_behind_it_the_front_is_unavailable(
    certificate: Path, tmp_path: Path
) -> None:
    for name in ("tls.key", "tls.crt"):
        shutil.copy(certificate / name, tmp_path / name)
    own = Front(tmp_path, Backend())
    with running(own, with_backend=False), own.channel() as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(1), timeout=WAIT_S)
        assert refused(call) == (
            grpc.StatusCode.UNAVAILABLE,
            "no proxy is up; try again later",
        )


def test_nothing_but_tls_is_spoken_and_no_text_is_logged(front: Front) -> None:
    with grpc.insecure_channel(f"localhost:{front.tls_port}") as channel:
        call = generation_pb2_grpc.GenerationStub(channel).Generate(asked(1), timeout=WAIT_S)
        assert refused(call)[0] == grpc.StatusCode.UNAVAILABLE
    with front.channel() as channel:
        request = pb.ScoreRequest(text="a secret prompt")
        generation_pb2_grpc.GenerationStub(channel).Score(request, timeout=WAIT_S)
    end = time.monotonic() + WAIT_S
    while "/twotower.v1.Generation/Score" not in front.log():
        assert time.monotonic() < end, front.log()
        time.sleep(0.05)
    assert "200 grpc=0" in front.log()
    assert "secret" not in front.log()


def test_probes_without_grpc(front: Front) -> None:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{front.plain_port}/healthz", timeout=WAIT_S
    ) as r:
        assert (r.status, r.read()) == (200, b"ok\n")

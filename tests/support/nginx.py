"""The nginx front as it is in cluster/manifests, run for real before servers of a test."""

from __future__ import annotations

import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from http.client import HTTPSConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from twotower.protos.v1 import generation_pb2 as pb
from twotower.protos.v1 import generation_pb2_grpc

CONFIG = Path(__file__).parents[2] / "cluster" / "manifests" / "nginx.conf"
NGINX = shutil.which("nginx", path="/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin")
WAIT_S = 20.0
NEEDS_NGINX = pytest.mark.skipif(NGINX is None, reason="needs nginx (Debian's package nginx-light)")
KSERVE_LIVE = "/inference.GRPCInferenceService/ServerLive"


class Authority:
    """A certificate authority of a test."""

    def __init__(self, common_name: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        certificate = _builder(self._name, self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.certificate = _pem(certificate.sign(self._key, hashes.SHA256()))

    def issue(self, common_name: str) -> tuple[bytes, bytes]:
        """Certificate and key for a host or a client of this name."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        alternative = x509.SubjectAlternativeName([x509.DNSName(common_name)])
        made = _builder(name, self._name, key).add_extension(alternative, critical=False)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return _pem(made.sign(self._key, hashes.SHA256())), private


def _builder(subject: Any, issuer: Any, key: Any) -> Any:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
    )


def _pem(certificate: Any) -> bytes:
    made: bytes = certificate.public_bytes(serialization.Encoding.PEM)
    return made


@cache
def authority(name: str = "servers") -> Authority:
    """One authority for each name and run."""
    return Authority(name)


class Backend(generation_pb2_grpc.GenerationServicer, health_pb2_grpc.HealthServicer):
    """Sends a block whenever a test lets it, and notes whose calls ended early."""

    def __init__(self) -> None:
        self.next_block = threading.Semaphore(0)
        self.metadata: dict[str, Any] = {}
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

    def Score(self, request: Any, context: Any) -> pb.ScoreResponse:  # noqa: N802
        self.metadata = dict(context.invocation_metadata())
        return pb.ScoreResponse(token_ids=request.tokens.ids)

    def Check(self, _request: Any, _context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802
        return health_pb2.HealthCheckResponse(status=health_pb2.HealthCheckResponse.SERVING)

    def live(self, request: bytes, context: Any) -> bytes:
        """KServe's ServerLive, without its messages."""
        self.metadata = dict(context.invocation_metadata())
        return request


class Web(ThreadingHTTPServer):
    """Answers HTTP as a service's front would: notes requests as they came, streams events."""

    daemon_threads = True

    def __init__(self, port: int) -> None:
        self.next_event = threading.Semaphore(0)
        self.requests: list[tuple[str, str, dict[str, str], int]] = []
        super().__init__(("127.0.0.1", port), _Answers)


class _Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self._note(b"")
        self._answer(b"ok")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self._note(body)
        if self.path == "/v1/stream":
            self._stream()
        else:
            self._answer(b"{}")

    def _note(self, body: bytes) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers, len(body)))

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for index in range(3):
            if not self.server.next_event.acquire(timeout=WAIT_S):
                return
            event = f"data: {index}\n\n".encode()
            self.wfile.write(f"{len(event):x}\r\n".encode() + event + b"\r\n")
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


class Front:
    """Addresses of a running front, and the servers behind it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.backend = Backend()
        self.tls_port, self.plain_port, self.backend_port, self.web_port = free_ports(4)
        self.web: Web
        certificate, key = authority().issue("localhost")
        (folder / "tls.crt").write_bytes(certificate)
        (folder / "tls.key").write_bytes(key)
        (folder / "clients.crt").write_bytes(authority("clients").certificate)

    def channel(self, certificate: bytes | None = None, key: bytes | None = None) -> grpc.Channel:
        root = authority().certificate
        credentials = grpc.ssl_channel_credentials(root, key, certificate)
        return grpc.secure_channel(f"localhost:{self.tls_port}", credentials)

    def https(self, certificate: bytes | None = None, key: bytes = b"") -> HTTPSConnection:
        context = ssl.create_default_context(cadata=authority().certificate.decode())
        if certificate is not None:
            pair = self.folder / "client.pem"
            pair.write_bytes(certificate + key)
            context.load_cert_chain(pair)
        return HTTPSConnection("localhost", self.tls_port, timeout=WAIT_S, context=context)

    def written(self, **changes: str) -> Path:
        """The shipped file with this test's ports and paths in place of an installation's."""
        text = CONFIG.read_text(encoding="utf-8")
        own = {
            "listen 8443 ssl http2": f"listen 127.0.0.1:{self.tls_port} ssl http2",
            "listen 8080": f"listen 127.0.0.1:{self.plain_port}",
            "server 127.0.0.1:9000": f"server 127.0.0.1:{self.backend_port}",
            "server 127.0.0.1:8000": f"server 127.0.0.1:{self.web_port}",
            "/etc/twotower/tls/": f"{self.folder}/",
            "/run/twotower-nginx.pid": f"{self.folder}/nginx.pid",
            "/dev/stdout": f"{self.folder}/access.log",
            "error_log stderr": f"error_log {self.folder}/error.log",
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

    def logged(self, text: str) -> str:
        """Both logs, as soon as the access log has a text."""
        end = time.monotonic() + WAIT_S
        while text not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.02)
        return self.log() + (self.folder / "error.log").read_text(encoding="utf-8")


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


@contextmanager
def running(front: Front, *, with_backend: bool = True, **changes: str) -> Iterator[Front]:
    """The front in a process of its own, with its servers in this one."""
    assert NGINX is not None
    config = str(front.written(**changes))
    command = [NGINX, "-c", config, "-p", str(front.folder), "-g", "daemon off;"]
    with _behind(front, with_backend), subprocess.Popen(command, stdout=subprocess.DEVNULL) as run:
        try:
            _await_port(front.tls_port)
            yield front
        finally:
            run.terminate()
            run.wait(WAIT_S)


@contextmanager
def _behind(front: Front, with_backend: bool) -> Iterator[None]:
    if not with_backend:
        yield
        return
    with ThreadPoolExecutor(8) as pool, Web(front.web_port) as front.web:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(front.backend, server)
        health_pb2_grpc.add_HealthServicer_to_server(front.backend, server)
        live = {"ServerLive": grpc.unary_unary_rpc_method_handler(front.backend.live)}
        service = KSERVE_LIVE.split("/")[1]
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, live),))
        server.add_insecure_port(f"127.0.0.1:{front.backend_port}")
        server.start()
        serving = pool.submit(front.web.serve_forever, 0.02)
        try:
            yield
        finally:
            front.web.shutdown()
            serving.result(WAIT_S)
            server.stop(None)


def _await_port(port: int) -> None:
    end = time.monotonic() + WAIT_S
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            assert time.monotonic() < end, f"nothing listens on {port}"
            time.sleep(0.05)

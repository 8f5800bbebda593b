"""Which targets are on this machine, and where the environment's proxies are asked."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.client.test_client import Scripted
from twotower.client import AsyncClient, Client
from twotower.client.channels import channel_options, is_loopback
from twotower.protos.v1 import generation_pb2_grpc

PROXY_VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")


@pytest.mark.parametrize(
    "target",
    [
        "127.0.0.1:9000",
        "127.8.8.8:9000",
        "localhost:9000",
        "LOCALHOST.:9000",
        "pair.localhost:9000",
        "localhost",
        "[::1]:9000",
        "::1",
        "[::ffff:127.0.0.1]:9000",
        "0.0.0.0:9000",
        "[::]:9000",
        "dns:localhost:9000",
        "dns:///127.0.0.1:9000",
        "dns://8.8.8.8/localhost:9000",
        "ipv4:127.0.0.1:9000,127.0.0.2:9000",
        "ipv6:[::1]:9000",
        "ipv6:%5B::1%5D:9000",
    ],
)
def test_this_machine(target: str) -> None:
    assert is_loopback(target)
    assert dict(channel_options(target))["grpc.enable_http_proxy"] == 0


@pytest.mark.parametrize(
    "target",
    [
        "10.0.0.1:9000",
        "service.example:9000",
        "localhost.example:9000",
        "mylocalhost:9000",
        "dns:///service.example:9000",
        "dns://127.0.0.1/service.example:9000",
        "ipv4:127.0.0.1:9000,10.0.0.1:9000",
        "[fe80::1%25eth0]:9000",
        "xds:///127.0.0.1",
        "",
        ":9000",
        "127.0.0.1.example:9000",
    ],
)
def test_elsewhere(target: str) -> None:
    assert not is_loopback(target)
    assert "grpc.enable_http_proxy" not in dict(channel_options(target))


@pytest.fixture
def port() -> Iterator[int]:
    """A service on loopback."""
    with ThreadPoolExecutor(2) as pool:
        server = grpc.server(pool)
        generation_pb2_grpc.add_GenerationServicer_to_server(Scripted(), server)
        number = server.add_insecure_port("127.0.0.1:0")
        server.start()
        yield number
        server.stop(grace=None).wait()


@pytest.mark.parametrize("variable", PROXY_VARIABLES)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_service_on_this_machine_is_reached_past_any_proxy(
    port: int, variable: str, host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://127.0.0.1:1")
    with Client(f"{host}:{port}") as client:
        assert client.model_info(timeout=20).name == "m"

    async def ask() -> str:
        async with AsyncClient(f"{host}:{port}") as client:
            return (await client.model_info(timeout=20)).name

    assert asyncio.run(ask()) == "m"


class Proxy:
    """An HTTP proxy that leads every CONNECT to one port."""

    def __init__(self, port: int) -> None:
        self.asked: list[str] = []
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        request = b""
        while b"\r\n\r\n" not in request:
            request += near.recv(4096)
        self.asked.append(request.decode().splitlines()[0])
        far = socket.create_connection(("127.0.0.1", self._port))
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        threading.Thread(target=_pass_on, args=(far, near), daemon=True).start()
        _pass_on(near, far)


def _pass_on(source: socket.socket, target: socket.socket) -> None:
    with source, target:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            return


@pytest.mark.parametrize("variable", PROXY_VARIABLES)
def test_a_service_elsewhere_is_reached_through_the_proxy(
    port: int, variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "no_grpc_proxy"):
        monkeypatch.delenv(name, raising=False)
    proxy = Proxy(port)
    monkeypatch.setenv(variable, proxy.url)
    with Client("service.invalid:9000") as client:
        assert client.model_info(timeout=20).name == "m"
    assert proxy.asked == ["CONNECT service.invalid:9000 HTTP/1.1"]
    proxy.close()

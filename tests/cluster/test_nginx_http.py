"""The nginx front before a fake OpenAI front, and clients with certificates."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.support.nginx import NEEDS_NGINX, WAIT_S, Front, authority, running

pytestmark = NEEDS_NGINX

MTLS = {
    "# ssl_client_certificate": "ssl_client_certificate",
    "# ssl_verify_client ": "ssl_verify_client ",
}
LIMIT = 4 << 20


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    with running(Front(tmp_path_factory.mktemp("front"))) as started:
        yield started


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """The front that asks clients for certificates."""
    with running(Front(tmp_path_factory.mktemp("mutual")), **MTLS) as started:
        yield started


def answer(
    front: Front, method: str, path: str, body: Any = None, headers: Any = None, **identity: Any
) -> tuple[int, Any, bytes]:
    connection = front.https(**identity)
    try:
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/page/page.js",
        "/v1/models",
        "/v1/models/a/b",
        "/tokenize",
        "/detokenize",
        "/health",
        "/ready",
        "/version",
    ],
)
def test_these_paths_are_let_through(front: Front, path: str) -> None:
    assert answer(front, "GET", path)[0] == 200
    assert front.web.requests[-1][:2] == ("GET", path)


@pytest.mark.parametrize(
    "path",
    [
        "/metrics",
        "/metrics/",
        "/admin",
        "/admin/keys",
        "/-/healthz",
        "/-/routes",
        "/v1",
        "/healthy",
        "/health/x",
        "/docs",
        "/v1/../metrics",
        "/v1/%2e%2e/metrics",
        "/v1/..%2Fmetrics",
        "/v1/x%2F..%2F..%2Fmetrics",
        "//metrics",
        "/v1/%0a/../../admin",
        "/page/",
        "/page/x/y",
        "/page/../metrics",
    ],
)
def test_all_others_are_not_there(front: Front, path: str) -> None:
    before = len(front.web.requests)
    status, headers, body = answer(front, "GET", path, headers={"Authorization": "Bearer tt-x"})
    assert status == 404
    assert headers["Content-Type"] == "application/json"
    assert json.loads(body)["error"]["message"] == "unknown path"
    assert len(front.web.requests) == before


def test_a_path_arrives_as_it_was_understood(front: Front) -> None:
    """A service that takes /metrics/ and all below it must not see that."""
    ways = {
        "/metrics/../v1/models": "/v1/models",
        "/admin/%2e%2e/v1/models": "/v1/models",
        "/v1//models?limit=2": "/v1/models?limit=2",
        "/v1/models/a%20b%3Fc": "/v1/models/a%20b%3Fc",
    }
    for given, arrives in ways.items():
        assert answer(front, "GET", given)[0] == 200
        assert front.web.requests[-1][1] == arrives


def test_headers_of_a_request(front: Front) -> None:
    given = {
        "Authorization": "Bearer tt-secret",
        "Traceparent": "00-1-2-01",
        "X-Request-Id": "mine",
        "X-Forwarded-For": "127.0.0.1, 10.1.2.3",
        "Forwarded": "for=10.1.2.3",
        "Origin": "https://page.example",
    }
    assert answer(front, "POST", "/v1/completions", b"{}", given)[0] == 200
    _, _, headers, size = front.web.requests[-1]
    kept = ("Authorization", "Traceparent", "X-Request-Id", "Origin")
    assert {name: headers.get(name.lower()) for name in kept} == {
        name: given[name] for name in kept
    }
    assert headers["x-forwarded-for"] == "127.0.0.1"
    assert headers["x-forwarded-proto"] == "https"
    assert headers["host"] == f"localhost:{front.tls_port}"
    assert "forwarded" not in headers
    assert size == 2


def test_events_arrive_one_by_one(front: Front) -> None:
    """The service sends the next event only after the client has the one before."""
    connection = front.https()
    connection.request("POST", "/v1/stream", b"{}", {"Content-Type": "application/json"})
    for index in range(3):
        front.web.next_event.release()
        if index == 0:
            response = connection.getresponse()
            assert response.headers["Content-Type"] == "text/event-stream"
        assert response.readline() == f"data: {index}\n".encode()
        assert response.readline() == b"\n"
    assert response.read() == b""
    connection.close()


def in_chunks(size: int) -> Iterator[bytes]:
    for _ in range(size >> 16):
        yield bytes(1 << 16)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_above_the_limit_is_refused_before_the_service_sees_it(
    front: Front, chunked: bool
) -> None:
    body: Any = in_chunks(LIMIT) if chunked else bytes(LIMIT)
    assert answer(front, "POST", "/v1/completions", body)[0] == 200
    assert front.web.requests[-1][3] == LIMIT
    before = len(front.web.requests)
    connection = front.https()
    connection.putrequest("POST", "/v1/completions")
    if chunked:
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        piece = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        try:
            for _ in range((LIMIT >> 16) + 1):
                connection.send(piece)
        except (ConnectionError, ssl.SSLError):
            # The answer is there already.
            pass
    else:
        connection.putheader("Content-Length", str(LIMIT + 1))
        connection.endheaders()
    response = connection.getresponse()
    assert response.status == 413
    assert json.loads(response.read())["error"]["code"] == "request_too_large"
    connection.close()
    assert len(front.web.requests) == before


@pytest.mark.parametrize("count", [1, 40])
def test_headers_above_their_limit_are_refused(front: Front, count: int) -> None:
    before = len(front.web.requests)
    headers = {f"X-{index}": "x" * (9000 if count == 1 else 1000) for index in range(count)}
    assert answer(front, "GET", "/v1/models", headers=headers)[0] in (400, 431, 494)
    assert len(front.web.requests) == before


def test_plain_text_is_not_spoken_on_this_port(front: Front) -> None:
    before = len(front.web.requests)
    connection = http.client.HTTPConnection("localhost", front.tls_port, timeout=WAIT_S)
    connection.request("GET", "/v1/models")
    response = connection.getresponse()
    assert response.status == 400
    assert b"plain HTTP request was sent to HTTPS port" in response.read()
    connection.close()
    assert len(front.web.requests) == before


def test_neither_keys_nor_queries_nor_prompts_are_logged(front: Front) -> None:
    """Not where a request is refused, either."""
    headers = {"Authorization": "Bearer tt-secret", "Referer": "https://a/?q=secret"}
    body = b'{"prompt": "secret"}'
    assert answer(front, "POST", "/v1/completions?key=secret", body, headers)[0] == 200
    assert answer(front, "GET", "/metrics?key=secret", None, headers)[0] == 404
    large = {**headers, "Content-Length": str(LIMIT + 1)}
    assert answer(front, "POST", "/v1/large?key=secret", b"", large)[0] == 413
    log = front.logged("/v1/large")
    assert '"POST /v1/completions HTTP/1.1" 200' in log
    assert "secret" not in log


def test_prompts_are_not_put_on_disks(tmp_path: Path) -> None:
    """nginx warns of a body or an answer that it writes to a file."""
    with running(Front(tmp_path), **{"error.log crit": "error.log warn"}) as own:
        for body in (bytes(LIMIT), in_chunks(LIMIT)):
            assert answer(own, "POST", "/v1/completions", body)[0] == 200
        assert "temporary file" not in own.logged("/v1/completions")


def test_without_a_service_behind_it_the_front_says_so(tmp_path: Path) -> None:
    with running(Front(tmp_path), with_backend=False) as own:
        status, headers, body = answer(own, "GET", "/v1/models?key=secret")
        assert (status, headers["Retry-After"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "unavailable"
        assert "secret" not in own.logged("/v1/models")


def test_one_address_has_so_many_requests_and_no_more(tmp_path: Path) -> None:
    few = {"limit_conn streams 256": "limit_conn streams 1"}
    with running(Front(tmp_path), **few) as own:
        held = own.https()
        held.request("POST", "/v1/stream", b"{}")
        own.web.next_event.release()
        response = held.getresponse()
        assert response.readline() == b"data: 0\n"
        status, headers, body = answer(own, "GET", "/v1/models")
        assert (status, headers["Retry-After"]) == (429, "1")
        assert json.loads(body)["error"]["code"] == "rate_limit_exceeded"
        own.web.next_event.release(2)
        assert response.read().endswith(b"data: 2\n\n")
        held.close()


def health(front: Front, *identity: bytes) -> Any:
    with front.channel(*identity) as channel:
        return health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=WAIT_S
        )


def test_a_client_with_a_certificate_is_let_in(mutual: Front) -> None:
    certificate, key = authority("clients").issue("ann")
    assert answer(mutual, "GET", "/health", certificate=certificate, key=key)[2] == b"ok"
    assert health(mutual, certificate, key).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("issuer", [None, "others", "servers"])
def test_a_client_without_one_or_of_another_authority_is_refused(
    mutual: Front, issuer: str | None
) -> None:
    pair = authority(issuer).issue("ann") if issuer else ()
    identity = dict(zip(("certificate", "key"), pair, strict=False))
    before = len(mutual.web.requests)
    status, _, body = answer(mutual, "GET", "/health", **identity)
    assert status == 401
    assert json.loads(body)["error"]["code"] == "no_certificate"
    assert len(mutual.web.requests) == before
    with pytest.raises(grpc.RpcError) as caught:
        health(mutual, *pair)
    error: Any = caught.value
    assert error.code() == grpc.StatusCode.UNAUTHENTICATED

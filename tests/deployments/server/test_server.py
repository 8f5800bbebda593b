"""A start that fails: one line that says why, and nothing left."""

from __future__ import annotations

import socket
import tempfile
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.exceptions import RaySystemError
from ray.serve.exceptions import RayServeException

from twotower.deployments.config import ServiceConfig
from twotower.deployments.server import server
from twotower.deployments.server.server import LocalService
from twotower.towers.errors import ConfigError, UnavailableError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "Permission denied", "/root/.ray"), "PermissionError: [Errno 13] "),
        (OSError("AF_UNIX path length cannot exceed 107 bytes: /x"), "OSError: AF_UNIX path "),
        (RuntimeError("no\nreason\nthat fits a line"), "RuntimeError: no"),
        (ConnectionError(), "ConnectionError"),
        (RaySystemError("lost"), "RaySystemError: System error: lost"),
    ],
)
# Serve that was never started answers with different errors, after a different time.
@pytest.mark.parametrize("answer", [RayServeException, RuntimeError, ConnectionError])
def test_ray_that_does_not_start_is_one_line_and_leaves_no_folder(
    error: Exception,
    line: str,
    answer: type[Exception],
    tiny_text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Path] = []

    def init(**options: Any) -> None:
        seen.append(Path(options["_temp_dir"]))
        assert seen[0].is_dir()
        raise error

    def status() -> None:
        raise answer("there is no Serve instance running on this Ray cluster")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(serve, "status", status)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # Nothing gets so far as to listen, and a test beside this one may have any port by now.
    monkeypatch.setattr(server, "_check_free", lambda *_: None)
    config = ServiceConfig(model=str(tiny_text), num_threads=1)
    service = LocalService(config)
    with pytest.raises(UnavailableError) as caught:
        service.__enter__()
    text = str(caught.value)
    assert text.startswith(f"the service did not start: {line}")
    assert "\n" not in text
    assert not seen[0].exists()


def test_ports_are_looked_at_where_they_will_be_taken() -> None:
    """HTTP on one address of this machine does not mind another's port."""
    with socket.socket() as other:
        other.bind(("127.0.0.2", 0))
        other.listen()
        port = other.getsockname()[1]
        server._check_free(port, "127.0.0.1")
        for host in ("127.0.0.2", "0.0.0.0"):
            with pytest.raises(ConfigError, match=f"port: {port} is in use"):
                server._check_free(port, host)


@pytest.mark.parametrize("host", ["192.0.2.1", "a..b", "not-a-name.invalid"])
def test_an_address_of_another_machine(host: str) -> None:
    with pytest.raises(ConfigError, match=f"http_host: got '{host}', expected an address of this"):
        server._check_free(server.free_port(), host)


def test_serve_listens_where_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    monkeypatch.setattr(serve, "start", lambda **options: started.update(options))
    server.start_serve(ServiceConfig(http_host="127.0.0.2", http_port=8123))
    http = started["http_options"]
    assert (http.host, http.port) == ("127.0.0.2", 8123)

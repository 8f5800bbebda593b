"""A start that fails: one line that says why, and nothing left."""

from __future__ import annotations

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
from twotower.towers.errors import UnavailableError


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
    monkeypatch.setattr(server, "_check_free", lambda _: None)
    config = ServiceConfig(model=str(tiny_text), num_threads=1)
    service = LocalService(config)
    with pytest.raises(UnavailableError) as caught:
        service.__enter__()
    text = str(caught.value)
    assert text.startswith(f"the service did not start: {line}")
    assert "\n" not in text
    assert not seen[0].exists()

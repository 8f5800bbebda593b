"""One running service on the shipped model, and other people's clients in their own environment.

`make clients` makes that environment and runs these tests; `TWOTOWER_CLIENTS` names another one.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

with warnings.catch_warnings():
    # Ray's own models use a spelling that pydantic has deprecated; ours may not.
    warnings.simplefilter("ignore")
    from twotower.deployments.server.server import free_port

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(__file__).parent / "programs"
CLIENTS = Path(os.environ.get("TWOTOWER_CLIENTS", ROOT / ".venv-clients"))
START_S, STOP_S, PROGRAM_S = 120.0, 60.0, 240.0
# Clients look for proxies, hubs and accounts.
ENVIRONMENT = {
    "NO_PROXY": "127.0.0.1,localhost",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "OPENAI_API_KEY": "none",
    "LANGSMITH_TRACING": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "PYTHONWARNINGS": "ignore",
}


@dataclass(frozen=True)
class Service:
    """Where a service runs: its OpenAI base URL, its HTTP root and its gRPC target."""

    base_url: str
    root: str
    target: str


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """`twotower serve` on the shipped model."""
    grpc_port, http_port = free_port(), free_port()
    ports = ["--grpc-port", str(grpc_port), "--http-port", str(http_port)]
    log = tmp_path_factory.mktemp("service") / "stderr"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "twotower.cli", "serve", *ports],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("ready"):
                break
        else:
            pytest.fail(f"the service did not start: {log.read_text()[-2000:]}")
        root = f"http://127.0.0.1:{http_port}"
        yield Service(f"{root}/v1", root, f"127.0.0.1:{grpc_port}")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STOP_S)
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def clients_python() -> str:
    """The interpreter of the clients' environment."""
    python = CLIENTS / "bin" / "python"
    if not python.exists():
        pytest.fail(f"{python} is missing: run `make clients`")
    return str(python)


class Programs:
    """Runs programs that use a client and print one line of JSON."""

    def __init__(self, python: str, service: Service, folder: Path) -> None:
        self._python = python
        self._service = service
        self._folder = folder

    def run(self, name: str, *arguments: str) -> Any:
        """What a program of `programs/` printed last."""
        command = [self._python, str(PROGRAMS / f"{name}.py"), *arguments]
        return json.loads(self.output(command).splitlines()[-1])

    def output(self, command: list[str]) -> str:
        """Stdout of a command, which has to end well."""
        service = self._service
        places = {"BASE_URL": service.base_url, "ROOT": service.root, "TARGET": service.target}
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=PROGRAM_S,
            cwd=self._folder,
            env={**os.environ, **ENVIRONMENT, **places},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout


@pytest.fixture
def programs(clients_python: str, service: Service, tmp_path: Path) -> Programs:
    return Programs(clients_python, service, tmp_path)

"""`twotower serve` as a process: odd surroundings, and the death of each process that it needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.processes import ancestors
from twotower import TwoTower
from twotower.client import Client, GenerationStream, ServiceError
from twotower.deployments.server.server import free_port

pytestmark = [pytest.mark.cluster, pytest.mark.filterwarnings("default")]

ROOT = Path(__file__).parents[2]
PROXY = "http://127.0.0.1:1"
ODD = {
    **{f"{scheme}_proxy": PROXY for scheme in ("http", "https", "grpc", "all")},
    **{f"{scheme}_PROXY": PROXY for scheme in ("HTTP", "HTTPS", "GRPC", "ALL")},
    "RAY_grpc_enable_http_proxy": "1",
    "RAY_ADDRESS": "ray://127.0.0.1:1",
    "RAY_CLIENT_MODE": "1",
    "RAY_JOB_CONFIG_JSON_ENV_VAR": "{",
    "RAY_REDIS_ADDRESS": "127.0.0.1:1",
    "HOME": "/dev/null/home",
    "XDG_CACHE_HOME": "/dev/null/cache",
    "HF_TOKEN": "two\nlines",
    "HF_HUB_OFFLINE": "maybe",
    "OMP_NUM_THREADS": "garbage",
    "MKL_NUM_THREADS": "garbage",
    "GRPC_DNS_RESOLVER": "garbage",
    "GRPC_VERBOSITY": "garbage",
    "PYTHONSTARTUP": "/dev/null/startup",
    "PYTHONWARNINGS": "error",
    "PYTHONOPTIMIZE": "2",
    "LC_ALL": "C",
}
# From a death to the exit of `serve`; on two busy cores killing what is left takes its time, too.
NOTICED_S = 10.0


class Served:
    """A running `twotower serve` and every process that was seen below it."""

    def __init__(self, process: subprocess.Popen[str], address: str) -> None:
        self.process = process
        self.address = address
        self.seen: dict[int, str] = {}

    def look(self) -> None:
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and self.process.pid in ancestors(int(entry.name)):
                self.seen[int(entry.name)] = name_of(int(entry.name))

    def find(self, name: str) -> int:
        """The one process that has this name now; waits for it."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            self.look()
            found = [one for one, known in self.seen.items() if known == name == name_of(one)]
            if found:
                assert len(found) == 1, found
                return found[0]
            time.sleep(0.02)
        raise AssertionError(f"no {name}: {self.seen}")

    def await_ready(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith(f"ready on {self.address}"), self.process.communicate()

    def end(self, code: int, within_s: float) -> list[str]:
        """Waits for the exit with a code, and nothing left; returns the lines of stderr."""
        assert self.process.wait(within_s) == code, self.process.communicate()
        assert [one for one, name in self.seen.items() if name and name_of(one) == name] == []
        out, errors = self.process.communicate()
        assert out == ""
        lines: list[str] = errors.splitlines()
        return [line for line in lines if line != "starting the towers ..."]


def name_of(process: int) -> str:
    """The kernel's name of a process, of at most 15 characters; empty if it is gone."""
    try:
        return Path(f"/proc/{process}/comm").read_text().strip()
    except OSError:
        return ""


@contextmanager
def serve(model: Path, cwd: Path = ROOT, **environ: str) -> Iterator[Served]:
    """Starts the service of a model."""
    port = free_port()
    command = [sys.executable, "-m", "twotower.cli", "serve", "--model", str(model)]
    command += ["--grpc-port", str(port), "--http-port", str(free_port()), "--max-num-seqs", "4"]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield Served(process, f"127.0.0.1:{port}")
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(60)
        process.communicate()


@pytest.fixture
def odd_tmpdir() -> Iterator[Path]:
    """Far longer than a unix socket's path may be, with letters that take two bytes."""
    with tempfile.TemporaryDirectory(prefix="tt tmp ") as short:
        folder = Path(short) / ("ü" * 120)
        folder.mkdir()
        yield folder
        assert list(folder.iterdir()) == []


def begin(client: Client, max_tokens: int) -> tuple[GenerationStream, Iterator[object]]:
    """A stream whose first block is there."""
    stream = client.generate([5, 6], max_tokens=max_tokens, ignore_eos=True, timeout=200)
    blocks = iter(stream)
    next(blocks)
    return stream, blocks


def test_odd_surroundings_and_deaths(tiny_text: Path, odd_tmpdir: Path, tmp_path: Path) -> None:
    """One service, everything odd at once; Ray's own replacements; and the end of its raylet."""
    gone = tmp_path / "gone"
    gone.mkdir()
    alone = TwoTower.from_pretrained(tiny_text).generate([[5, 6]], max_tokens=400)[0].token_ids
    with serve(tiny_text, gone, TMPDIR=str(odd_tmpdir), **ODD) as served:
        gone.rmdir()
        served.await_ready()
        with Client(served.address) as client:
            for victim in ("ray::ServeContr", "ray::ProxyActor"):
                stream, blocks = begin(client, 400)
                os.kill(served.find(victim), signal.SIGKILL)
                list(blocks)
                assert stream.token_ids == alone
            _, blocks = begin(client, 3000)
            served.look()
            raylet = served.find("raylet")
            os.kill(raylet, signal.SIGKILL)
            lines = served.end(1, NOTICED_S)
            assert f"a process that the service needs has ended: raylet ({raylet})" in lines[-1]
            assert not any("Traceback" in line for line in lines)
            with pytest.raises(ServiceError, match="UNAVAILABLE"):
                client.model_info(timeout=5)
    assert not Path(tmp_path / "~").exists()


def test_sigterm_while_it_starts(tiny_text: Path) -> None:
    with serve(tiny_text) as served:
        served.find("raylet")
        served.process.terminate()
        assert served.end(128 + signal.SIGTERM, NOTICED_S) == []


def test_the_gcs_server_dies_while_it_starts(tiny_text: Path) -> None:
    with serve(tiny_text) as served:
        process = served.find("gcs_server")
        os.kill(process, signal.SIGKILL)
        lines = served.end(1, NOTICED_S)
        assert len(lines) == 1
        assert f"gcs_server ({process})" in lines[0]

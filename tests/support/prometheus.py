"""A real Prometheus that runs the shipped scrape config."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import yaml

from tests.support.dashboard import MANIFESTS
from twotower.deployments.server.server import free_port

PROMETHEUS = shutil.which("prometheus", path="/usr/local/bin:/usr/bin:/bin")
START_S = 30.0


class Prometheus:
    """Answers queries at `address`."""

    def __init__(self, address: str) -> None:
        self.client = httpx.Client(base_url=address, trust_env=False, timeout=10.0)

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The series that an expression has now. AssertionError if it is none."""
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", (expression, answer)
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def values(self, expression: str) -> list[float]:
        """The values of these series."""
        return [float(each["value"][1]) for each in self.query(expression)]

    def await_up(self) -> None:
        """Waits until it answers."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            try:
                if self.client.get("/-/ready").status_code == 200:
                    return
            except httpx.TransportError as error:
                print(f"not up yet: {type(error).__name__}")
            time.sleep(0.1)
        raise TimeoutError("Prometheus does not answer")


@contextmanager
def scraping(folder: Path, front: str, key: str, agents: Path) -> Iterator[Prometheus]:
    """Prometheus in `folder`, with the shipped config but for its targets: the `front`, read with
    a key, and the file of Ray's `agents`. It scrapes every second."""
    config = yaml.safe_load((MANIFESTS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"]["scrape_interval"] = "1s"
    of_front, of_nodes = config["scrape_configs"]
    of_front["static_configs"][0]["targets"] = [front]
    of_nodes["file_sd_configs"][0] = {"files": [str(agents)], "refresh_interval": "2s"}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    (folder / of_front["authorization"]["credentials_file"]).write_text(key, encoding="utf-8")
    port = free_port()
    assert PROMETHEUS is not None
    process = subprocess.Popen(
        [
            PROMETHEUS,
            "--config.file=prometheus.yml",
            "--storage.tsdb.path=data",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ],
        cwd=folder,
    )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        running.await_up()
        yield running
    finally:
        running.client.close()
        process.terminate()
        process.wait(timeout=20)

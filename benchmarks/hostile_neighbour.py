"""A client with good manners beside the hostile ones: it streams completions one after another.

    python -m benchmarks.hostile_neighbour EXPECTED.json HTTP_PORT GRPC_TARGET

Over HTTP and gRPC in turn, until it gets SIGTERM. Prints one JSON object for each completion:
{"at": monotonic clock at its start, "front": "http" or "grpc", "first_s", "whole_s": to its first
block and to its end, "fault": what is wrong with it, empty if nothing}. It is a process of its own,
so that it measures the service and not the hostile clients' process.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from twotower.client import Client, ServiceError

TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Reading:
    """One completion."""

    at: float
    front: str
    first_s: float
    whole_s: float
    fault: str


@dataclass(frozen=True)
class Expected:
    """A request, and the tokens that it has to bring."""

    prompt: str
    options: dict[str, Any]
    token_ids: list[int]


Blocks = Callable[[Expected], Any]


def over_http(client: httpx.Client, expected: Expected) -> Any:
    """The ids of each block of a completion by HTTP."""
    body = {"prompt": expected.prompt, "stream": True, "return_token_ids": True}
    body |= {"ignore_eos": True, **expected.options}
    with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            answer.read()
            raise ValueError(f"{answer.status_code}: {answer.text[:200]}")
        lines = [""]
        for line in filter(None, answer.iter_lines()):
            lines.append(line)
            if line != "data: [DONE]":
                chunk = json.loads(line.removeprefix("data: "))
                if "error" in chunk:
                    raise ValueError(str(chunk["error"])[:200])
                yield chunk["choices"][0]["token_ids"]
        if lines[-1] != "data: [DONE]":
            raise ValueError("the stream ended without DONE")


def over_grpc(client: Client, expected: Expected) -> Any:
    """The ids of each block of a completion by gRPC; a stream that breaks is not resumed."""
    options = {"ignore_eos": True, "resume": False, "timeout": TIMEOUT_S, **expected.options}
    for block in client.generate(expected.prompt, **options):
        yield block.token_ids


def reading(front: str, blocks: Blocks, expected: Expected) -> Reading:
    """Times a completion and compares its tokens."""
    begin, first, fault, got = time.monotonic(), 0.0, "", list[int]()
    try:
        for token_ids in blocks(expected):
            first = first or time.monotonic() - begin
            got += token_ids
    except (httpx.HTTPError, ServiceError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
    if not fault and got != expected.token_ids:
        fault = f"wrong tokens: {got}"
    return Reading(begin, front, first, time.monotonic() - begin, fault)


def main() -> None:
    """Streams until it is ended."""
    path, http_port, target = sys.argv[1:]
    requests = [Expected(**each) for each in json.loads(Path(path).read_text(encoding="utf-8"))]
    root = f"http://127.0.0.1:{http_port}"
    with (
        httpx.Client(base_url=root, timeout=TIMEOUT_S, trust_env=False) as http,
        Client(target) as grpc,
    ):
        fronts: tuple[tuple[str, Blocks], ...] = (
            ("http", lambda expected: over_http(http, expected)),
            ("grpc", lambda expected: over_grpc(grpc, expected)),
        )
        for expected in itertools.cycle(requests):
            for front, blocks in fronts:
                print(json.dumps(asdict(reading(front, blocks, expected))), flush=True)


if __name__ == "__main__":
    main()

"""Inputs of batch jobs, from held-out library code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from twotower.towers.training.corpus import read_corpus, standard_library

_SHORTEST, _LONGEST = 12, 60


def held_out_lines() -> list[str]:
    """Different lines of code of the held-out files, in their order."""
    files = (file for file in read_corpus(standard_library()) if file.held_out)
    lines = (line.rstrip() for file in files for line in file.text.splitlines())
    return list(dict.fromkeys(line for line in lines if _SHORTEST <= len(line) <= _LONGEST))


def requests(count: int, **body: Any) -> Iterator[dict[str, Any]]:
    """`count` requests in OpenAI's batch format, each with an id of its own."""
    lines = held_out_lines()
    for index in range(count):
        prompt = lines[index % len(lines)]
        yield {
            "custom_id": f"request-{index:06}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "pystdlib", "prompt": f"{prompt}\n", **body},
        }


def write_requests(path: Path, count: int, **body: Any) -> None:
    """Writes requests as JSON lines."""
    with path.open("w", encoding="utf-8") as file:
        for request in requests(count, **body):
            file.write(json.dumps(request) + "\n")


def ids_of(path: Path) -> list[str]:
    """The ids of a job's output, in its order."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line)["custom_id"] for line in file]


def first_prompts(count: int) -> list[str]:
    """The prompts of the first requests."""
    return [request["body"]["prompt"] for request in islice(requests(count), count)]

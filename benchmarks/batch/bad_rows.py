"""A batch job on an input of which one row in twenty is bad, in ten ways.

    python -m benchmarks.batch.bad_rows [--rows 400]

Every good row must be completed, and every bad one be an error that names its reason. Prints one
JSON object, and ends with 1 if that is not so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.batch.inputs import requests
from twotower.batch import BatchDefaults, JobOptions, run_job

EVERY = 20
BODY = {"max_tokens": 4, "ignore_eos": True}
# What is wrong with a row: its name, what the line of a good request becomes, and a text that its
# error must have in its code, message or field.
Fault = tuple[str, str, str]


def faults(good: dict[str, Any]) -> list[Fault]:
    """The ten ways, made of a good request."""

    def line(**changes: Any) -> str:
        return json.dumps({**good, **changes})

    def body(**changes: Any) -> str:
        return line(body={**good["body"], **changes})

    return [
        ("bad JSON", line()[:-5], "JSON"),
        ("no object", "[1, 2]", "object"),
        ("unknown url", line(url="/v1/images"), "url"),
        ("method", line(method="GET"), "method"),
        ("stream", body(stream=True), "stream"),
        ("id of a wrong type", line(custom_id=7), "custom_id"),
        ("empty prompt", body(prompt=""), "prompt"),
        ("prompt of a wrong type", body(prompt={"text": "x"}), "prompt"),
        ("too long", body(prompt="x = 1\n" * 20_000), "prompt"),
        ("value out of its range", body(temperature=-3), "temperature"),
    ]


def lines(count: int) -> Iterator[tuple[str, Fault | None]]:
    """`count` lines, with the fault of those that are bad."""
    kinds = 0
    for index, good in enumerate(requests(count, **BODY)):
        if index % EVERY == EVERY - 1:
            fault = faults(good)[kinds % 10]
            kinds += 1
            yield fault[1], fault
        else:
            yield json.dumps(good), None


def main() -> None:
    """Parses the arguments, runs the job, prints JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=400)
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        found = measure(Path(folder), list(lines(args.rows)))
    print(json.dumps(found, indent=2))
    sys.exit(0 if found["good_rows"] == found["completed"] and not found["wrong"] else 1)


def measure(folder: Path, given: list[tuple[str, Fault | None]]) -> dict[str, Any]:
    """Runs the job on the lines and looks at every row of its output."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("".join(f"{line}\n" for line, _ in given), encoding="utf-8")
    settings = {"num_threads": 1, "max_context": 512}
    options = JobOptions((str(source),), str(target), BatchDefaults(), service=settings)
    summary = run_job(options)
    errors = {own["error"]["line"]: own["error"] for own in _rows(folder / "out.errors.jsonl")}
    bad = {index + 1: fault for index, (_, fault) in enumerate(given) if fault is not None}
    wrong = [
        {"line": line, "kind": fault[0], "error": errors.get(line)}
        for line, fault in bad.items()
        if fault[2] not in json.dumps(errors.get(line))
    ]
    return {
        "rows": len(given),
        "good_rows": len(given) - len(bad),
        "completed": sum(1 for own in _rows(target) if own["response"]["status_code"] == 200),
        "errors": Counter(fault[0] for fault in bad.values()),
        "wrong": wrong + [{"line": line} for line in sorted(errors.keys() - bad.keys())],
        "summary": summary.to_dict(),
    }


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()

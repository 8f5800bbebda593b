"""The folder of a sweep: a line for each finished point, and its outputs.

`points.jsonl` grows by one line when a point has ended, and the line is on disk before the next
point begins. Every line says of which model, prompts and settings it is, so that a sweep that goes
on never mixes two.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower.sweep.metrics import Row
from twotower.towers.errors import InvalidRequestError

POINTS, OUTPUTS, COSTS = "points.jsonl", "outputs", "costs.json"


class SweepFolder:
    """Finished points of one `identity`: what must be the same for all of them, by name.

    Raises InvalidRequestError if the folder has points of another identity, naming what differs;
    with `fresh` what is there is removed.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, fresh: bool = False) -> None:
        self.path = path
        self.identity = dict(identity)
        path.mkdir(parents=True, exist_ok=True)
        if fresh:
            self._clear()
        self.points: dict[str, dict[str, Any]] = {}
        for line in self._finished():
            self._check(line["of"])
            self.points[line["name"]] = line

    def add(self, point: Mapping[str, Any]) -> None:
        """Appends a finished point, which is on disk when this returns."""
        line = {**point, "of": self.identity}
        with (self.path / POINTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.points[line["name"]] = line

    def write(self, name: str, text: str) -> None:
        """Replaces a file, so that a reader never sees half of it."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        scratch = path.with_name(f"{path.name}.part")
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)

    def write_rows(self, name: str, rows: Sequence[Row]) -> None:
        """Keeps the outputs of a point, a line each, in order of the prompts."""
        self.write(_file(name), "".join(json.dumps(asdict(row)) + "\n" for row in rows))

    def read_rows(self, name: str) -> list[Row] | None:
        """The outputs of a finished point; None if there are none."""
        path = self.path / _file(name)
        if name not in self.points or not path.exists():
            return None
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            Row(
                **line
                | {
                    "token_ids": tuple(line["token_ids"]),
                    "log_probs": tuple(line["log_probs"]),
                    "best_log_probs": tuple(line.get("best_log_probs", ())),
                }
            )
            for line in lines
        ]

    def _clear(self) -> None:
        for name in (POINTS, COSTS):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.path / OUTPUTS, ignore_errors=True)

    def _finished(self) -> list[dict[str, Any]]:
        """The lines that are whole; a last one that was cut off is removed."""
        path = self.path / POINTS
        if not path.exists():
            return []
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            os.truncate(path, whole)
        try:
            return [json.loads(line) for line in text[:whole].splitlines()]
        except ValueError as error:
            raise InvalidRequestError("out", str(path), f"lines of JSON ({error})") from None

    def _check(self, theirs: Mapping[str, Any]) -> None:
        names = sorted({*self.identity, *theirs})
        different = [
            f"{name} {theirs.get(name)} there, {self.identity.get(name)} now"
            for name in names
            if theirs.get(name) != self.identity.get(name)
        ]
        if different:
            raise InvalidRequestError(
                "out", str(self.path), f"points of this sweep ({'; '.join(different)}) or --fresh"
            )


def _file(name: str) -> str:
    return f"{OUTPUTS}/{name.replace(', ', '_').replace(' ', '-')}.jsonl"

"""A report of measurements: a JSON object that is written after every step."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
SECTIONS = ("decode", "ratios", "baseline", "operators", "attention", "scans", "invariance")


class Report:
    """Options, hardware and ceilings of a run, a list of entries per section, and the status of
    every step: done, failed or left out."""

    def __init__(self, options: Mapping[str, Any], hardware: Mapping[str, Any]) -> None:
        self.options = dict(options)
        self.hardware = dict(hardware)
        self.ceilings: dict[str, float] = {}
        self.sections: dict[str, list[Entry]] = {name: [] for name in SECTIONS}
        self.steps: list[Entry] = []
        self._date = time.strftime("%Y-%m-%d")

    def add(self, section: str, *entries: Entry) -> None:
        """Appends entries to a section."""
        self.sections[section] += entries

    def ended(self, step: str, seconds: float) -> None:
        """Notes that a step was done in so many seconds."""
        self.steps.append({"step": step, "status": "done", "seconds": round(seconds, 1)})

    def failed(self, step: str, error: Exception) -> None:
        """Notes that a step has raised an error."""
        reason = f"{type(error).__name__}: {error}"
        where = "".join(traceback.format_exception(error))
        self.steps.append({"step": step, "status": "failed", "reason": reason, "traceback": where})

    def left_out(self, step: str, reason: str) -> None:
        """Notes that a step was not begun."""
        self.steps.append({"step": step, "status": "left out", "reason": reason})

    def any_failed(self) -> bool:
        return any(step["status"] == "failed" for step in self.steps)

    def last_step(self) -> str:
        """The last step and its status, as a line."""
        step = self.steps[-1]
        return f"{step['step']}: {step['status']}, {step.get('reason', step.get('seconds'))}"

    def pass_seconds(self, kind: str, rows: int) -> float | None:
        """Seconds of an engine's pass of a kind over all rows of a run, if one was measured."""
        for entry in self.sections["decode"]:
            for passes in entry["passes"]:
                # Passes have a floor if all rows were in each.
                whole = passes["kind"] == kind and entry["rows"] == rows and "floor_ms" in passes
                if whole:
                    return float(passes["ms"]) / 1e3
        return None

    def to_dict(self) -> Entry:
        """The whole report, ready for JSON."""
        return {
            "date": self._date,
            "hardware": self.hardware,
            "options": self.options,
            "ceilings": self.ceilings,
            **self.sections,
            "steps": self.steps,
        }

    def write(self, path: Path) -> None:
        """Replaces `path` atomically, so that a reader never sees half a report."""
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.part")
        scratch.write_text(json.dumps(self.to_dict(), indent=2, allow_nan=False), encoding="utf-8")
        os.replace(scratch, path)

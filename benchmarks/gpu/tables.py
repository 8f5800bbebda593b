"""A stage's figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from twotower.bench.markdown import markdown

Entry = dict[str, Any]
_MOST_KERNELS = 24
_FAILED_TAIL = 12


def table_of(entry: Entry) -> str:
    """A stage's status and figures, with the last lines of processes that failed."""
    lines = [f"## {entry['stage']}: {entry['status']}", ""]
    if "reason" in entry:
        lines += [entry["reason"], ""]
    if "seconds" in entry:
        lines += [f"{entry['seconds']} s", ""]
    for run in entry.get("runs", ()):
        lines += _run(run)
    return "\n".join(lines)


def _run(run: Entry) -> list[str]:
    words = run["command"]
    program = " ".join(words[1:] if words[:1] == ["-m"] else words)
    ended = "ended at its limit" if run["exit"] is None else f"exit {run['exit']}"
    lines = [f"- `{program[-110:]}`: {ended}, {run['seconds']} s"]
    tail = run.get("tail") or []
    if run["exit"] != 0:
        lines += ["", "```", *tail[-_FAILED_TAIL:], "```"]
    elif tail and "pytest" in program:
        lines.append(f"  {tail[-1]}")
    return [*lines, *_figures(run["figures"] or {}), ""]


def _figures(found: Entry) -> list[str]:
    if "steps" in found:
        return ["", markdown(found)]
    if "products" in found:
        return ["", *_rows(found["products"])]
    if "passes" in found and "captured" in found:
        return ["", *_rows([found["captured"]]), "", *_rows(found["passes"])]
    if "profiles" in found:
        return [line for entry in found["profiles"] for line in _profile(entry)]
    plain = {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return ["", *(line for entry in [plain, *nested] if entry for line in _rows([entry]))]


def _profile(found: Entry) -> list[str]:
    kernels = found.get("kernels", [])[:_MOST_KERNELS]
    scalars = {name: value for name, value in found.items() if not isinstance(value, dict | list)}
    return ["", *_rows([scalars]), "", *_rows(kernels)]


def _rows(entries: Sequence[Entry]) -> list[str]:
    """Entries as a table, a column for each name that any of them has."""
    if not entries:
        return []
    names = list(dict.fromkeys(name for entry in entries for name in entry))
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    lines += [f"| {' | '.join(_cell(entry.get(name)) for name in names)} |" for entry in entries]
    return [*lines, ""]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)

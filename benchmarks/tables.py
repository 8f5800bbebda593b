"""Figures as a table to read and as JSON to keep."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Cell = float | str | None


def table(columns: Sequence[str], rows: Mapping[str, Sequence[Cell]]) -> str:
    """A Markdown table; each row begins with its name, and None is an empty cell."""
    lines = ["| " + " | ".join(("", *columns)) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| " + " | ".join((name, *map(_shown, cells))) + " |" for name, cells in rows.items()]
    return "\n".join(lines)


def keep(found: Mapping[str, Any], path: Path | None) -> None:
    """Writes figures to a JSON file, if one was asked for."""
    if path is not None:
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def _shown(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return cell
    # Adding 0 makes a 0 of what was rounded to -0.
    return f"{round(cell, 3) + 0.0:.3f}" if abs(cell) < 100 else f"{cell:.0f}"

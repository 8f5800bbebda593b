"""The shipped dashboard: its panels, and the metrics that its expressions name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

MANIFESTS = Path(__file__).parents[2] / "cluster" / "manifests"
# Parts of an expression in which words are no metrics.
_NO_METRICS = (
    r'"(?:[^"\\]|\\.)*"',
    r"\{[^{}]*\}",
    r"\[[^\]]*\]",
    r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\([^)]*\)",
)
# A name that is not called, as functions and aggregations are.
_NAME = re.compile(r"\b[a-zA-Z_:][a-zA-Z0-9_:]*\b(?!\s*\()")
_WORDS = {"and", "or", "unless", "bool", "offset"}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana reads it."""
    text = (MANIFESTS / "grafana.json").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


def panels() -> list[dict[str, Any]]:
    """Its panels, rows left out."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def expressions() -> list[tuple[str, str]]:
    """Title and expression of every line of every panel."""
    return [(panel["title"], each["expr"]) for panel in panels() for each in panel["targets"]]


def names_in(expression: str) -> set[str]:
    """The metrics that an expression names."""
    rest = expression
    for pattern in _NO_METRICS:
        rest = re.sub(pattern, " ", rest)
    return {name for name in _NAME.findall(rest) if name not in _WORDS}

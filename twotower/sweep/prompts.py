"""Prompts of a sweep: JSONL with a column `prompt`, or a plain text file."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.towers.errors import InvalidRequestError, shorten

JSONL = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class SweepPrompt:
    """A prompt, and the text that is expected after it, if the file says one."""

    text: str
    reference: str | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[SweepPrompt]:
    """The first `limit` prompts of a file (None: all).

    A `.jsonl` has objects with `prompt` and perhaps `reference`. In any other file prompts are
    lines, or where it has empty lines what stands between these. Raises InvalidRequestError,
    naming the line.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError("prompts", path.name, f"UTF-8 ({error.reason})") from None
    found = _of_jsonl(text) if path.suffix in JSONL else _of_text(text)
    if limit is not None:
        found = found[:limit]
    if not found:
        raise InvalidRequestError("prompts", path.name, "a file of at least 1 prompt")
    return found


def digest(prompts: Sequence[SweepPrompt]) -> str:
    """A short name of these prompts in this order."""
    pairs = json.dumps([(prompt.text, prompt.reference) for prompt in prompts])
    return hashlib.sha256(pairs.encode("utf-8")).hexdigest()[:16]


def _of_text(text: str) -> list[SweepPrompt]:
    text = text.strip("\n")
    pieces = re.split(r"\n[ \t]*\n+", text) if re.search(r"\n[ \t]*\n", text) else text.split("\n")
    return [SweepPrompt(piece) for piece in pieces if piece.strip()]


def _of_jsonl(text: str) -> list[SweepPrompt]:
    lines = enumerate(text.split("\n"), 1)
    return [_of_line(number, line) for number, line in lines if line.strip()]


def _of_line(number: int, line: str) -> SweepPrompt:
    where = f"prompts line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InvalidRequestError(where, line, f"one JSON object ({error})") from None
    if not isinstance(row, dict):
        raise InvalidRequestError(where, row, "a JSON object")
    return SweepPrompt(_text(where, row, "prompt"), _reference(where, row))


def _text(where: str, row: dict[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str) or not value:
        known = f" ({shorten(sorted(row))} there)" if name not in row else ""
        raise InvalidRequestError(f"{where}, {name}", value, f"a text{known}")
    return value


def _reference(where: str, row: dict[str, Any]) -> str | None:
    return None if row.get("reference") is None else _text(where, row, "reference")

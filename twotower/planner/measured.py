"""Reads measured pass times: from a report of `twotower bench`, or from a running pair's stats."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twotower.planner.devices import Device, device_named
from twotower.planner.floors import Ceilings, PassKind
from twotower.planner.question import Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import PRESETS
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

# With a larger share of prompt tokens, a context tower's mean pass says little of extensions.
MOST_PREFILL = 0.1
_KINDS: tuple[PassKind, ...] = ("denoise", "ar", "extend")


@dataclass(frozen=True)
class MeasuredPasses:
    """Seconds of passes at `context` tokens a row: by kind, pairs of rows (ascending) and seconds.

    `ceilings` are those of the same run, if any; `fp8` tells the experts' format, None if `source`
    does not say it.
    """

    source: str
    context: int
    seconds: Mapping[PassKind, Sequence[tuple[float, float]]]
    ceilings: Ceilings | None = None
    fp8: bool | None = None


def read_measured(path: Path, config: TwoTowerConfig, question: Question) -> MeasuredPasses:
    """Reads either kind of file. Raises ConfigError for any other file, and for a report of another
    shape, number format or GPU than the planned ones. A pair's stats name neither these nor their
    context, which is taken to be the question's."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"measured: {path.name} is not readable ({error})") from None
    try:
        if "decode" in body and "options" in body:
            return _of_report(body, path.name, config, device_named(question.gpu))
        if "context" in body and "denoiser" in body:
            return _of_stats(body, path.name, question.context)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"measured: {path.name} lacks {error}") from None
    raise ConfigError(
        f"measured: {path.name} is neither a report of `twotower bench` nor a pair's stats"
    )


def _of_report(
    body: Mapping[str, Any], name: str, config: TwoTowerConfig, device: Device
) -> MeasuredPasses:
    options, hardware = body["options"], body["hardware"]
    if PRESETS[options["preset"]] != config:
        raise ConfigError(f"measured: got the shape {options['preset']!r}, not the planned model's")
    if device.title not in hardware["device"]:
        raise ConfigError(f"measured: got {hardware['device']!r}, expected a {device.title}")
    if options["dtype"] != "bfloat16":
        raise ConfigError(f"measured: got {options['dtype']!r}, expected 'bfloat16'")
    seconds = {kind: _mean_seconds(body["decode"], kind) for kind in _KINDS}
    seconds = {kind: points for kind, points in seconds.items() if points}
    if not seconds:
        raise ConfigError(f"measured: {name} has no passes")
    ceilings = Ceilings(**body["ceilings"])
    source = f"{name}: {hardware['device']}, {body.get('date', 'undated')}"
    return MeasuredPasses(
        source, options["context"], seconds, ceilings, options["experts"] == "fp8"
    )


def _mean_seconds(decode: Sequence[Mapping[str, Any]], kind: PassKind) -> list[tuple[float, float]]:
    """Rows and mean seconds of a report's passes of a kind, by ascending rows."""
    points: dict[float, list[float]] = {}
    for entry in decode:
        for measured in entry["passes"]:
            if measured["kind"] == kind:
                points.setdefault(measured["rows_a_pass"], []).append(measured["ms"] / 1e3)
    return [(rows, sum(times) / len(times)) for rows, times in sorted(points.items())]


def _of_stats(body: Mapping[str, Any], name: str, context: int) -> MeasuredPasses:
    tower, denoiser = body["context"], body["denoiser"]
    prompts = tower["prefill_tokens"] / tower["pass_tokens"]
    if prompts > MOST_PREFILL:
        raise ConfigError(
            f"measured: got {prompts:.0%} of prompt tokens among the context tower's, expected at "
            f"most {MOST_PREFILL:.0%}: its passes were not extensions"
        )
    seconds: dict[PassKind, list[tuple[float, float]]] = {
        "denoise": _mean_pass(denoiser, denoiser["pass_rows"]),
        "extend": _mean_pass(tower, tower["pass_tokens"] / BLOCK),
    }
    return MeasuredPasses(f"{name}: stats of a running pair", context, seconds)


def _mean_pass(tower: Mapping[str, float], rows: float) -> list[tuple[float, float]]:
    """Rows and seconds of a tower's mean pass; `rows` are those of all its passes."""
    count = tower["passes"]
    return [(rows / count, tower["pass_seconds"] / count)]

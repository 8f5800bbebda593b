"""Pass times that were measured: a report of `twotower bench`, or a running pair's stats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twotower.planner.devices import Device, device_named
from twotower.planner.floors import Ceilings, PassKind
from twotower.planner.passes import Measured
from twotower.planner.question import Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import PRESETS
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

# More prompt tokens than this among a context tower's, and its mean pass says little of extensions.
MOST_PREFILL = 0.1
_KINDS: dict[str, PassKind] = {"denoise": "denoise", "ar": "ar", "extend": "extend"}


@dataclass(frozen=True)
class MeasuredPasses:
    """Passes by kind, and the ceilings of the same run if it had any. `fp8` None: not said."""

    source: str
    passes: Mapping[PassKind, Measured]
    ceilings: Ceilings | None = None
    fp8: bool | None = None


@dataclass
class _Points:
    """Seconds by rows; those of one number of rows are averaged."""

    sums: dict[float, list[float]] = field(default_factory=dict)

    def add(self, rows: float, seconds: float) -> None:
        self.sums.setdefault(rows, []).append(seconds)

    def measured(self, context: int) -> Measured:
        means = [(rows, sum(own) / len(own)) for rows, own in sorted(self.sums.items())]
        return Measured(context, means)


def read_measured(path: Path, config: TwoTowerConfig, question: Question) -> MeasuredPasses:
    """Reads either kind of file. Raises ConfigError for any other, and where the report is of
    another shape, number format or GPU than planned for; a pair's stats do not say theirs, nor
    their context, which is taken to be the question's."""
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
    points: dict[PassKind, _Points] = {}
    for entry in body["decode"]:
        for own in entry["passes"]:
            if own["kind"] in _KINDS:
                kind = _KINDS[own["kind"]]
                points.setdefault(kind, _Points()).add(own["rows_a_pass"], own["ms"] / 1e3)
    if not points:
        raise ConfigError(f"measured: {name} has no passes")
    passes = {kind: own.measured(options["context"]) for kind, own in points.items()}
    ceilings = Ceilings(**body["ceilings"])
    source = f"{name}: {hardware['device']}, {body.get('date', 'undated')}"
    return MeasuredPasses(source, passes, ceilings, options["experts"] == "fp8")


def _of_stats(body: Mapping[str, Any], name: str, context: int) -> MeasuredPasses:
    tower, denoiser = body["context"], body["denoiser"]
    prompts = tower["prefill_tokens"] / tower["pass_tokens"]
    if prompts > MOST_PREFILL:
        raise ConfigError(
            f"measured: got {prompts:.0%} of prompt tokens among the context tower's, expected at "
            f"most {MOST_PREFILL:.0%}: its passes were not extensions"
        )
    passes: dict[PassKind, Measured] = {
        "denoise": _mean(denoiser, denoiser["pass_rows"], context),
        "extend": _mean(tower, tower["pass_tokens"] / BLOCK, context),
    }
    return MeasuredPasses(f"{name}: stats of a running pair", passes)


def _mean(tower: Mapping[str, float], rows: float, context: int) -> Measured:
    count = tower["passes"]
    return Measured(context, [(rows / count, tower["pass_seconds"] / count)])

"""Reads measured pass times: from a report of `twotower bench`, or from a running pair's stats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from twotower.planner.devices import Device, device_named
from twotower.planner.floors import Ceilings, PassKind
from twotower.planner.question import Experts, Question
from twotower.planner.schedules import BLOCK
from twotower.planner.shapes import PRESETS
from twotower.towers.config.model_config import TwoTowerConfig
from twotower.towers.errors import ConfigError

# With a larger share of prompt tokens, a context tower's mean pass says little of extensions.
MOST_PREFILL = 0.1
_KINDS: tuple[PassKind, ...] = ("denoise", "ar", "extend", "verify")
_Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class MeasuredPasses:
    """Seconds of passes at `context` tokens a row: by kind, pairs of rows (ascending) and seconds.

    `cycles` are rows and the ratio of a whole draft and verification to its two passes, above 1 by
    what happens between them. `ceilings` are those of the same run, if any; `fp8` tells the
    experts' format and `device` the GPU, None and empty if `source` does not say it.
    """

    source: str
    context: int
    seconds: Mapping[PassKind, _Points]
    ceilings: Ceilings | None = None
    fp8: bool | None = None
    device: str = ""
    cycles: _Points = ()


def read_all(
    paths: Iterable[Path], config: TwoTowerConfig, question: Question
) -> list[MeasuredPasses]:
    """Reads files, and of folders all files whose names end in .json. Raises ConfigError as
    `read_measured` does, and for a folder without any."""
    found: list[MeasuredPasses] = []
    for path in paths:
        files = sorted(path.glob("*.json")) if path.is_dir() else [path]
        if not files:
            raise ConfigError(f"measured: got {str(path)!r}, expected a folder with .json files")
        found += [read_measured(file, config, question) for file in files]
    return found


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


def by_format(reports: Sequence[MeasuredPasses]) -> dict[Experts, MeasuredPasses]:
    """Reports merged by the format of the experts; a source that does not say it is of both.

    Passes of the same kind and rows in several reports count as the mean of these, and so do
    ceilings. What a verified cycle takes beside its passes is the same work in both formats, so a
    format without a measured cycle has the other's. Raises ConfigError for reports of different
    GPUs or contexts, and for a pair's stats beside another file.
    """
    if len(reports) == 1 and reports[0].fp8 is None:
        return {"full": reports[0], "fp8": reports[0]}
    for report in reports:
        if report.fp8 is None:
            raise ConfigError(
                f"measured: got {report.source} beside other files, expected it alone"
            )
        _check_alike(report, reports[0])
    flags: dict[Experts, bool] = {"full": False, "fp8": True}
    own = {name: [each for each in reports if each.fp8 is flag] for name, flag in flags.items()}
    cycles = _means(at for each in reports for at in each.cycles)
    merged = {name: _merged(found) for name, found in own.items() if found}
    return {
        name: known if known.cycles else replace(known, cycles=cycles)
        for name, known in merged.items()
    }


def _check_alike(report: MeasuredPasses, first: MeasuredPasses) -> None:
    if report.device != first.device:
        raise ConfigError(
            f"measured: got reports of {first.device} and {report.device}, expected one kind of GPU"
        )
    if report.context != first.context:
        raise ConfigError(
            f"measured: got reports at {first.context} and {report.context} tokens of context, "
            "expected equal ones"
        )


def _merged(reports: Sequence[MeasuredPasses]) -> MeasuredPasses:
    """Reports of one GPU, context and format as one."""
    if len(reports) == 1:
        return reports[0]
    kinds = [kind for kind in _KINDS if any(kind in each.seconds for each in reports)]
    # Names of files by what they say of themselves.
    names: dict[str, list[str]] = {}
    for each in reports:
        name, _, rest = each.source.partition(": ")
        names.setdefault(rest, []).append(name)
    rates = [each.ceilings for each in reports if each.ceilings is not None]
    return MeasuredPasses(
        "; ".join(f"{', '.join(own)}: {rest}" for rest, own in names.items()),
        reports[0].context,
        {
            kind: _means(at for each in reports for at in each.seconds.get(kind, ()))
            for kind in kinds
        },
        _mean_ceilings(rates),
        reports[0].fp8,
        reports[0].device,
        _means(at for each in reports for at in each.cycles),
    )


def _mean_ceilings(rates: Sequence[Ceilings]) -> Ceilings:
    """The mean of each rate; that of products in 8 bits over the runs that measured it."""
    narrow = [each.fp8_flops for each in rates if each.fp8_flops is not None]
    return Ceilings(
        fmean(each.bytes_per_s for each in rates),
        fmean(each.matmul_flops for each in rates),
        fmean(each.wide_flops for each in rates),
        fmean(narrow) if narrow else None,
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
    products = options.get("expert_products", "widened")
    if products != "widened":
        raise ConfigError(f"measured: got expert_products {products!r}, expected 'widened'")
    seconds = {kind: _mean_seconds(body["decode"], kind) for kind in _KINDS}
    seconds = {kind: points for kind, points in seconds.items() if points}
    if not seconds:
        raise ConfigError(f"measured: {name} has no passes")
    return MeasuredPasses(
        f"{name}: {hardware['device']}, {body.get('date', 'undated')}",
        options["context"],
        seconds,
        Ceilings(**body["ceilings"]),
        options["experts"] == "fp8",
        hardware["device"],
        _means(
            (float(entry["rows"]), entry["cycle_ms"] / sum(own["ms"] for own in entry["passes"]))
            for entry in body["decode"]
            if "cycle_ms" in entry
        ),
    )


def _mean_seconds(decode: Sequence[Mapping[str, Any]], kind: PassKind) -> list[tuple[float, float]]:
    """Rows and mean seconds of a report's passes of a kind, by ascending rows."""
    return _means(
        (measured["rows_a_pass"], measured["ms"] / 1e3)
        for entry in decode
        for measured in entry["passes"]
        if measured["kind"] == kind
    )


def _means(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points by ascending rows, those of equal rows as their mean."""
    times: dict[float, list[float]] = {}
    for rows, seconds in points:
        times.setdefault(rows, []).append(seconds)
    return [(rows, sum(own) / len(own)) for rows, own in sorted(times.items())]


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
